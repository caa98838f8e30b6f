"""Uniform adapters: one rank and scale 1 for all modules, so that engines with other rules of scale agree on dW.

A hot swap puts the uniform form of an adapter in the place of the one that a `peft.PeftModel` has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..adapters.config import Config, check_lora, initial_part, other_scaling, rank_and_alpha, scalings
from ..adapters.keys import PEFT_PREFIX
from ..adapters.scaling import Scaling
from ..checkpoint.reader import Tensors
from ..errors import AdapterError, RefusedAdapterError, UndecidedError, UsageError
from ..text import listed, printable

REMEDY = "Reconstruct it plainly (without --uniform, --rank and --for), and serve it by PEFT."
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<embedding>[AB]))$")
WITHIN = ".base_layer.out_proj"  # of a MultiheadAttention
# What else belongs to a factor without a rank of its own. Others may have one (lora_diag, states of training).
_OF_ANY_RANK = re.compile(r"\.lora_(?:[AB]\.(?:weight|bias)$|embedding_[AB]$|magnitude_vector$)")
_LINEAR = re.compile(r"\.lora_([AB])\.weight$")
_ANEW = "Load it anew, on the base model that it is of: model = share.apply(model.unload(), name)."
_STATES = {"monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA"}  # PEFT builds them anew by r


@dataclass(frozen=True, slots=True)
class Pair:
    """Keys of the factors of one module, or of one embedding."""

    a: str
    b: str
    embedding: bool

    @property
    def bias(self) -> str:
        """The key that a bias of lora_B has."""
        return f"{self.b.removesuffix('.weight')}.bias"


def uniform(
    tensors: Tensors, config: Mapping[str, Any], *, rank: int | None = None, adapter: str = ""
) -> tuple[Tensors, dict[str, Any]]:
    """An adapter with the same dW, of one rank R and scale 1 in every module.

    The scale s of a module goes into one factor: lora_B, or lora_embedding_A, of which the lora_B of a tied output
    layer is the transpose; into the other one where its dtype cannot hold the product. Zeros fill up what a module
    lacks of R. Everything else stays as it is.

    Args:
        tensors: PEFT key -> tensor, as `SHAREModel.reconstruct` gives them.
        config: its adapter_config.json.
        rank: R; None is the largest rank of a module.
        adapter: its name, for errors.

    Returns:
        Tensors by the same keys, lora_A (R, d_in) and lora_B (d_out, R), and a configuration with r = lora_alpha = R,
        without patterns, rsLoRA and initialisation, with `target_modules` as a list.

    Raises:
        RefusedAdapterError: if dW is not s B A of the tensors, s cannot be told, a module has a larger rank than R,
            or a product does not fit its dtype.
        UsageError: if `rank` is no rank.
    """
    if rank is not None and not 1 <= rank < 1 << 31:
        raise UsageError("rank (--rank) cannot be this", found=rank, expected="a whole number from 1")
    try:
        return _uniform(tensors, config, rank)
    except RefusedAdapterError as e:
        e.adapter = adapter or None
        raise
    except AdapterError as e:
        raise RefusedAdapterError(
            e.problem, adapter=adapter or None, key=e.key, found=e.found, expected=e.expected, remedy=REMEDY
        ) from e


def _uniform(tensors: Tensors, config: Config, rank: int | None) -> tuple[Tensors, dict[str, Any]]:
    check_lora(config)
    _refuse_other_products(tensors, config)
    pairs = pairs_of(tensors, config)
    ranks = {module: tensors[pair.a].shape[0] for module, pair in pairs.items()}
    scales = dict(zip(pairs, scalings(config, ranks), strict=True))
    own = {module: ranks[module] // scales[module].experts for module in pairs}
    most = max(own, key=own.__getitem__, default=None)
    largest = rank_and_alpha(config)[0] if most is None else own[most]
    if rank is not None and most is not None and rank < largest:
        raise RefusedAdapterError(
            "a module has a larger rank", key=pairs[most].a, found=largest, expected=f"at most {rank}",
            remedy=f"Give --rank {largest} or more, or none.",
        )  # fmt: skip
    chosen = largest if rank is None else rank
    out = dict(tensors)
    for module, pair in pairs.items():
        out[pair.a], out[pair.b] = _padded(tensors, pair, scales[module].experts, chosen)
        out |= _scaled(out, pair, scales[module].scale)
    _check_ties(tensors, out, pairs)
    return out, _config(config, chosen, pairs, scales)


def _refuse_other_products(tensors: Tensors, config: Config) -> None:
    other = initial_part(config)
    if other is not None:  # PEFT splits the base by r and s, whenever it loads the adapter
        init = printable(config["init_lora_weights"], 40)
        raise UndecidedError("its factors may hold a part of the base model", key="init_lora_weights", found=init)
    other = other_scaling(config)
    if other is not None:
        raise UndecidedError(f"dW is another product than s B A: {other}")
    for name, method in _STATES.items():
        if config.get(name) not in (None, False):
            raise UndecidedError(f"the state of training of {method} depends on the rank", key=name)
    for key in tensors:
        if re.search(r"\.lora_[a-z]", key) and not _OF_ANY_RANK.search(key):
            raise UndecidedError("a tensor beside the factors, which may depend on the rank", key=key)


def pairs_of(tensors: Tensors, config: Config) -> dict[str, Pair]:
    """The factors of each module; raises UndecidedError if one lacks the other, or has a dtype without products."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for key in tensors:
        match = _FACTOR.match(key.removeprefix(PEFT_PREFIX))
        if match is not None:
            side = match["side"] or match["embedding"]
            found.setdefault((match["module"], match["side"] is None), {})[side] = key
    pairs: dict[str, Pair] = {}
    for (module, embedding), keys in found.items():
        (key, *_) = keys.values()
        if len(keys) == 1:
            if _is_saved(config, key):  # a whole layer that is called lora_A or lora_B
                continue
            raise UndecidedError("one side of a factor without the other, which PEFT draws at random", key=key)
        for key in keys.values():
            if tensors[key].dtype not in _DTYPES:
                raise UndecidedError("factors of a dtype without products", key=key, found=tensors[key].dtype)
        pairs[module] = Pair(keys["A"], keys["B"], embedding)
    return pairs


def _is_saved(config: Config, key: str) -> bool:
    path = key.removeprefix(PEFT_PREFIX).removesuffix(".weight")
    return any(f".{path}".endswith(f".{name}") for name in config.get("modules_to_save") or ())


def _padded(tensors: Tensors, pair: Pair, experts: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (E R, d_in) and (d_out, R E): zeros follow the rows of each expert, and its columns."""
    a, b = tensors[pair.a], tensors[pair.b]
    own = a.shape[0] // experts
    if own == rank:
        return a, b
    if a.dim() > 2:
        raise RefusedAdapterError(
            "a convolution of a smaller rank than others, whose groups only the base model tells", key=pair.a,
            found=own, expected=rank, remedy=REMEDY,
        )  # fmt: skip
    wide = a.new_zeros(experts, rank, a.shape[1])
    wide[:, :own] = a.reshape(experts, own, -1)
    tall = b.new_zeros(b.shape[0], rank, experts)
    tall[:, :own] = b.reshape(-1, own, experts)
    return wide.reshape(experts * rank, -1), tall.reshape(-1, rank * experts)


def _scaled(tensors: Tensors, pair: Pair, scale: float) -> Tensors:
    """One factor times the scale, and the bias of lora_B, which PEFT multiplies by it, too."""
    if scale == 1:
        return {}
    factors = (pair.a, pair.b) if pair.embedding else (pair.b, pair.a)
    bias = _fitting(tensors, (pair.bias,), scale) if pair.bias in tensors else {}
    return _fitting(tensors, factors, scale) | bias


def _fitting(tensors: Tensors, keys: tuple[str, ...], scale: float) -> Tensors:
    """The first of some tensors whose dtype holds its product with a scale, times it."""
    for key in keys:
        product = _product(tensors[key], scale)
        if product is not None:
            return {key: product}
    dtype = str(tensors[keys[0]].dtype).removeprefix("torch.")
    raise RefusedAdapterError(
        f"{dtype} does not hold the product of factor and scale", key=keys[0], found=f"scale {scale:g}",
        expected="values in its range", remedy=REMEDY,
    )  # fmt: skip


def _product(tensor: torch.Tensor, scale: float) -> torch.Tensor | None:
    """`scale` times a tensor, in its dtype; None if that loses more than it rounds."""
    exact = tensor.double() * scale
    rounded = exact.to(tensor.dtype)
    if not bool(torch.isfinite(exact).all()):
        return rounded if not bool(torch.isfinite(tensor).all()) else None
    if not bool(torch.isfinite(rounded).all()):
        return None
    peak = float(exact.abs().max()) if exact.numel() else 0.0
    if peak == 0:
        return rounded if scale == 0 or not bool(tensor.any()) else None
    off = float(((rounded.double() - exact) / peak).norm()) / float((exact / peak).norm())
    return rounded if off <= torch.finfo(tensor.dtype).eps else None


def _check_ties(before: Tensors, after: Tensors, pairs: Mapping[str, Pair]) -> None:
    """Demand that an output layer which PEFT ties to an embedding still has the embedding's factors, transposed."""

    def tied(tensors: Tensors, embedding: Pair, layer: Pair) -> bool:
        both = ((tensors[layer.b], tensors[embedding.a]), (tensors[layer.a], tensors[embedding.b]))
        return all(one.dtype == other.dtype and torch.equal(one, other.T) for one, other in both)

    for embedding in [pair for pair in pairs.values() if pair.embedding]:
        for pair in pairs.values():
            if (
                not pair.embedding
                and before[pair.a].dim() == 2
                and tied(before, embedding, pair)
                and not tied(after, embedding, pair)
            ):
                raise UndecidedError("factors of two modules are tied, and their scales are not", key=pair.b)


def _plain(rank: int) -> dict[str, Any]:
    """Fields of a configuration with one rank and scale 1."""
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    return {"r": rank, "lora_alpha": rank, **patterns, "use_rslora": False, "init_lora_weights": True}


def _config(config: Config, rank: int, pairs: Mapping[str, Pair], scales: Mapping[str, Scaling]) -> dict[str, Any]:
    out = dict(config) | _plain(rank) | ({"eva_config": None} if config.get("eva_config") else {})  # else PEFT warns
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or ()
    if isinstance(targets, list) or not all("." in name for name in parameters):
        return out  # a parameter of any module may be a layer as well, which only the expression tells apart
    within = {module for module in pairs if module.endswith(WITHIN) and module.removesuffix(WITHIN) in pairs}
    layers = {module for module in pairs if not scales[module].parameters}
    return out | {"target_modules": sorted(layers - within)}


# -- hot swap --------------------------------------------------------------------------------------------


def swap(model: Any, tensors: Tensors, config: Mapping[str, Any], adapter: str) -> None:
    """Put an adapter in the place of the one that a model has, by PEFT's hot swap.

    Factors of linear layers and all weights beside them are copied into the parameters that are there, uniform, of the
    larger of the two ranks; modules that only the former adapter has get zeros. Its name in the model stays.

    Raises:
        UsageError: naming the field or key that has no place in the model, which is as it was then.
        RefusedAdapterError: if the adapter cannot be uniform.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    slot = _slot(model)
    held: Tensors = get_peft_model_state_dict(model, adapter_name=slot, save_embedding_layers=False)
    _check_fits(held, model.peft_config[slot], tensors, config, adapter)
    found, rank = _uniform_like(held, tensors, config, adapter)
    new = replace(model.peft_config[slot], **_plain(rank))
    factors = {key: tensor for key, tensor in found.items() if _LINEAR.search(key)}
    named = {f"{key.removesuffix('weight')}{slot}.weight": tensor for key, tensor in factors.items()}
    hotswap_adapter_from_state_dict(model, named, slot, new)
    if beside := {key: tensor for key, tensor in found.items() if key not in factors}:
        set_peft_model_state_dict(model, beside, adapter_name=slot)
    model.peft_config[slot] = new
    for module in model.modules():
        if slot in getattr(module, "lora_alpha", ()):  # else set_scale takes those of the former adapter
            module.r[slot] = module.lora_alpha[slot] = rank


def _slot(model: Any) -> str:
    """The name of the one LoRA adapter in a `peft.PeftModel`, which can be taken out; else raises UsageError."""
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
    """Demand that the parameters of an adapter are among those that a model holds, but for their rank."""
    for field in ("use_dora", "layer_replication", "target_parameters"):
        if getattr(config, field) != (new.get(field) or type(getattr(config, field))()):
            raise UsageError(
                "an adapter of another kind than the one in the model", adapter=adapter, key=field,
                found=new.get(field), expected=getattr(config, field), remedy=_ANEW,
            )  # fmt: skip
    shapes, wanted = _shapes(held), _shapes(tensors)
    for key in wanted | shapes:
        factor = _LINEAR.search(key) is not None
        if ".lora_" in key and (not factor or config.target_parameters):
            raise UsageError("PEFT's hot swap takes factors of layers only", adapter=adapter, key=key, remedy=_ANEW)
        if key not in shapes or (key not in wanted and not factor):
            where = "the adapter in the model has" if key in wanted else "only the adapter in the model has"
            lack = "no such parameter" if key in wanted else "such a parameter"
            raise UsageError(f"{where} {lack}", adapter=adapter, key=key, remedy=_ANEW)
        if key in wanted and shapes[key] != wanted[key]:
            raise UsageError(
                "the adapter in the model has a parameter of another shape", adapter=adapter, key=key,
                found=_shown(wanted[key]), expected=_shown(shapes[key]), remedy=_ANEW,
            )  # fmt: skip


def _uniform_like(held: Tensors, tensors: Tensors, config: Config, adapter: str) -> tuple[Tensors, int]:
    """A uniform adapter with all factors that a model holds, and its rank, which is no smaller than theirs."""
    ranks = [t.shape[0] for some in (held, tensors) for key, t in some.items() if ".lora_A." in key]
    rank = max(ranks, default=1)
    found, _ = uniform(tensors, config, rank=rank, adapter=adapter)
    for key in held.keys() - found.keys():
        found[key] = torch.zeros(_of_rank(held[key], key, rank), dtype=held[key].dtype)
    return found, rank


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes by key, those of factors at rank 0."""
    return {key: _of_rank(tensor, key, 0) for key, tensor in tensors.items()}


def _shown(shape: tuple[int, ...]) -> str:
    """A shape, that of a factor without its rank."""
    return f"[{', '.join(str(n) if n else 'r' for n in shape)}]"


def _of_rank(tensor: torch.Tensor, key: str, rank: int) -> tuple[int, ...]:
    side, shape = _LINEAR.search(key), tuple(tensor.shape)
    if side is None:
        return shape
    return (rank, *shape[1:]) if side[1] == "A" else (shape[0], rank, *shape[2:])
