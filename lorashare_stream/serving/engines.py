"""Engines that serve LoRA: which parts of a uniform adapter each of them takes, refuses or passes over.

Sources: vLLM 0.32 (vllm/lora/peft_helper.py, lora_model.py, utils.py), SGLang (srt/lora/lora_config.py, lora.py,
utils.py), LoRAX (server/lorax_server/adapters/lora.py), llama.cpp (convert_lora_to_gguf.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..adapters.config import Config
from ..checkpoint.reader import Tensors
from ..errors import RefusedAdapterError, UsageError
from ..text import listed
from .uniform import REMEDY, pairs_of

ENGINES = ("vllm", "sglang", "lorax", "llama.cpp", "peft")
_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "lorax": "LoRAX", "llama.cpp": "llama.cpp", "peft": "PEFT"}

_HEAD = re.compile(r"\.(?:classifier|score)\.(?:weight|bias)$")
_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # all that vLLM passes over
_NORM = re.compile(r"_layernorm|\.norm")
_NOT_FULL = re.compile(r"\.lora_magnitude_vector$|trainable_tokens|\.base_layer\.weight$")
_LAYER = re.compile(r"\.(\d+)\.")

Found = Iterator[str]  # the keys, or fields of the configuration, that show a feature


@dataclass(frozen=True, slots=True)
class Part:
    """Something that an adapter may have, and that not every engine takes.

    Attributes:
        name: what it is, as tables and messages name it.
        found: the keys or fields of an adapter that show it.
        refused: engine -> why it does not take an adapter that has it.
        passed_over: engine -> what it does instead, without harm.
    """

    name: str
    found: Callable[[Tensors, Config], Found]
    refused: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)


def check_engine(engine: str, tensors: Tensors, config: Mapping[str, Any], adapter: str = "") -> list[str]:
    """Demand that an engine takes all of a uniform adapter.

    Args:
        engine: one of `ENGINES`.
        tensors, config: what `uniform` gives.
        adapter: its name, for errors.

    Returns:
        What the engine passes over without harm, a sentence each.

    Raises:
        RefusedAdapterError: naming the first key or field that it does not take, and the reason.
        UsageError: for an engine that is not known.
    """
    if engine not in ENGINES:
        raise UsageError("no such engine", found=engine, expected=listed(ENGINES))
    notes = []
    for part in PARTS:
        reason, instead = part.refused.get(engine), part.passed_over.get(engine)
        first = next(part.found(tensors, config), None) if reason or instead else None
        if first is None:
            continue
        if reason is not None:
            raise RefusedAdapterError(
                f"{_NAMES[engine]} does not take {part.name}: {reason}", adapter=adapter or None, key=first,
                remedy=REMEDY,
            )  # fmt: skip
        notes.append(f"{part.name}: {_NAMES[engine]} {instead}")
    return notes


def _field(name: str) -> Callable[[Tensors, Config], Found]:
    """A field of the configuration that is set."""
    return lambda tensors, config: iter([name] if config.get(name) else [])


def _keys(pattern: str) -> Callable[[Tensors, Config], Found]:
    """Keys that a regular expression finds."""
    return lambda tensors, config: (key for key in tensors if re.search(pattern, key))


def _dora(tensors: Tensors, config: Config) -> Found:
    yield from _field("use_dora")(tensors, config)
    yield from _keys(r"\.lora_magnitude_vector$")(tensors, config)


def _bias(tensors: Tensors, config: Config) -> Found:
    if config.get("bias") not in (None, "none"):
        yield "bias"


def _tokens(tensors: Tensors, config: Config) -> Found:
    yield from _field("trainable_token_indices")(tensors, config)
    yield from _keys(r"trainable_tokens")(tensors, config)


def _kernels(tensors: Tensors, config: Config) -> Found:
    return (key for key, tensor in tensors.items() if ".lora_" in key and tensor.dim() > 2)


def _other_embeddings(tensors: Tensors, config: Config) -> Found:
    return (key for key in _keys(r"\.lora_embedding_A$")(tensors, config) if ".embed_tokens." not in key)


def _full(tensors: Tensors, config: Config) -> Found:
    """Keys of whole weights that are trained beside LoRA, and have no part of their own."""
    factors = {key for pair in pairs_of(tensors, config).values() for key in (pair.a, pair.b, pair.bias)}
    return (key for key in tensors if key not in factors and not _NOT_FULL.search(key))


def _biases_of_b(tensors: Tensors, config: Config) -> Found:
    return (pair.bias for pair in pairs_of(tensors, config).values() if pair.bias in tensors)


def _heads(tensors: Tensors, config: Config) -> Found:
    return (key for key in _full(tensors, config) if _HEAD.search(key))


def _unnamed_heads(tensors: Tensors, config: Config) -> Found:
    """Heads that `modules_to_save` does not name, from which vLLM takes their names."""
    named = config.get("modules_to_save") or ()
    return (key for key in _heads(tensors, config) if key.split(".")[-2] not in named)


def _norms(tensors: Tensors, config: Config) -> Found:
    return (key for key in _full(tensors, config) if _NORM.search(key))


def _other_full(tensors: Tensors, config: Config) -> Found:
    return (key for key in _full(tensors, config) if not _HEAD.search(key) and not _NORM.search(key))


def _saved(tensors: Tensors, config: Config) -> Found:
    """`modules_to_save` with names of other modules than heads: vLLM reads the field itself."""
    if set(config.get("modules_to_save") or ()) - {"classifier", "score"}:
        yield "modules_to_save"


def _copies(tensors: Tensors, config: Config) -> Found:
    return (key for key in tensors if key.endswith(_COPIES))


def _other_copies(tensors: Tensors, config: Config) -> Found:
    return (key for key in tensors if key.endswith(".base_layer.weight") and not key.endswith(_COPIES))


def _attention(tensors: Tensors, config: Config) -> Found:
    return (pair.a for name, pair in pairs_of(tensors, config).items() if name.endswith(".base_layer.out_proj"))


def _tied(tensors: Tensors, config: Config) -> Found:
    if config.get("ensure_weight_tying") and any(".lora_embedding_A" in key for key in tensors):
        yield from _keys(r"lm_head\.lora_A\.weight$")(tensors, config)


def _gaps(tensors: Tensors, config: Config) -> Found:
    """A module of a kind that some layer lacks, as far as the adapter tells: of layers after the last, nothing does."""
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for module, pair in pairs_of(tensors, config).items():
        match = _LAYER.search(f".{module}.")
        if match is not None:
            layers[_LAYER.sub(".*.", f".{module}.", count=1)][int(match[1])] = pair.a
    if layers and config.get("layers_to_transform") not in (None, []):
        yield "layers_to_transform"
    count = 1 + max((layer for found in layers.values() for layer in found), default=0)
    yield from (next(iter(found.values())) for found in layers.values() if len(found) < count)


_ALL = ("vllm", "sglang", "lorax", "llama.cpp")
_IGNORED = "it passes over these tensors with a warning"
_EXITS = "its converter exits on a tensor that is no lora_A or lora_B"
PARTS = (
    Part(
        "DoRA", _dora,
        {"vllm": "it refuses use_dora", "sglang": "it refuses use_dora", "lorax": _IGNORED, "llama.cpp": _EXITS},
    ),
    Part(
        "a bias of lora_B", _biases_of_b,
        {"vllm": "it refuses lora_bias", "sglang": "it has no such bias", "lorax": _IGNORED, "llama.cpp": _EXITS},
    ),
    Part(
        "trained biases", _bias,
        {"vllm": "it refuses bias", "sglang": "it has no such bias", "lorax": _IGNORED, "llama.cpp": _EXITS},
    ),
    Part(
        "aLoRA", _field("alora_invocation_tokens"),
        {
            "vllm": "it refuses alora_invocation_tokens", "sglang": "it would adapt every token",
            "lorax": "it would adapt every token",
        },
    ),
    Part(
        "replicated layers", _field("layer_replication"),
        {"vllm": "it refuses layer_replication", **dict.fromkeys(_ALL[1:], "its base has no such layers")},
    ),
    Part(
        "experts in 3-D parameters", _field("target_parameters"),
        dict.fromkeys(_ALL[1:], "it takes lora_A and lora_B of one matrix only"),
    ),
    Part("convolutions", _kernels, dict.fromkeys(_ALL, "it adapts linear layers and embeddings only")),
    Part("MultiheadAttention", _attention, dict.fromkeys(_ALL, "it has no such layer")),
    Part("LoRA of embeddings", _keys(r"\.lora_embedding_A$"), {"lorax": _IGNORED}),
    Part(
        "LoRA of an embedding that is not embed_tokens", _other_embeddings,
        {"sglang": "it adapts no other embedding"},
    ),
    Part(
        "LoRA of a tied output layer", _tied,
        {"llama.cpp": "its converter refuses lm_head where it is the embedding"},
    ),
    Part(
        "trained tokens", _tokens,
        {
            "vllm": "it takes lora_A and lora_B only", "sglang": "it takes lora_A and lora_B only",
            "lorax": _IGNORED, "llama.cpp": _EXITS,
        },
    ),
    Part(
        "a trained head (classifier, score)", _heads,
        {"sglang": "it has no head for each adapter", "lorax": _IGNORED, "llama.cpp": _EXITS},
    ),
    Part(
        "trained norms", _norms,
        {"vllm": "of whole weights it takes a classifier's only", "sglang": "it takes lora_A and lora_B only",
         "lorax": _IGNORED},
    ),
    Part(
        "trained weights", _other_full,
        {"vllm": "of whole weights it takes a classifier's only", "sglang": "it takes lora_A and lora_B only",
         "lorax": _IGNORED, "llama.cpp": _EXITS},
    ),
    Part(
        "a head that modules_to_save does not name", _unnamed_heads,
        {"vllm": "it takes heads by the names in modules_to_save"},
    ),
    Part("modules_to_save beside classifier and score", _saved, {"vllm": "it refuses other names in modules_to_save"}),
    Part(
        "copies of embed_tokens or lm_head of the base", _copies,
        passed_over=dict.fromkeys(_ALL, "passes over them and uses the weights of its own base"),
    ),
    Part(
        "copies of other weights of the base", _other_copies,
        {"vllm": "it takes lora_A and lora_B only", "sglang": "it takes lora_A and lora_B only"},
        {"lorax": "passes over them and uses the weights of its own base",
         "llama.cpp": "passes over them and uses the weights of its own base"},
    ),
    Part(
        "modules that are missing in some layers", _gaps,
        {"lorax": "it drops a kind of module that is not adapted in every layer"},
    ),
)  # fmt: skip
