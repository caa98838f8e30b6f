"""Hot swap: another adapter in the place of the one that a `peft.PeftModel` has."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.config import initial_part
from ..checkpoint.reader import Tensors
from ..checkpoint.restore import save_adapter
from ..errors import CheckpointError, UsageError
from ..text import listed, printable
from .uniform import uniform

_FACTOR = re.compile(r"\.lora_([AB])\.weight$")


def swap(model: Any, tensors: Tensors, config: Mapping[str, Any], adapter: str) -> None:
    """Put an adapter in the place of the one that a model has, by PEFT's hot swap, or else by loading it anew.

    The hot swap copies uniform factors, and whatever else the adapter has, into the parameters that are there; modules
    that only the former adapter has get zeros. It is taken where the two have the same weights beside their factors,
    and factors of linear layers only, in modules of the former.

    Args:
        model: a `peft.PeftModel` with one adapter, which keeps its place and that adapter's name there.
        tensors: PEFT key -> tensor, as `SHAREModel.reconstruct` gives them.
        config: its adapter_config.json.
        adapter: its name, for errors.

    Raises:
        UsageError: if the model has no such place.
    """
    slot = _slot(model)
    found = _fitting(model, slot, tensors, config, adapter)
    if found is None:
        _load(model, slot, tensors, config, adapter)
    else:
        _copy(model, slot, *found)


def _slot(model: Any) -> str:
    """The name of the adapter in a model.

    Raises:
        UsageError: if it is no `peft.PeftModel`, or has not one LoRA adapter that can be taken out.
    """
    from peft import LoraConfig, PeftModel

    remedy = "Make it by share.apply(base_model, name)."
    if not isinstance(model, PeftModel):
        kind = type(model).__name__
        raise UsageError("no model to swap an adapter in", found=kind, expected="a peft.PeftModel", remedy=remedy)
    configs: dict[str, Any] = model.peft_config
    if len(configs) != 1:
        raise UsageError(
            "a model with several adapters, of which PEFT's hot swap may change others", found=listed(configs),
            expected="one adapter", remedy="Delete the others (model.delete_adapter).",
        )  # fmt: skip
    ((slot, config),) = configs.items()
    if not isinstance(config, LoraConfig):
        raise UsageError("the adapter in the model is no LoRA", found=type(config).__name__, remedy=remedy)
    if any(slot in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise UsageError("the adapter in the model is merged", found=slot, remedy="Call model.unmerge_adapter().")
    if initial_part({"init_lora_weights": config.init_lora_weights}) is not None:
        raise UsageError(
            "the adapter in the model has changed the base model when it was loaded",
            found=f"init_lora_weights {printable(config.init_lora_weights, 40)}",
            remedy="Load the base model again, and the other adapter by share.apply.",
        )
    return slot


def _fitting(
    model: Any, slot: str, tensors: Tensors, config: Mapping[str, Any], adapter: str
) -> tuple[Tensors, dict[str, Any]] | None:
    """A uniform adapter of a rank that the model holds, whose parameters are all there; None if it has others."""
    from peft import get_peft_model_state_dict

    held: Tensors = get_peft_model_state_dict(model, adapter_name=slot, save_embedding_layers=False)
    shapes, new_shapes = _shapes(held), _shapes(tensors)
    beside = {key for key in shapes.keys() ^ new_shapes.keys() if not _FACTOR.search(key)}
    others = any(".lora_" in key and not _FACTOR.search(key) for key in shapes | new_shapes)
    if beside or others or not new_shapes.items() <= shapes.items() or _stacked(config, model.peft_config[slot]):
        return None
    rank = max(tensor.shape[0] for key, tensor in held.items() if ".lora_A." in key)
    try:
        _, least = uniform(tensors, config, adapter=adapter)
        found, new = uniform(tensors, config, rank=max(rank, least["r"]), adapter=adapter)
    except CheckpointError:  # not of one scale: PEFT loads it all the same
        return None
    for key in held.keys() - found.keys():
        found[key] = torch.zeros(_of_rank(held[key], key, new["r"]), dtype=held[key].dtype)
    return found, new


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes by key, those of factors at rank 0."""
    return {key: _of_rank(tensor, key, 0) for key, tensor in tensors.items()}


def _of_rank(tensor: torch.Tensor, key: str, rank: int) -> tuple[int, ...]:
    side, shape = _FACTOR.search(key), tuple(tensor.shape)
    if side is None:
        return shape
    return (rank, *shape[1:]) if side[1] == "A" else (shape[0], rank, *shape[2:])


def _stacked(config: Mapping[str, Any], held: Any) -> bool:
    """Whether one of two configurations has stacked experts, whose tensors have E r rows."""
    return bool(config.get("target_parameters") or held.target_parameters)


def _copy(model: Any, slot: str, tensors: Tensors, config: Mapping[str, Any]) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    plain = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
    new = replace(model.peft_config[slot], **{name: config[name] for name in plain})
    factors = {key: tensor for key, tensor in tensors.items() if _FACTOR.search(key)}
    named = {key.removesuffix("weight") + f"{slot}.weight": tensor for key, tensor in factors.items()}
    hotswap_adapter_from_state_dict(model, named, slot, new)
    set_peft_model_state_dict(model, {k: t for k, t in tensors.items() if k not in factors}, adapter_name=slot)
    model.peft_config[slot] = new
    for module in model.modules():
        if slot in getattr(module, "lora_alpha", ()):  # else a later save, or set_scale, has those of the former
            module.r[slot] = module.lora_alpha[slot] = new.r


def _load(model: Any, slot: str, tensors: Tensors, config: Mapping[str, Any], adapter: str) -> None:
    """Load an adapter in the place of another, whose parameters are made anew."""
    held = model.peft_config[slot]
    for field, found in (("bias", held.bias), ("layer_replication", held.layer_replication or "none")):
        if found != "none" or (field == "layer_replication" and config.get(field)):
            raise UsageError(
                "an adapter that changes the base model, for which a swap does not bring it back", adapter=adapter,
                key=field, remedy="Load the base model again, and the adapter by share.apply.",
            )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), tensors, config, None)
        model.delete_adapter(slot)
        model.load_adapter(folder, slot)
    model.set_adapter(slot)
