"""Engines that serve LoRA, and mixed batches: features of an adapter that each of them takes, refuses or passes over.

Sources: vLLM 0.32 (vllm/lora/peft_helper.py, lora_model.py, utils.py), SGLang (srt/lora/lora_config.py, lora.py,
utils.py), LoRAX (server/lorax_server/adapters/lora.py), llama.cpp (convert_lora_to_gguf.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..adapters.config import Config
from ..checkpoint.reader import Tensors
from ..errors import RefusedAdapterError, UsageError
from ..text import listed
from .uniform import REMEDY, WITHIN, Pair, pairs_of

Table = Mapping[str, Mapping[str, str]]
ENGINES = ("vllm", "sglang", "lorax", "llama.cpp", "peft")
ROWS = "rows"  # mixed batches of `attach`
_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "lorax": "LoRAX", "llama.cpp": "llama.cpp", "peft": "PEFT"}
_HEAD = re.compile(r"\.(?:classifier|score)\.(?:weight|bias)$")
_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # all that vLLM passes over
_NORM = re.compile(r"_layernorm|\.norm")
_NOT_FULL = re.compile(r"\.lora_magnitude_vector$|trainable_tokens|\.base_layer\.weight$")
_LAYER = re.compile(r"\.(\d+)\.")

_ALL = ("vllm", "sglang", "lorax", "llama.cpp")
_IGNORED = "it passes over these tensors with a warning"
_EXITS = "its converter exits on a tensor that is no lora_A or lora_B"
_FACTORS = "it takes lora_A and lora_B only"
_HEADS_ONLY = "of whole weights it takes a classifier's only"
_OWN_BASE = "passes over them and uses the weights of its own base"

# Feature -> engine -> why it does not take an adapter that has it.
REFUSED: Table = {
    "DoRA": {
        "vllm": "it refuses use_dora", "sglang": "it refuses use_dora", "lorax": _IGNORED, "llama.cpp": _EXITS,
        ROWS: "DoRA scales the rows of W + dW",
    },
    "a bias of lora_B": {
        "vllm": "it refuses lora_bias", "sglang": "it has no such bias", "lorax": _IGNORED, "llama.cpp": _EXITS,
        ROWS: "lora_B has a bias (lora_bias)",
    },
    "trained biases": {
        "vllm": "it refuses bias", "sglang": "it has no such bias", "lorax": _IGNORED, "llama.cpp": _EXITS,
    },
    "aLoRA": {
        "vllm": "it refuses alora_invocation_tokens", "sglang": "it would adapt every token",
        "lorax": "it would adapt every token", ROWS: "aLoRA acts only from its invocation tokens on",
    },
    "replicated layers": {
        "vllm": "it refuses layer_replication", **dict.fromkeys(_ALL[1:], "its base has no such layers"),
        ROWS: "layer_replication repeats layers of the base",
    },
    "experts in 3-D parameters": dict.fromkeys(_ALL[1:], "it takes lora_A and lora_B of one matrix only"),
    "convolutions": dict.fromkeys(_ALL, "it adapts linear layers and embeddings only"),
    "MultiheadAttention": dict.fromkeys(_ALL, "it has no such layer"),
    "LoRA of embeddings": {"lorax": _IGNORED},
    "LoRA of an embedding that is not embed_tokens": {"sglang": "it adapts no other embedding"},
    "LoRA of a tied output layer": {"llama.cpp": "its converter refuses lm_head where it is the embedding"},
    "trained tokens": {
        "vllm": _FACTORS, "sglang": _FACTORS, "lorax": _IGNORED, "llama.cpp": _EXITS,
        ROWS: "single rows of an embedding are trained (trainable_token_indices)",
    },
    "a trained head (classifier, score)": {
        "sglang": "it has no head for each adapter", "lorax": _IGNORED, "llama.cpp": _EXITS,
    },
    "trained norms": {"vllm": _HEADS_ONLY, "sglang": _FACTORS, "lorax": _IGNORED},
    "trained weights": {"vllm": _HEADS_ONLY, "sglang": _FACTORS, "lorax": _IGNORED, "llama.cpp": _EXITS},
    "a head that modules_to_save does not name": {"vllm": "it takes heads by the names in modules_to_save"},
    "modules_to_save beside classifier and score": {"vllm": "it refuses other names in modules_to_save"},
    "copies of other weights of the base": {"vllm": _FACTORS, "sglang": _FACTORS},
    "modules that are missing in some layers": {
        "lorax": "it drops a kind of module that is not adapted in every layer",
    },
}  # fmt: skip

# Feature -> engine -> what it does instead, without harm.
PASSED_OVER: Table = {
    "copies of embed_tokens or lm_head of the base": dict.fromkeys(_ALL, _OWN_BASE),
    "copies of other weights of the base": {"lorax": _OWN_BASE, "llama.cpp": _OWN_BASE},
}


def check_engine(engine: str, tensors: Tensors, config: Mapping[str, Any], adapter: str = "") -> list[str]:
    """Demand that an engine takes all of a uniform adapter.

    Returns:
        What the engine passes over without harm, a sentence each.

    Raises:
        RefusedAdapterError: naming the first key or field that it does not take, and the reason.
        UsageError: for an engine that is not known.
    """
    if engine not in ENGINES:
        raise UsageError("no such engine", found=engine, expected=listed(ENGINES))
    name, found = _NAMES[engine], features_of(tensors, config)
    for feature, reason in told_of(engine, REFUSED, found).items():
        raise RefusedAdapterError(
            f"{name} does not take {feature}: {reason}", adapter=adapter or None, key=found[feature][0], remedy=REMEDY
        )
    return [f"{feature}: {name} {instead}" for feature, instead in told_of(engine, PASSED_OVER, found).items()]


def told_of(engine: str, table: Table, found: Mapping[str, list[str]]) -> dict[str, str]:
    """Feature -> what a table tells of an engine, for the features that `features_of` has found."""
    return {feature: texts[engine] for feature, texts in table.items() if engine in texts and found[feature]}


def features_of(tensors: Tensors, config: Config) -> dict[str, list[str]]:
    """Feature that not every engine takes -> the keys, or fields of the configuration, that show it, if any do."""
    pairs = pairs_of(tensors, config)
    factors = {key for pair in pairs.values() for key in (pair.a, pair.b, pair.bias)}
    full = [key for key in tensors if key not in factors and not _NOT_FULL.search(key)]
    heads = [key for key in full if _HEAD.search(key)]
    norms = [key for key in full if _NORM.search(key)]
    embeddings = [key for key in tensors if key.endswith(".lora_embedding_A")]
    tied = config.get("ensure_weight_tying") and any(".lora_embedding_A" in key for key in tensors)
    copies = [key for key in tensors if key.endswith(".base_layer.weight")]
    saved = set(config.get("modules_to_save") or ())

    def fields(name: str) -> list[str]:
        return [name] if config.get(name) else []

    def keys(part: str) -> list[str]:
        return [key for key in tensors if part in key]

    return {
        "DoRA": [*fields("use_dora"), *keys(".lora_magnitude_vector")],
        "a bias of lora_B": [*(pair.bias for pair in pairs.values() if pair.bias in tensors), *fields("lora_bias")],
        "trained biases": ["bias"] if config.get("bias") not in (None, "none") else [],
        "aLoRA": fields("alora_invocation_tokens"),
        "replicated layers": fields("layer_replication"),
        "experts in 3-D parameters": fields("target_parameters"),
        "convolutions": [key for key in keys(".lora_") if tensors[key].dim() > 2],
        "MultiheadAttention": [pair.a for name, pair in pairs.items() if name.endswith(WITHIN)],
        "LoRA of embeddings": embeddings,
        "LoRA of an embedding that is not embed_tokens": [key for key in embeddings if ".embed_tokens." not in key],
        "LoRA of a tied output layer": keys("lm_head.lora_A.weight") if tied else [],
        "trained tokens": [*fields("trainable_token_indices"), *keys("trainable_tokens")],
        "a trained head (classifier, score)": heads,
        "trained norms": norms,
        "trained weights": [key for key in full if key not in heads and key not in norms],
        "a head that modules_to_save does not name": [key for key in heads if key.split(".")[-2] not in saved],
        "modules_to_save beside classifier and score": ["modules_to_save"] if saved - {"classifier", "score"} else [],
        "copies of embed_tokens or lm_head of the base": [key for key in copies if key.endswith(_COPIES)],
        "copies of other weights of the base": [key for key in copies if not key.endswith(_COPIES)],
        "modules that are missing in some layers": _gaps(pairs, config),
    }


def _gaps(pairs: Mapping[str, Pair], config: Config) -> list[str]:
    """A module of each kind that some layer lacks, as far as the adapter tells: of layers after the last, nothing."""
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for module, pair in pairs.items():
        match = _LAYER.search(f".{module}.")
        if match is not None:
            layers[_LAYER.sub(".*.", f".{module}.", count=1)][int(match[1])] = pair.a
    chosen = ["layers_to_transform"] if layers and config.get("layers_to_transform") not in (None, []) else []
    count = 1 + max((layer for found in layers.values() for layer in found), default=0)
    return [*chosen, *(next(iter(found.values())) for found in layers.values() if len(found) < count)]
