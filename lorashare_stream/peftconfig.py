"""The parts of an adapter_config.json that decide what its tensors mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]  # the parse tree of an expression has no public name
from typing import Any

from .errors import AdapterError
from .names import shown

Config = Mapping[str, Any]
_MOST_LOOPS = 4
_SINGLE = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.CATEGORY)


def check_lora(config: Config) -> None:
    """Refuse what is not a plain PEFT LoRA configuration.

    Raises:
        AdapterError: naming the peft_type or the field.
    """
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(
            f"not a LoRA adapter: peft_type is {shown(repr(peft_type), 60)}"
            if peft_type
            else "adapter_config.json has no peft_type",
            key="peft_type",
            found=peft_type,
            expected="LORA",
            remedy="Leave it out, or convert it with peft.tuners.lora.conversion.save_as_lora where PEFT can.",
        )
    if config.get("enable_lora"):
        raise AdapterError(
            "a legacy MergedLinear adapter (enable_lora), which current PEFT cannot load",
            key="enable_lora",
            remedy="Convert it with the PEFT release that made it.",
        )
    if not _is_rank(config.get("r")):
        _refuse_field("r", config.get("r"), "a whole number from 1")
    if not _is_alpha(config.get("lora_alpha")):
        _refuse_field("lora_alpha", config.get("lora_alpha"), "a number")
    for name, holds in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(holds(value) for value in pattern.values()):
            _refuse_field(name, pattern, "a mapping of module patterns to numbers")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_alpha(value: object) -> bool:
    # Bounded, so that squares of scales stay finite; PEFT itself takes zero and negative ones.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _refuse_field(name: str, found: object, expected: str) -> None:
    raise AdapterError(
        f"adapter_config.json has an unusable {name}",
        key=name,
        found=found,
        expected=expected,
        remedy="Mend the configuration, or leave the adapter out.",
    )


def base_model(config: Config) -> str | None:
    """The base model that the adapter names, or None if it names none."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def rank(config: Config, module: str) -> int:
    """The rank that PEFT gives `module`: `rank_pattern` where it matches, else `r`."""
    return int(_patterned(config.get("rank_pattern"), module, config["r"]))


def scale(config: Config, module: str) -> float:
    """PEFT's factor s in dW = s B A of one module: alpha / r, or alpha / sqrt(r) under rsLoRA.

    >>> scale({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q": 32}}, "h.0.q")
    4.0
    """
    alpha = float(_patterned(config.get("alpha_pattern"), module, config["lora_alpha"]))
    r = rank(config, module)
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _patterned(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """The first pattern that matches the end of `module` at a dot (peft.utils.get_pattern_key)."""
    for key, value in (pattern or {}).items():
        if _compiled(key).match(module):
            return value
    return default


@lru_cache(maxsize=1024)
def _compiled(key: str) -> re.Pattern[str]:
    """PEFT's expression for a pattern key, which is foreign: refused if matching it could take forever."""
    try:
        tree = _parser.parse(key)
        compiled = re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as e:
        raise AdapterError("a module pattern is no regular expression", key=key, found=str(e)) from e
    loops = _loops(tree)
    if loops is None or loops > _MOST_LOOPS:
        raise AdapterError(
            "a module pattern could take forever to match",
            key=key,
            expected=f"no loop within a loop, and at most {_MOST_LOOPS} loops",
            remedy="Write it with fewer wildcards.",
        )
    return compiled


def _loops(tree: Iterable[Any]) -> int | None:
    """How many loops over single characters a parsed expression has; None if it loops over anything more.

    Matching backtracks: without loops in loops its cost is the length of the module name to the power of the
    number of loops, with them it is exponential.
    """
    count = 0
    for operator, argument in tree:
        if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            _, most, body = argument
            if most > 1 and (len(body) != 1 or body[0][0] not in _SINGLE):
                return None
            parts = [body] if most <= 1 else []
            count += most > 1
        elif operator is _constants.BRANCH:
            parts = argument[1]
        elif operator is _constants.SUBPATTERN:
            parts = [argument[-1]]
        elif operator in _SINGLE or operator is _constants.AT:
            parts = []
        else:  # look-around, back-references, conditionals: not seen in any adapter
            return None
        inner = [_loops(part) for part in parts]
        if None in inner:
            return None
        count += sum(n for n in inner if n is not None)
    return count
