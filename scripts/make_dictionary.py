"""Writes the preset dictionary of indexes, `checkpoint/dictionary.json`: once for a version of the format.

It is the index of one adapter as most have it: PEFT's default configuration, usual modules. zlib finds in it what the
index of a single adapter has no other place to take from: half of its bytes. What is likeliest stands last.
"""

from __future__ import annotations

from peft import LoraConfig

from lorashare_stream.checkpoint.index import DICTIONARY, canonical

# Attention and feed-forward projections as the families of models name them.
PARTS = {
    "transformer.h": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "encoder.block": [f"layer.0.SelfAttention.{name}" for name in "koqv"],
    "distilbert.transformer.layer": ["attention.q_lin", "attention.v_lin"],
    "roberta.encoder.layer": ["attention.self.query", "attention.self.value", "attention.output.dense", "output.dense"],
    "bert.encoder.layer": ["attention.self.key", "attention.self.query", "attention.self.value", "intermediate.dense"],
    "model.layers": [
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    ],
}  # fmt: skip
HEADS = ["lm_head", "score", "classifier.out_proj", "classifier.dense", "classifier"]
RECORD = ["lora_bytes", "notes", "path", "relative_error", "sha256", "source_bytes", "source_id"]
RECORD += ["worst_module", "worst_module_error"]


def rows(layers: str, names: list[str], count: int = 2) -> list[list[object]]:
    """Rows of a layout: module, rank, d_out, d_in, scale, experts, dtypes of B and A."""
    return [[f"{layers}.{i}.{name}", 16, 1024, 4096, 2.0, 1, "F32", "F32"] for i in range(count) for name in names]


def text() -> str:
    """The dictionary."""
    config = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path="").to_dict()
    config |= {"lora_alpha": 32, "lora_dropout": 0.05, "r": 16, "revision": None}
    config["target_modules"] = ["down_proj", "gate_proj", "up_proj", "o_proj", "k_proj", "q_proj", "v_proj"]
    tasks = {"FEATURE_EXTRACTION": None, "SEQ_2_SEQ_LM": None, "TOKEN_CLS": None, "SEQ_CLS": ["classifier", "score"]}
    others = [{"modules_to_save": saved, "task_type": task} for task, saved in tasks.items()]
    keys = [f"base_model.model.{head}.{part}" for head in HEADS for part in ("bias", "weight")]
    columns: dict[str, object] = {"adapters": {
        "config": [0], "digest": [""], "layout": [0], "name": [""], "nbytes": [0],
        "record": {"keys": [[key for key in RECORD if key not in ("notes", "path")]], "rows": [0],
                   "values": {key: [0.0 if "error" in key else ""] for key in RECORD}},
        "verbatim": {"keys": [keys, []], "rows": [0], "values": {key: [n] for n, key in enumerate(keys)}},
    }}  # fmt: skip
    columns |= {"configs": [*others, config], "kinds": [["BF16", [2, 768], "planes"], ["F32", [2], ""]]}
    columns |= {"layouts": [[row for layers, names in PARTS.items() for row in rows(layers, names)]]}
    columns |= {"packs": [["", 0, 160, 1, 0]], "tensors": {"digest": [], "kind": [], "nbytes": []}, "version": 1}
    return canonical(columns)


if __name__ == "__main__":
    DICTIONARY.write_text(text())
    print(f"{DICTIONARY}: {DICTIONARY.stat().st_size} bytes")
