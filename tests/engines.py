"""The rules by which engines make dW of an adapter's folder, in float64: a few lines each, with where they stand."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]
Deltas = dict[str, torch.Tensor]


def pairs(tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (
            tensors[f"{name}.lora_A.weight"].double(),
            tensors[f"{name}.lora_B.weight"].double(),
        )
        for name in names
    }


def peft(tensors: Tensors, config: Config, experts: Mapping[str, int] | None = None) -> Deltas:
    """peft/tuners/lora/model.py (`_create_and_replace`) and layer.py: alpha / r, or alpha / sqrt(r), by patterns.

    Of stacked experts (ParamWrapper.get_delta_weight), dW (E, d_out, d_in), with the patterns of the parameter.
    """
    known = LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"})
    out = {}
    for module, (a, b) in pairs(tensors).items():
        count = (experts or {}).get(module, 1)
        name = module if count == 1 else f"{module}.{known.target_parameters[0].rpartition('.')[2]}"
        r = known.rank_pattern.get(get_pattern_key(known.rank_pattern, name), known.r)
        alpha = known.alpha_pattern.get(get_pattern_key(known.alpha_pattern, name), known.lora_alpha)
        assert a.shape[0] == r * count, "PEFT would not load it"
        scale = alpha / math.sqrt(r) if known.use_rslora else alpha / r
        wide, tall = a.reshape(count, r, -1), b.reshape(b.shape[0], r, count)
        delta = scale * torch.einsum("ore,eri->eoi", tall, wide)
        out[module] = delta[0] if count == 1 else delta
    return out


def vllm(tensors: Tensors, config: Config) -> Deltas:
    """vllm/lora/peft_helper.py (`get_rank_and_scaling`): the rule of PEFT, of which the rank is the configured one."""

    def of(field: str, module: str, default: float) -> float:
        patterns = config.get(field) or {}
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    out = {}
    for module, (a, b) in pairs(tensors).items():
        r, alpha = of("rank_pattern", module, config["r"]), of("alpha_pattern", module, config["lora_alpha"])
        out[module] = (alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r) * b @ a
    return out


def sglang(tensors: Tensors, config: Config) -> Deltas:
    """sglang/srt/lora/lora.py (`LoRAAdapter.scaling`): lora_alpha / r of the configuration, for all modules."""
    return {module: config["lora_alpha"] / config["r"] * b @ a for module, (a, b) in pairs(tensors).items()}


def lorax(tensors: Tensors, config: Config) -> Deltas:
    """lorax_server/adapters/lora.py (`LoraWeights.load`): one scale, and a stack of a kind's factors of all layers.

    Raises:
        RuntimeError: of `torch.stack`, where the ranks of a kind differ.
    """
    r, alpha = config["r"], config["lora_alpha"]
    scale = alpha / r**0.5 if config.get("use_rslora") else alpha / r
    kinds: dict[str, list[str]] = defaultdict(list)
    found = pairs(tensors)
    for module in found:
        kinds[re.sub(r"\.\d+\.", ".*.", module)].append(module)
    out = {}
    for modules in kinds.values():
        a, b = (torch.stack([found[module][side] for module in modules]) for side in (0, 1))
        out |= dict(zip(modules, scale * b @ a, strict=True))
    return out


def llama_cpp(tensors: Tensors, config: Config) -> Deltas:
    """lora_alpha of the configuration; llama-adapter.h (`get_scale`) has alpha over the rank of B, or 1."""
    alpha = float(config["lora_alpha"])
    return {module: (alpha / b.shape[1] if alpha else 1.0) * b @ a for module, (a, b) in pairs(tensors).items()}


RULES: dict[str, Callable[[Tensors, Config], Deltas]] = {
    "vllm": vllm, "sglang": sglang, "lorax": lorax, "llama.cpp": llama_cpp, "peft": peft,
}  # fmt: skip
