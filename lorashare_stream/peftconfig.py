"""The parts of an adapter_config.json that decide what its tensors mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .errors import AdapterError

Config = Mapping[str, Any]


def check_lora(config: Config) -> None:
    """Refuse what is not a plain PEFT LoRA configuration.

    Raises:
        AdapterError: naming the peft_type or the field.
    """
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(
            f"not a LoRA adapter: peft_type is {peft_type!r}" if peft_type else "adapter_config.json has no peft_type",
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
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            _refuse_field(name, value, "a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, int | float) for v in pattern.values()):
            _refuse_field(name, pattern, "a mapping of module patterns to numbers")


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
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as e:
            raise AdapterError("a module pattern is no regular expression", key=key, found=str(e)) from e
    return default
