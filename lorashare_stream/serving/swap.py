"""Hot swap: another adapter in the place of the one that a `peft.PeftModel` has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..adapters.config import initial_part
from ..checkpoint.reader import Tensors
from ..errors import UsageError
from ..text import listed, printable
from .uniform import uniform

_FACTOR = re.compile(r"\.lora_([AB])\.weight$")
_PLAIN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")  # what `uniform` sets
_ANEW = "Load it anew, on the base model that it is of: model = share.apply(model.unload(), name)."


def swap(model: Any, tensors: Tensors, config: Mapping[str, Any], adapter: str) -> None:
    """Put an adapter in the place of the one that a model has, by PEFT's hot swap.

    Factors of linear layers and all weights beside them are copied into the parameters that are there, uniform, of the
    larger of the two ranks; modules that only the former adapter has get zeros.

    Args:
        model: a `peft.PeftModel` with one adapter, whose name there stays.
        tensors: PEFT key -> tensor, as `SHAREModel.reconstruct` gives them.
        config: its adapter_config.json.
        adapter: its name, for errors.

    Raises:
        UsageError: if the model has no place for it; it is as it was then.
        CheckpointError: if the adapter cannot be uniform.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    slot = _slot(model)
    held: Tensors = get_peft_model_state_dict(model, adapter_name=slot, save_embedding_layers=False)
    _check_fits(held, model.peft_config[slot], tensors, config, adapter)
    found, uniform_config = _uniform(held, tensors, config, adapter)
    new = replace(model.peft_config[slot], **{name: uniform_config[name] for name in _PLAIN})
    factors = {key: tensor for key, tensor in found.items() if _FACTOR.search(key)}
    named = {f"{key.removesuffix('weight')}{slot}.weight": tensor for key, tensor in factors.items()}
    hotswap_adapter_from_state_dict(model, named, slot, new)
    if beside := {key: tensor for key, tensor in found.items() if key not in factors}:
        set_peft_model_state_dict(model, beside, adapter_name=slot)
    model.peft_config[slot] = new
    for module in model.modules():
        if slot in getattr(module, "lora_alpha", ()):  # else set_scale takes those of the former adapter
            module.r[slot] = module.lora_alpha[slot] = new.r


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


def _check_fits(held: Tensors, config: Any, tensors: Tensors, new: Mapping[str, Any], adapter: str) -> None:
    """Demand that the parameters of an adapter are among those that a model holds, but for their rank.

    Raises:
        UsageError: naming the field or key that has no place.
    """
    for field in ("use_dora", "layer_replication", "target_parameters"):
        if getattr(config, field) != (new.get(field) or type(getattr(config, field))()):
            raise UsageError(
                "an adapter of another kind than the one in the model", adapter=adapter, key=field,
                found=new.get(field), expected=getattr(config, field), remedy=_ANEW,
            )  # fmt: skip
    shapes, wanted = _shapes(held), _shapes(tensors)
    for key in wanted | shapes:
        factor = _FACTOR.search(key) is not None
        if ".lora_" in key and (not factor or config.target_parameters):
            raise UsageError("PEFT's hot swap takes factors of layers only", adapter=adapter, key=key, remedy=_ANEW)
        if key not in shapes or (key not in wanted and not factor):
            where = "the adapter in the model has" if key in wanted else "only the adapter in the model has"
            lack = "no such parameter" if key in wanted else "such a parameter"
            raise UsageError(f"{where} {lack}", adapter=adapter, key=key, remedy=_ANEW)
        if key in wanted and shapes[key] != wanted[key]:
            raise UsageError(
                "the adapter in the model has a parameter of another shape", adapter=adapter, key=key,
                found=_told(wanted[key]), expected=_told(shapes[key]), remedy=_ANEW,
            )  # fmt: skip


def _uniform(
    held: Tensors, tensors: Tensors, config: Mapping[str, Any], adapter: str
) -> tuple[Tensors, dict[str, Any]]:
    """A uniform adapter with all factors that a model holds, of a rank no smaller than theirs."""
    ranks = [t.shape[0] for some in (held, tensors) for key, t in some.items() if ".lora_A." in key]
    found, new = uniform(tensors, config, rank=max(ranks, default=1), adapter=adapter)
    for key in held.keys() - found.keys():
        found[key] = torch.zeros(_of_rank(held[key], key, new["r"]), dtype=held[key].dtype)
    return found, new


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes by key, those of factors at rank 0."""
    return {key: _of_rank(tensor, key, 0) for key, tensor in tensors.items()}


def _told(shape: tuple[int, ...]) -> str:
    """A shape, that of a factor without its rank."""
    return f"[{', '.join(str(n) if n else 'r' for n in shape)}]"


def _of_rank(tensor: torch.Tensor, key: str, rank: int) -> tuple[int, ...]:
    side, shape = _FACTOR.search(key), tuple(tensor.shape)
    if side is None:
        return shape
    return (rank, *shape[1:]) if side[1] == "A" else (shape[0], rank, *shape[2:])
