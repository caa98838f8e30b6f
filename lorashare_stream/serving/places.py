"""Places of an adapter's tensors in a base model: factors of which modules, parameters of which, or why it has none."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.config import Config, check_lora, initial_part, other_scaling, scalings
from ..adapters.keys import PEFT_PREFIX, SIDES, factor_key, parse_key
from ..errors import AdapterError
from ..text import listed, printable
from .engines import REFUSED, ROWS, features_of, told_of

Shapes = Mapping[str, tuple[int, ...]]
INSTEAD = "Use share.apply(base, name) on another copy of the base, which has PEFT load it alone."
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_UNREAD = re.compile(r"\.(lora_monteclora_sampler|lora_velora_embed|original_module)\b")  # by no inference
_WRAPPERS = {"base_layer", "modules_to_save"}  # of PEFT, within the name of a module
_ROUTED = re.compile(r"(^|\.)experts\.\d+(\.|$)")


@dataclass(frozen=True)
class Places:
    """Places of an adapter's tensors in a base.

    Attributes:
        factors: module as the keys name it -> module of the base, and PEFT's scale s.
        owned: key -> module of the base, and the name of its parameter, which the tensor replaces.
    """

    factors: Mapping[str, tuple[str, float]]
    owned: Mapping[str, tuple[str, str]]


class Host:
    """A base model, and its modules by name."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.modules = dict(base.named_modules(remove_duplicate=False))
        self._names = Counter(map(id, self.modules.values()))
        self._tied = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
        embeddings = getattr(base, "get_input_embeddings", None)
        self._embedding = embeddings() if embeddings is not None else None
        self._dtype = next((p.dtype for p in base.parameters() if p.dtype in _WIDE), torch.float32)
        self._known: dict[str, Places | AdapterError] = {}

    def like(self, module: str) -> tuple[torch.device, torch.dtype]:
        """The device of a module's weight, and its dtype, or that of the model where the weight is quantised."""
        weight = self.modules[module].weight
        assert isinstance(weight, torch.Tensor)
        return weight.device, weight.dtype if weight.dtype in _WIDE else self._dtype

    def places(self, config: Config, shapes: Shapes) -> Places:
        """Places of the tensors of an adapter, by its configuration and PEFT key -> shape.

        Raises:
            AdapterError: if it cannot be attached to this base, alike for all adapters that differ in values only.
        """
        key = json.dumps([config, list(shapes.items())], sort_keys=True)
        if key not in self._known:
            try:
                self._known[key] = self._places(config, shapes)
            except AdapterError as e:
                self._known[key] = e
        found = self._known[key]
        if isinstance(found, AdapterError):
            raise AdapterError(found.problem, **{"remedy": INSTEAD, **found.details()})
        return found

    def _places(self, config: Config, shapes: Shapes) -> Places:
        _check_config(config)
        ranks: dict[str, int] = {}
        owned: dict[str, tuple[str, str]] = {}
        for key, shape in shapes.items():
            parsed = parse_key(key, "")
            if _UNREAD.search(key) or (".modules_to_save." in key and key.replace(".modules_to_save.", ".") in shapes):
                continue  # under bias="all", PEFT writes the bias of a head three times
            if parsed.module is None or self._has(key):  # modules of a base may be called lora_A
                owned[key] = self._owner(key, shape, config)
                continue
            _check_pair(parsed.module, shapes)
            if parsed.side == "A":
                ranks[parsed.module] = shape[0]
        factors = {}
        for (module, rank), scaling in zip(ranks.items(), scalings(config, ranks), strict=True):
            if scaling.experts > 1 or scaling.parameters:
                raise AdapterError("experts stacked in one parameter (target_parameters)", key=module)
            factors[module] = self._layer(module, rank, shapes, config), scaling.scale
        self._check_whole(owned, shapes)
        for what, places in (("modules", [name for name, _ in factors.values()]), ("parameters", owned.values())):
            if len(set(places)) < len(places):
                raise AdapterError(f"two keys mean the same of the base's {what}", found=listed(shapes))
        return Places(factors, owned)

    def _has(self, key: str) -> bool:
        """Whether a key names a parameter of the base itself."""
        path, _, name = key.removeprefix(PEFT_PREFIX).rpartition(".")
        return path in self.modules and name in self.modules[path]._parameters

    def _module(self, name: str, config: Config) -> tuple[str, nn.Module]:
        """A module of the base, by its name or that without PEFT's wrappers."""
        plain = name
        if name not in self.modules:
            plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain not in self.modules:
            raise AdapterError(
                "the base model has no such module",
                key=plain, found=type(self.base).__name__, expected=_expected(config), remedy=_right_base(config),
            )  # fmt: skip
        module = self.modules[plain]
        if self._names[id(module)] > 1:
            raise AdapterError("a module that the base model has under several names", key=plain)
        return plain, module

    def _layer(self, name: str, rank: int, shapes: Shapes, config: Config) -> str:
        """The name of the layer of the base that has LoRA."""
        plain, module = self._module(name, config)
        found = shapes[factor_key(name, "A")][1], shapes[factor_key(name, "B")][0]
        expected = widths(module)
        if expected is None:
            raise AdapterError("LoRA of a layer that is neither Linear nor Conv1D", key=plain, found=_kind(module))
        if _ROUTED.search(plain):
            raise AdapterError("LoRA of routed experts, which see tokens and not rows", key=plain)
        if found != expected:
            raise AdapterError(
                "a layer of the base model has other widths",
                key=plain, found=f"d_in, d_out = {expected}", expected=f"{found} of the adapter's rank {rank}",
                remedy=_right_base(config),
            )  # fmt: skip
        return plain

    def _owner(self, key: str, shape: tuple[int, ...], config: Config) -> tuple[str, str]:
        """Module and name of the parameter that a tensor replaces."""
        path, _, name = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if not self._has(key) and (".lora_" in key or ".trainable_tokens_" in key):
            raise AdapterError("a tensor that adds to the model in another way than by s B A", key=key)
        plain, module = self._module(path, config)
        own = module._parameters.get(name)
        if own is None:
            raise AdapterError("no parameter of the base model", key=key, found=_kind(module))
        if next(module.children(), None) is not None:
            raise AdapterError("a parameter of a module that has modules of its own", key=key, found=_kind(module))
        if own.dtype not in _WIDE:
            raise AdapterError("a parameter that is quantised in the base model", key=key, found=own.dtype)
        if isinstance(module, nn.Embedding) and module is not self._embedding:
            raise AdapterError("an embedding of something else than the tokens, which rows may share", key=key)
        if self._tied[id(own)] > 1 and not _is_saved(path, config):
            raise AdapterError("a parameter that the base model ties to another", key=key)
        free = isinstance(module, nn.Linear | nn.Embedding) and len(shape) == own.ndim
        if shape != tuple(own.shape) and not (free and shape[1:] == own.shape[1:]):
            raise AdapterError(
                "a parameter of the base model has another shape",
                key=key, found=list(own.shape), expected=f"{list(shape)} of the adapter", remedy=_right_base(config),
            )  # fmt: skip
        return plain, name

    def _check_whole(self, owned: Mapping[str, tuple[str, str]], shapes: Shapes) -> None:
        """Demand that a layer which becomes wider or narrower does so in all of its parameters."""
        lengths: dict[str, dict[str, int]] = {}
        for key, (module, name) in owned.items():
            if isinstance(self.modules[module], nn.Linear):
                lengths.setdefault(module, {})[name] = shapes[key][0]
        for module, own in lengths.items():
            every = {n: p.shape[0] for n, p in self.modules[module].named_parameters()} | own
            if len(set(every.values())) > 1:
                raise AdapterError("a layer whose weight and bias differ in width", key=module, found=every)


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a Linear or a Conv1D of transformers; None of others, and of what is never called by itself."""
    if isinstance(module, nn.Linear):
        within = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # of a MultiheadAttention
        return None if within else (module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), torch.Tensor):
        return weight.shape[0], weight.shape[1]
    return None


def _check_config(config: Config) -> None:
    """Refuse what changes the model in another way than by adding s B A to layers."""
    check_lora(config)
    reasons = told_of(ROWS, REFUSED, features_of({}, config))
    reason = next(iter(reasons.values()), other_scaling(config))
    if reason is not None:
        raise AdapterError(reason)
    if initial_part(config) is not None:
        init = printable(config.get("init_lora_weights"), 40)
        raise AdapterError(f"its factors hold, or may hold, a part of the base model (init_lora_weights {init})")


def _check_pair(module: str, shapes: Shapes) -> None:
    keys = [factor_key(module, side) for side in SIDES]
    missing = [key for key in keys if key not in shapes]
    if missing:
        raise AdapterError("lora_A or lora_B is missing", key=missing[0])
    a, b = (shapes[key] for key in keys)
    if len(a) != 2 or len(b) != 2:
        raise AdapterError("LoRA of a convolution, or of experts in one tensor", key=keys[0], found=list(a))
    if a[0] != b[1]:
        raise AdapterError("lora_A and lora_B of a module differ in rank", key=keys[1], found=b[1], expected=a[0])


def _is_saved(path: str, config: Config) -> bool:
    """Whether PEFT makes a copy of a module for the adapter, which is tied to nothing."""
    return any(f".{name}." in f".{path}." for name in config.get("modules_to_save") or ())


def _expected(config: Config) -> str:
    return f"a model like {printable(config.get('base_model_name_or_path') or 'that of the adapter', 100)}"


def _right_base(config: Config) -> str:
    maker = _CLASSES.get(str(config.get("task_type")), "the class that it was trained with")
    base = printable(config.get("base_model_name_or_path") or "the base model of the adapter", 100)
    labels = ", with as many labels," if maker.endswith("Classification") else ""
    return f"Load {base} by {maker}{labels} and attach to that."


def _kind(module: Any) -> str:
    return type(module).__name__
