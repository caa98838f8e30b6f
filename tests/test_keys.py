from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.keys import factor_key, foreign_kind, group_id, parse_key, split_group_id

P = "base_model.model."


@pytest.mark.parametrize(
    ("raw", "module", "side", "adapter"),
    [
        (P + "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj", "A", None),
        (P + "h.0.attn.c_attn.lora_B.default.weight", "h.0.attn.c_attn", "B", "default"),
        ("module." + P + "q.lora_A.weight", "q", "A", None),
        ("_orig_mod." + P + "q.lora_A.weight", "q", "A", None),
        (P + P + "q.lora_B.weight", "q", "B", None),
        ("q.lora_A.weight", "q", "A", None),
        (P + "attn.base_layer.out_proj.lora_A.weight", "attn.base_layer.out_proj", "A", None),
        (P + "my_lora_A.block.lora_A.weight", "my_lora_A.block", "A", None),
    ],
)
def test_factors(raw: str, module: str, side: str, adapter: str | None) -> None:
    key = parse_key(raw)
    assert (key.module, key.side, key.adapter) == (module, side, adapter)
    assert key.canonical == f"{P}{module}.lora_{side}.weight"


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        (P + "emb.lora_embedding_A", P + "emb.lora_embedding_A"),
        (P + "emb.lora_embedding_A.default", P + "emb.lora_embedding_A"),
        (P + "q.lora_B.bias", P + "q.lora_B.bias"),
        (P + "q.lora_B.other.bias", P + "q.lora_B.bias"),
        (P + "q.lora_magnitude_vector", P + "q.lora_magnitude_vector"),
        (P + "q.lora_magnitude_vector.default.weight", P + "q.lora_magnitude_vector"),
        (P + "q.lora_magnitude_vector.weight", P + "q.lora_magnitude_vector"),
        (P + "classifier.modules_to_save.weight", P + "classifier.modules_to_save.weight"),
        ("score.weight", P + "score.weight"),
        (P + "q.lora_diag", P + "q.lora_diag"),
    ],
)
def test_extras_come_back_as_peft_saves_them(raw: str, canonical: str) -> None:
    key = parse_key(raw)
    assert key.module is None
    assert key.canonical == canonical


@given(st.text(min_size=1))
def test_parsing_is_idempotent(raw: str) -> None:
    once = parse_key(raw).canonical
    assert parse_key(once).canonical == once


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "kohya LoRA"),
        ("lora_te1_text_model.alpha", "kohya LoRA"),
        ("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", "diffusers LoRA"),
        ("unet.mid_block.to_k.lora.up.weight", "diffusers LoRA"),
        ("text_encoder.q.lora_linear_layer.down.weight", "diffusers LoRA"),
        (P + "q.lora_E", "AdaLoRA"),
        (P + "q.hada_w1_a", "another PEFT method"),
        (P + "q.ia3_l", "another PEFT method"),
    ],
)
def test_foreign_kinds(key: str, kind: str) -> None:
    assert foreign_kind([P + "head.weight", key]) == kind


def test_a_lora_file_is_not_foreign() -> None:
    assert foreign_kind([factor_key("q", "A"), factor_key("q", "B"), P + "classifier.weight"]) is None


def test_group_ids() -> None:
    assert split_group_id(group_id("a:b.q", "A")) == ("a:b.q", "A")
    for bad in ("q", "q:C", ":A"):
        with pytest.raises(ValueError, match="module:A"):
            split_group_id(bad)
