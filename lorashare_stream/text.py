"""Foreign strings: how they are shown, and when one may become a path component.

Adapter names, tensor keys and paths come from other people's files. They never choose where a file
is written, and they are never printed raw: a name can hold control characters or bidirectional marks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MAX_NAME_BYTES = 200  # of UTF-8; file systems stop at 255, and staged files add a prefix and a suffix
_FORBIDDEN = frozenset('/\\:*?"<>|')  # also what Windows and FAT refuse, so a checkpoint can be copied there
_RESERVED = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # device names on Windows


def printable(text: object, limit: int = 300) -> str:
    r"""`text` for a terminal, a log or an error: unprintable characters escaped, length bounded.

    >>> printable("evil\x1b[2J\u202ename")
    'evil\\x1b[2J\\u202ename'
    """
    raw = text if isinstance(text, str) else _text(text)
    out = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in raw[:limit])
    return out if len(raw) <= limit else f"{out}... ({len(raw)} characters)"


def encodable(text: str, encoding: str | None) -> str:
    r"""`text` with what an encoding cannot hold escaped: a log's, whose locale need not be that of the names.

    >>> encodable("M\u00fcller", "ascii")
    'M\\xfcller'
    """
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def has_surrogates(text: str) -> bool:
    """Whether a text has bytes of a file name that are not UTF-8, which Python spells as surrogates."""
    return any("\ud800" <= c <= "\udfff" for c in text)


_VALUES = (
    "max_error", "max_bytes", "ratio", "memory", "workers", "workspace", "device", "dtype", "disk_budget", "on_error",
    "base_model",
)  # fmt: skip
_SWITCHES = (
    "any_base", "share_initial", "directions", "discard_moments", "overwrite", "offline", "take_lock", "create_pr",
    "uniform",
)  # fmt: skip
_ARGUMENTS = {  # option of the command line -> argument in Python
    **{f"--{name.replace('_', '-')}": name for name in _VALUES},
    **{f"--{name.replace('_', '-')}": f"{name}=True" for name in _SWITCHES},
    "-k": "num_components",
    "--variance": "variance_threshold",
    "--base-alias": "base_aliases",
    "--public": "private=False",
    "--rank": "rank",
    "--for": "engine",
}
_FLAG = re.compile(rf"(?<![\w-])({'|'.join(_ARGUMENTS)})(?![\w-])(?: (\d+(?:\.\d+)?\w*|skip|cuda)\b)?")
_in_shell = [False]


@contextmanager
def in_shell() -> Iterator[None]:
    """Have messages name options as a shell takes them, until the end of the block."""
    before, _in_shell[0] = _in_shell[0], True
    try:
        yield
    finally:
        _in_shell[0] = before


def spelled(text: str) -> str:
    """A message that names options of the command line, with those of Python instead, unless a shell is told.

    >>> spelled("num_components (-k) cannot be 0. Go on by --on-error skip, or --memory 5MiB.")
    'num_components cannot be 0. Go on by on_error="skip", or memory="5MiB".'
    """
    if _in_shell[0]:
        return text

    def named(found: re.Match[str]) -> str:
        name, flag = found.groups()
        return name if flag == f"--{name.replace('_', '-')}" or _ARGUMENTS.get(flag) == name else found[0]

    def argument(found: re.Match[str]) -> str:
        name, value = _ARGUMENTS[found[1]], found[2]
        if value is None:
            return name
        return f"{name}={value}" if re.fullmatch(r"[\d.]+", value) else f'{name}="{value}"'

    return _FLAG.sub(argument, re.sub(r"\b([a-z_]+) \((-[a-z-]+)\)", named, text))


def _text(value: object) -> str:
    """A value as text of bounded size: a container may hold itself many times over (YAML aliases)."""
    return _BOUNDED.repr(value) if isinstance(value, dict | list | tuple | set) else str(value)


_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel, _BOUNDED.maxstring, _BOUNDED.maxother = 3, 80, 80


def listed(items: Iterable[object], limit: int = 8) -> str:
    """A bounded, escaped, comma-separated list: `a, b, c and 997 more`."""
    all_items = [printable(i, 120) for i in items]
    more = len(all_items) - limit
    return ", ".join(all_items[:limit]) + (f" and {more} more" if more > 0 else "")


def few(lines: Sequence[str], thing: str, limit: int = 8) -> list[str]:
    """Lines of bounded number, the last of which counts the others: `and 57 names more`.

    >>> few(["a", "b", "c"], "name", 1)
    ['a', 'and 2 names more']
    """
    more = len(lines) - limit
    return [*lines[:limit], *([f"and {counted(more, thing)} more"] if more > 0 else [])]


def name_fault(name: str) -> str | None:
    """Why `name` cannot name an adapter (one path component), or None if it can.

    >>> name_fault("a/b")
    "it holds '/'"
    """
    if not name:
        return "it is empty"
    if name.startswith("."):
        return "it starts with '.'"
    if name != name.strip() or name.endswith("."):
        return "it starts or ends with a blank, or ends with '.'"
    for c in name:
        if c in _FORBIDDEN:
            return f"it holds {c!r}"
        if not c.isprintable():
            return f"it holds the unprintable character {printable(c)}"
    if _RESERVED.fullmatch(name):
        return "it is a reserved device name"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "no file can have it under this locale (PYTHONUTF8=1 helps)"
    return None


def is_component(name: object) -> bool:
    """Whether `name` is one path component: enough to read a folder that exists, not to make one."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def folded(name: str) -> str:
    """The form in which names are compared: file systems may ignore case and Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def source_suffix(source_id: str) -> str:
    """`-` and the first 8 hex digits of the SHA-256 of a source id."""
    return "-" + hashlib.sha256(source_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def derived_name(base: str, source_id: str) -> str:
    """`base` if it may name an adapter, else the nearest name that may, made unique by its source id."""
    if name_fault(base) is None:
        return base
    safe = "".join(c if c.isprintable() and c not in _FORBIDDEN else "_" for c in base).strip(" .")
    safe = safe.encode("utf-8", "ignore")[: MAX_NAME_BYTES - 9].decode("utf-8", "ignore").rstrip(" .")
    return (safe or "adapter") + source_suffix(source_id)


def unique_names(wanted: Sequence[tuple[str, str]], taken: Iterable[str] = ()) -> list[str]:
    """A name for every source: its wanted name, unless another source wants the same, case-folded.

    Args:
        wanted: (source id, wanted name) of each source, no pair twice.
        taken: names already given; a name once given is never given again, nor changed.

    Returns:
        The names, in the order of `wanted`. Every member of a clash gets the suffix of its own source
        id, so that a name does not depend on the order of discovery.
    """
    base = [derived_name(name, source) for source, name in wanted]
    claims = Counter([*(folded(name) for name in taken), *(folded(name) for name in base)])
    names = [
        _suffixed(name, source_suffix(source)) if claims[folded(name)] > 1 else name
        for name, (source, _) in zip(base, wanted, strict=True)
    ]
    final = Counter([*(folded(name) for name in taken), *(folded(name) for name in names)])
    return [  # a clash that is left was made on purpose (a name that already ends in another's suffix)
        _suffixed(name, source_suffix(f"{source}\0{name}")) if final[folded(name)] > 1 else name
        for name, (source, _) in zip(names, wanted, strict=True)
    ]


def _suffixed(name: str, suffix: str) -> str:
    if name.endswith(suffix):
        return name
    return name.encode("utf-8")[: MAX_NAME_BYTES - len(suffix)].decode("utf-8", "ignore").rstrip(" .") + suffix


def slug(text: str) -> str:
    """A readable, unique, safe path component for any string: what is legible of it, and its digest."""
    legible = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[-80:].lstrip(".")
    return f"{legible}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def digest_of(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a plain value, as JSON has it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def counted(count: int, thing: str) -> str:
    """`1 adapter`, `2 adapters`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def figure(value: object) -> str:
    """A measure in a file that may be a stranger's."""
    return f"{value:.4f}" if isinstance(value, int | float) and abs(value) < 1e300 else "unknown"


def bytes_shown(count: float) -> str:
    """A size in binary units: `1.5 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_bytes(text: str) -> int:
    """`4GiB`, `500 MB`, `1.5g` or a plain number of bytes.

    Raises:
        ValueError: if it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([kmgt]?)(i?)b?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"not a size: {printable(text)!r}; write for example 4GiB or 500MB")
    number, unit, binary = match.groups()
    base = 1000 if unit and not binary and text.strip()[-1] in "bB" else 1024
    return int(float(number) * base ** " kmgt".index(unit.lower() or " "))
