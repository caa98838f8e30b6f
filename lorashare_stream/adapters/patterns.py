"""Module patterns of PEFT configurations: regular expressions from strangers, matched in linear time by RE2."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import re2

from ..errors import AdapterError, UndecidedError
from ..text import printable

_MOST_STEPS = 10**9  # of RE2, an instruction at a character; some 10**8 a second at worst
_STEPS_TO_COMPILE, _STEPS_A_CHARACTER = 20_000, 500
_MOST_CHARACTERS = 10_000  # of one pattern
_MOST_MEMORY = 1 << 18  # bytes of a compiled pattern
_WORD = f"{string.ascii_letters}{string.digits}_-"
_LITERAL = re.compile(r"[\w.-]*")
_UNDECIDABLE = re.compile(r"[\n\ud800-\udfff]")  # of names: $ is before a last line break, too; surrogates are no UTF-8
# What both take, and mean differently: POSIX classes, octal numbers or references, counts that are text to RE2.
_DIFFERS = re.compile(r"[\ud800-\udfff]|\[:|\\\d|\{(?!(0|[1-9]\d{0,3})(,(0|[1-9]\d{0,3})?)?\})")
_ASCII_TO_RE2 = re.compile(r"\\[A-Za-z]|\(\?")  # classes and flags: of Unicode to Python


def matcher(patterns: Collection[str], names: Collection[str]) -> Callable[[str], str | None]:
    """The lookup of the first pattern that matches the end of a name at a dot (peft.utils.get_pattern_key), or None.

    Patterns are as PEFT gives them to `re`; `names` are all that will be looked up.

    Raises:
        AdapterError: for a pattern that is no regular expression.
        UndecidedError: where RE2 does not take a pattern, could mean another thing by it than `re`, or would need long.
    """
    plain = all(name and name.isascii() and name.isprintable() for name in names)
    longest, steps = max(map(len, names), default=0), 0
    reach: dict[str, int] = {}  # characters of all names with this ending
    compiled: list[tuple[str, str, Any]] = []
    for pattern in patterns:
        if _LITERAL.fullmatch(pattern) and len(pattern) > longest:
            continue
        ending = _ending(pattern)
        steps += _STEPS_TO_COMPILE + _STEPS_A_CHARACTER * len(pattern) + (ending not in reach) * len(names)
        if steps <= _MOST_STEPS:
            compiled.append((pattern, ending, _compiled(pattern, plain and pattern.isascii())))
            if ending not in reach:
                reach[ending] = sum(len(name) for name in names if name.endswith(ending))
            steps += compiled[-1][-1].programsize * reach[ending]
        if steps > _MOST_STEPS:
            raise UndecidedError(f"{len(patterns)} patterns are too many for {len(names)} modules")
    if compiled and any(_UNDECIDABLE.search(name) for name in names):
        raise UndecidedError("the name of a module has a line break or a surrogate")

    def first_match(name: str) -> str | None:
        return next((p for p, ending, found in compiled if name.endswith(ending) and found.match(name)), None)

    return first_match


def _ending(pattern: str) -> str:
    """How every name must end that a pattern matches."""
    head = pattern.rstrip(_WORD)
    return "" if "|" in pattern or head.endswith("\\") else pattern[len(head) :]


@lru_cache(maxsize=1 << 10)
def _compiled(pattern: str, plain: bool) -> Any:
    """PEFT's expression for a pattern, which Python has taken as well; `plain`: of, and for, printable ASCII."""
    expression = rf"(.*\.)?({pattern})$"
    reason = "it is too long" if len(pattern) > _MOST_CHARACTERS else None
    if reason is None and not _LITERAL.fullmatch(pattern):
        reason = _difference(pattern, expression, plain)
    if reason is None:
        try:
            options = re2.Options()
            options.max_mem, options.never_capture, options.log_errors = _MOST_MEMORY, True, False
            return re2.compile(expression, options)
        except (re2.error, UnicodeEncodeError) as e:
            reason = e.args[0].decode(errors="replace") if isinstance(e, re2.error) else "it has surrogates"
    raise UndecidedError(
        f"RE2 cannot decide the module pattern {printable(repr(pattern), 60)} ({printable(reason, 60)})"
    )


def _difference(pattern: str, expression: str, plain: bool) -> str | None:
    """Why RE2 could answer otherwise than Python; None if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(expression)
    except FutureWarning as e:
        return str(e)
    except (re.error, RecursionError, OverflowError) as e:
        remedy = "Mend rank_pattern or alpha_pattern, or leave the adapter out."
        raise AdapterError("a module pattern is no regular expression", key=pattern, found=str(e), remedy=remedy) from e
    differs = _DIFFERS.search(pattern) or (None if plain else _ASCII_TO_RE2.search(pattern))
    return differs and f"{differs[0]} means another thing to Python"
