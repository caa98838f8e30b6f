"""PEFT tensor keys: what is LoRA, what is an extra, what is another kind of file.

A group is (module, side); the side is read from the key, never from the shape. The regular expressions
were checked against what PEFT 0.21 saves; they are applied to the key without its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")
PEFT_PREFIX = "base_model.model."

_WRAPPERS = r"(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)*"
_PREFIX = re.compile(rf"^{_WRAPPERS}(?:base_model\.model\.)*{_WRAPPERS}")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
# Extras whose keys carry the adapter's name when they were not saved by PEFT itself; PEFT expects them without.
_NAMED_EXTRAS = (
    re.compile(r"^(?P<head>.+\.lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?(?P<tail>)$"),
    re.compile(r"^(?P<head>.+\.lora_B)(?:\.(?P<adapter>[^.]+))?(?P<tail>\.bias)$"),
    re.compile(r"^(?P<head>.+\.lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?(?P<tail>)$"),
)

_FOREIGN: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("kohya LoRA", re.compile(r"^lora_(?:unet|te\d?|transformer|prior)_.*\.(?:lora_(?:up|down)\.weight|alpha)$")),
    ("diffusers LoRA", re.compile(r"(?:^|[._])(?:lora|lora_linear_layer)\.(?:up|down)\.weight$")),
    ("diffusers LoRA", re.compile(r"to_(?:q|k|v|out)_lora\.(?:up|down)\.weight$")),
    ("AdaLoRA", re.compile(r"\.lora_E(?:\.|$)")),
    (
        "another PEFT method",
        re.compile(
            r"\.(?:hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|ia3_l|vera_lambda_[bd]|vblora_logits_[AB]|"
            r"ranknum|oft_R|boft_[Rs]|randlora_\w+|hra_u|fourierft_spectrum|ln_tuning_layers|poly_lora_[AB]|"
            r"prompt_embeddings|unilora_\w+)"
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Key:
    """A tensor key, understood.

    Attributes:
        canonical: the key as PEFT saves it: prefixed, without an adapter name.
        module: full path of the adapted layer, or None for an extra.
        side: `"A"` or `"B"`, or None for an extra.
        adapter: the adapter name that the raw key carried, if any.
    """

    canonical: str
    module: str | None = None
    side: Side | None = None
    adapter: str | None = None


def parse_key(raw: str) -> Key:
    """Understand one tensor key.

    >>> parse_key("base_model.model.h.0.q.lora_A.default.weight")
    Key(canonical='base_model.model.h.0.q.lora_A.weight', module='h.0.q', side='A', adapter='default')
    >>> parse_key("score.weight").canonical
    'base_model.model.score.weight'
    """
    bare = _PREFIX.sub("", raw)
    factor = _FACTOR.match(bare)
    if factor is not None:
        module, side = factor["module"], factor["side"]
        return Key(
            factor_key(module, "A" if side == "A" else "B"), module, "A" if side == "A" else "B", factor["adapter"]
        )
    for pattern in _NAMED_EXTRAS:
        extra = pattern.match(bare)
        if extra is not None:
            return Key(PEFT_PREFIX + extra["head"] + extra["tail"], adapter=extra["adapter"])
    return Key(PEFT_PREFIX + bare)


def factor_key(module: str, side: Side) -> str:
    """The PEFT key of a module's lora_A or lora_B weight."""
    return f"{PEFT_PREFIX}{module}.lora_{side}.weight"


def group_id(module: str, side: Side) -> str:
    """`module:side`, the id of a group in SHARE files."""
    return f"{module}:{side}"


def split_group_id(group: str) -> tuple[str, Side]:
    """The inverse of `group_id`.

    Raises:
        ValueError: if `group` is no group id.
    """
    module, _, side = group.rpartition(":")
    if not module or side not in SIDES:
        raise ValueError(f"{group!r} is not of the form module:A or module:B")
    return module, "A" if side == "A" else "B"


def foreign_kind(raw_keys: Iterable[str]) -> str | None:
    """The kind of a file that is not a PEFT LoRA, if its keys tell; None if they do not.

    >>> foreign_kind(["lora_unet_down_blocks_0.lora_up.weight"])
    'kohya LoRA'
    """
    for key in raw_keys:
        for kind, pattern in _FOREIGN:
            if pattern.search(key):
                return kind
    return None
