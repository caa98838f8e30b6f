from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.adapters.foreign import foreign_kind
from lorashare_stream.adapters.keys import adapter_names, factor_key, group_id, parse_key, split_group_id

P = "base_model.model."


@pytest.mark.parametrize(
    ("raw", "module", "side", "adapter"),
    [
        (P + "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj", "A", None),
        (P + "h.0.attn.c_attn.lora_B.default.weight", "h.0.attn.c_attn", "B", "default"),
        ("module." + P + "q.lora_A.weight", "q", "A", None),
        ("_orig_mod." + P + "q.lora_A.weight", "q", "A", None),
        (P + P + "q.lora_B.weight", P + "q", "B", None),
        ("q.lora_A.weight", "q", "A", None),
        (P + "attn.base_layer.out_proj.lora_A.weight", "attn.base_layer.out_proj", "A", None),
        (P + "my_lora_A.block.lora_A.weight", "my_lora_A.block", "A", None),
        ("module._orig_mod." + P + "h._fsdp_wrapped_module.0.q.lora_A.my_name.weight", "h.0.q", "A", "my_name"),
        (P + "head.modules_to_save.mine.lora_A.mine.weight", "head.modules_to_save", "A", "mine"),
        (P + "head.original_module.lora_A.weight", "head.original_module", "A", None),
        (P + "default.q.lora_A.default.weight", "default.q", "A", "default"),
    ],
)
def test_factors(raw: str, module: str, side: str, adapter: str | None) -> None:
    key = parse_key(raw)
    assert (key.module, key.side, adapter_names([raw])) == (module, side, [adapter] if adapter else [])
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
        (P + "q.lora_diag.default", P + "q.lora_diag"),
        (P + "q.lora_velora_embed.default", P + "q.lora_velora_embed"),
    ],
)
def test_extras_come_back_as_peft_saves_them(raw: str, canonical: str) -> None:
    key = parse_key(raw)
    assert key.module is None
    assert key.canonical == canonical


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("head.modules_to_save.mine.weight", "head.weight"),
        ("head.modules_to_save.mine.dense.bias", "head.dense.bias"),
        ("head.modules_to_save.weight", "head.modules_to_save.weight"),
        ("head.original_module.weight", "head.original_module.weight"),
        ("emb.token_adapter.trainable_tokens_delta.mine", "emb.token_adapter.trainable_tokens_delta"),
        ("q.lora_monteclora_sampler.mine.std_prior", "q.lora_monteclora_sampler.std_prior"),
        ("q.lora_B.mine.bias", "q.lora_B.bias"),
        ("mine.mine.weight", "mine.mine.weight"),
    ],
)
def test_the_name_that_a_file_carries_goes_where_peft_takes_it_away(raw: str, canonical: str) -> None:
    assert parse_key(P + raw, "mine").canonical == P + canonical


@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_the_keys_of_a_state_dict_become_those_that_peft_saves() -> None:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    net = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 8)})
    for name in ("default", "mine"):
        for extra in ({}, {"use_dora": True}, {"lora_bias": True}):
            config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"], **extra)
            model = get_peft_model(net, config, adapter_name=name)
            state, saved = model.state_dict(), set(get_peft_model_state_dict(model, adapter_name=name))
            assert adapter_names(state) == [name]
            assert saved == {parse_key(key, name).canonical for key in state} & saved
            assert len({parse_key(key, name).canonical for key in state}) == len(state)
            net = model.unload()


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
    assert foreign_kind([P + "head.weight", key]) == (kind, key)


def test_a_diffusers_file_by_way_of_peft_is_told_only_without_a_configuration() -> None:
    key = "transformer.h.0.attn.lora_A.weight"  # or GPT-2's, without PEFT's prefix
    assert foreign_kind([key]) is None
    assert foreign_kind([key], configured=False) == ("diffusers LoRA", key)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["q.lora_A.x.weight", "q.lora_B.x.weight"], ["x"]),
        (["q.lora_A.x.weight", "q.lora_B.weight"], ["x"]),
        (["q.lora_A.x.weight", "q.lora_B.x.weight", "v.lora_A.y.weight", "v.lora_B.y.weight"], ["x", "y"]),
        (["q.lora_A.x.weight"], ["x"]),
        (["e.lora_embedding_A.x", "e.lora_embedding_B.x"], ["x"]),
        # Modules may be called so, and saved whole.
        (["q.lora_A.weight", "q.lora_B.weight", "x.lora_A.head.weight"], []),
        (["x.lora_A.lora_A.weight", "x.lora_A.lora_B.weight"], []),
        (["x.lora_B.lora_A.x.weight", "x.lora_B.lora_B.x.weight"], ["x"]),
    ],
)
def test_names_of_adapters_are_told_from_names_of_modules(keys: list[str], names: list[str]) -> None:
    assert adapter_names(keys) == names


def test_a_lora_file_is_not_foreign() -> None:
    assert foreign_kind([factor_key("q", "A"), factor_key("q", "B"), P + "classifier.weight"]) is None


def test_group_ids() -> None:
    assert split_group_id(group_id("a:b.q", "A")) == ("a:b.q", "A")
    for bad in ("q", "q:C", ":A"):
        with pytest.raises(ValueError, match="module:A"):
            split_group_id(bad)
