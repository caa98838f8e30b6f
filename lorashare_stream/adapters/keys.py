"""PEFT tensor keys: what is LoRA, what is an extra.

A group is (module, side); the side is read from the key, never from the shape. The regular expressions
were checked against what PEFT 0.21 saves. A key comes as PEFT saves it, or as a state dict has it: with the
adapter's name in it, with names of wrappers, or without PEFT's own prefix. PEFT loads only the first form and
passes over the others with a warning, so what is written is always of that form. A prefix that comes twice stays:
PEFT saves that of a base model which has a `base_model.model` of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")
PEFT_PREFIX = "base_model.model."

_PREFIX = re.compile(r"^(?:module\.)*(?:base_model\.model\.)?")
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_MAGNITUDE = re.compile(r"(?<=\.lora_magnitude_vector)\.weight$")
# Where the name of an adapter stands in a state dict.
_NAMED = re.compile(
    r"(?P<module>^|^.*\.)lora_(?:(?P<side>[AB])\.(?P<factor>[^.]+)\.(?:weight|bias)"
    r"|(?:embedding_(?P<part>[AB])|diag|velora_embed)\.(?P<parameter>[^.]+)"
    r"|magnitude_vector\.(?P<magnitude>(?!weight$)[^.]+)(?:\.weight)?)$"
)


@dataclass(frozen=True, slots=True)
class Key:
    """A parsed tensor key.

    Attributes:
        canonical: the key as PEFT saves it: prefixed, without an adapter name.
        module: full path of the adapted layer, or None for an extra.
        side: `"A"` or `"B"`, or None for an extra.
    """

    canonical: str
    module: str | None = None
    side: Side | None = None


def parse_key(raw: str, adapter: str | None = None) -> Key:
    """Parse one tensor key.

    Args:
        raw: as it stands in the file.
        adapter: the name that keys of this file carry (`adapter_names`); empty if none; None if the key must tell.

    >>> parse_key("base_model.model.h.0.q.lora_A.default.weight")
    Key(canonical='base_model.model.h.0.q.lora_A.weight', module='h.0.q', side='A')
    >>> parse_key("module.score.modules_to_save.mine.weight", "mine").canonical
    'base_model.model.score.weight'
    """
    bare = _PREFIX.sub("", _WRAPPER.sub("", raw))
    name = adapter if adapter is not None else _name_in(bare)
    if name:
        bare = _without_name(bare, name)
    bare = _MAGNITUDE.sub("", bare)
    factor = _FACTOR.match(bare)
    if factor is None:
        return Key(PEFT_PREFIX + bare)
    side: Side = "A" if factor["side"] == "A" else "B"
    return Key(PEFT_PREFIX + bare, factor["module"], side)


def adapter_names(raw_keys: Iterable[str]) -> list[str]:
    """The names of adapters that keys carry, sorted; none in what PEFT saves.

    A name is one that makes a pair of some module's factors. Where none does, and no factor is without one, all are.

    >>> adapter_names(["q.lora_A.one.weight", "q.lora_B.one.weight", "head.lora_A.x.weight"])
    ['one']
    """
    named: dict[tuple[str, str], set[str]] = {}
    unnamed: dict[str, set[str]] = {}
    for key in raw_keys:
        match = _NAMED.search(key) if "lora_" in key else None
        if match is not None and (name := _name_of(match)) is not None:
            named.setdefault((match["module"], name), set()).add(match["side"] or match["part"] or "")
        elif (factor := _FACTOR.match(key)) is not None:
            unnamed.setdefault(f"{factor['module']}.", set()).add(factor["side"])
    both = set(SIDES)
    paired = {n for (m, n), sides in named.items() if sides | unnamed.get(m, set()) >= both > unnamed.get(m, set())}
    return sorted(paired or (set() if unnamed else {name for _, name in named}))


def _name_in(key: str) -> str | None:
    match = _NAMED.search(key)
    return None if match is None else _name_of(match)


def _name_of(match: re.Match[str]) -> str | None:
    name: str = match["factor"] or match["parameter"] or match["magnitude"]
    return None if name in ("lora_A", "lora_B") else name  # a module may be called so


def _without_name(bare: str, name: str) -> str:
    """A key as PEFT saves it (peft.utils.save_and_load): without the adapter's name, and without `modules_to_save`."""
    bare = _after_marker(name).sub(r"\1", bare)
    head, marker, rest = bare.partition(f".modules_to_save.{name}.")
    if not marker:
        return bare
    # LoRA on a module that is saved as well: PEFT kept the marker there.
    return f"{head}.modules_to_save.{rest}" if ".lora_" in f".{rest}" else f"{head}.{rest}"


@lru_cache(maxsize=64)
def _after_marker(name: str) -> re.Pattern[str]:
    return re.compile(rf"(\.(?:lora_[A-Za-z_]+|trainable_tokens_(?:delta|original)))\.{re.escape(name)}(?=\.|$)")


def factor_key(module: str, side: Side) -> str:
    """The PEFT key of a module's lora_A or lora_B weight."""
    return f"{PEFT_PREFIX}{module}.lora_{side}.weight"


def group_id(module: str, side: Side) -> str:
    """`module:side`, the id of a group in SHARE files."""
    return f"{module}:{side}"


def split_group_id(group: str) -> tuple[str, Side]:
    """The inverse of `group_id`; ValueError if `group` is none."""
    module, _, side = group.rpartition(":")
    if not module or side not in SIDES:
        raise ValueError(f"{group!r} is not of the form module:A or module:B")
    return module, "A" if side == "A" else "B"


def kind_and_depth(module: str) -> tuple[str, int | None]:
    """The kind of a module, the last name in its path, and the first number in that, if there is one.

    >>> kind_and_depth("model.layers.3.self_attn.q_proj"), kind_and_depth("blocks.0.to_out.1"), kind_and_depth("head")
    (('q_proj', 3), ('to_out.1', 0), ('head', None))
    """
    parts = module.split(".")
    numbers = [part.isascii() and part.isdecimal() and len(part) < 10 for part in parts]
    last = max((i for i, number in enumerate(numbers) if not number), default=0)
    depth = next((int(part) for part, number in zip(parts[:last], numbers[:last], strict=True) if number), None)
    return ".".join(parts[last:]), depth
