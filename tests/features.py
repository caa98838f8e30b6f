"""Tiny base models, and adapters of every kind that the installed PEFT can save."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

IDS = torch.arange(14).reshape(2, 7)
Base = Callable[[], Any]


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=50, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied, **size
    )
    return LlamaForCausalLM(config).eval()


def tied_llama() -> Any:
    return llama(tied=True)


def resized_llama() -> Any:
    model = llama()
    torch.manual_seed(1)
    model.resize_token_embeddings(53)
    return model


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size)).eval()


class Small(nn.Module):
    """Layers that transformers of language do not have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 16)
        self.conv1 = nn.Conv1d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.conv3 = nn.Conv3d(1, 2, 3, padding=1)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = Experts()
        self.lin = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)  # (batch, length, 16)
        x = x + self.conv1(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.grouped(self.conv2(x[:, None]).relu()).mean(1)
        x = x + self.conv3(x[:, None, None]).mean((1, 2))
        x = x + self.attn(x, x, x)[0]
        x = x + self.experts(x)
        return self.head(self.lin(x).relu())


class Experts(nn.Module):
    """Experts in 3-D parameters, as transformers 5 has them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.is_transposed = True  # (experts, in, out)
        self.gate_up_proj = nn.Parameter(torch.randn(count, 16, 24) / 4)
        self.down_proj = nn.Parameter(torch.randn(count, 24, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = torch.einsum("bld,edh->eblh", x, self.gate_up_proj).relu()
        return torch.einsum("eblh,ehd->bld", each, self.down_proj)


class Up(nn.Module):
    """Experts in a parameter (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 24, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bld,ehd->blh", x, self.up)


class OtherExperts(nn.Module):
    """A model of one such layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 16)
        self.block = nn.ModuleDict({"experts": Up()})
        self.head = nn.Linear(24, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block["experts"](self.emb(ids)).relu())


class Rewarded(nn.Module):
    """A model within a model, under the very names that PEFT puts before keys."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": Small()})
        self.lin = nn.Linear(3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.base_model["model"](ids).relu())


class Odd(nn.Module):
    """Modules whose names look like parts of keys."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 16)
        self.module = nn.Linear(16, 16)
        self.lora_A = nn.Linear(16, 16)
        self.oft_R = nn.Linear(16, 16)
        self.ia3_l = nn.ModuleDict({"lora_B": nn.Linear(16, 16)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lora_A(self.module(self.emb(ids)).relu())
        return self.ia3_l["lora_B"](self.oft_R(x.relu()).relu())


@dataclass(frozen=True)
class Feature:
    """Adapters that PEFT saves, and what becomes of them.

    Attributes:
        base: makes the base model.
        adapters: options of `LoraConfig`, one adapter each; a single one is made twice, with other values.
        shared: the last names of the modules that are compressed.
        verbatim: parts of keys that are kept as they are, one key at least for each.
        exact: the reason why nothing of an adapter is compressed, if nothing is.
        prepare: what must be done to a base model before the adapter is made, and before it is loaded.
        save: options of `save_pretrained`.
        reloads: whether PEFT itself, loading what it saved, has the model that was saved.
    """

    base: Base
    adapters: list[dict[str, Any]]
    shared: set[str]
    verbatim: set[str] = field(default_factory=set)
    exact: str | None = None
    prepare: Callable[[Any, LoraConfig], None] = lambda model, config: None
    save: dict[str, Any] = field(default_factory=dict)
    reloads: bool = True


def corda(model: Any, config: LoraConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: [model(torch.randint(0, 50, (1, 16))) for _ in range(4)])


def lora_ga(model: Any, config: LoraConfig) -> None:
    preprocess_loraga(model, config, train_step=lambda: model(IDS, labels=IDS).loss.backward())
    model.zero_grad()


def loftq(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stands in for `peft.utils.loftq_utils.loftq_init`, which needs a GPU: another quantiser, the same split."""
    step = weight.abs().max() / 2 ** (num_bits - 1)
    quantised = (weight / step).round() * step
    u, s, v = torch.linalg.svd(weight - quantised)
    root = s[:reduced_rank].sqrt()
    return quantised, root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root


QV: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
BERT: dict[str, Any] = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
LIN: dict[str, Any] = {"r": 2, "target_modules": ["lin"]}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
PRINCIPAL = "hold a part of the base model"
ATTENTION = {"q_proj", "v_proj"}
EVERY_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def qv(**options: Any) -> dict[str, Any]:
    return QV | options


FEATURES: dict[str, Feature] = {
    "linear": Feature(llama, [QV, qv(r=2), qv(target_modules=["q_proj"])], ATTENTION),
    "conv1d-of-gpt2": Feature(
        gpt2,
        [
            {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
            {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        ],
        {"c_attn", "c_proj"},
    ),
    "conv1d": Feature(Small, [{"r": 2, "target_modules": ["conv1", "lin"]}], {"lin"}, {"conv1.lora_A", "conv1.lora_B"}),
    "conv2d": Feature(Small, [{"r": 2, "target_modules": ["conv2", "lin"]}], {"lin"}, {"conv2.lora_A", "conv2.lora_B"}),
    "conv2d-groups": Feature(
        Small, [{"r": 2, "target_modules": ["grouped"]}], set(), {"grouped.lora_A", "grouped.lora_B"}
    ),
    "conv3d": Feature(Small, [{"r": 2, "target_modules": ["conv3", "lin"]}], {"lin"}, {"conv3.lora_A", "conv3.lora_B"}),
    "embedding": Feature(
        Small, [{"r": 2, "target_modules": ["emb", "lin"]}], {"lin"}, {"lora_embedding_A", "lora_embedding_B"}
    ),
    "multihead-attention": Feature(Small, [{"r": 2, "target_modules": ["attn"]}], {"attn", "out_proj"}),
    "multihead-attention-with-patterns": Feature(
        Small,
        [
            {"r": 2, "target_modules": ["attn"], "rank_pattern": {"attn": 4}, "alpha_pattern": {"attn": 64}},
            {"r": 2, "target_modules": ["attn"], "alpha_pattern": {"out_proj": 64}, "use_rslora": True},
        ],
        {"attn", "out_proj"},
    ),
    "base-within-a-base": Feature(Rewarded, [{"r": 2, "target_modules": ["lin"]}], {"lin"}),
    "names-like-parts-of-keys": Feature(
        Odd,
        [{"r": 2, "target_modules": ["module", "lora_A", "oft_R"], "modules_to_save": ["ia3_l.lora_B"]}],
        {"module", "lora_A", "oft_R"},
        {"ia3_l.lora_B.weight"},
    ),
    "target-parameters-of-others": Feature(
        Small,
        [
            {"r": 2, "target_modules": ["lin"], "target_parameters": PARAMETERS},
            {"r": 2, "target_modules": ["lin"], "target_parameters": PARAMETERS},
            {"r": 2, "target_modules": ["lin"], "target_parameters": PARAMETERS[:1]},
        ],
        {"experts", "base_layer", "lin"},
        {"experts.lora_A"},
    ),
    "dora": Feature(llama, [qv(use_dora=True)], ATTENTION, {"lora_magnitude_vector"}),
    "dora-on-others": Feature(
        Small,
        [{"r": 2, "target_modules": ["conv1", "conv2", "conv3", "emb", "lin"], "use_dora": True}],
        {"lin"},
        {f"{name}.lora_magnitude_vector" for name in ("conv1", "conv2", "conv3", "emb", "lin")},
    ),
    "lora-bias": Feature(bert, [BERT | {"lora_bias": True}], {"query", "value"}, {"lora_B.bias"}),
    "rslora": Feature(llama, [qv(use_rslora=True), QV], ATTENTION),
    "rank-and-alpha-patterns": Feature(
        llama,
        [
            qv(
                rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
                alpha_pattern={"layers.0.self_attn.v_proj": 3},
            ),
            qv(rank_pattern={"v_proj": 1}, alpha_pattern={".*q_proj": 32}, use_rslora=True),
        ],
        ATTENTION,
    ),
    "layers-to-transform": Feature(llama, [qv(layers_to_transform=[1]), qv(layers_to_transform=0)], ATTENTION),
    "layer-replication": Feature(llama, [qv(layer_replication=[(0, 2), (1, 2)])], ATTENTION),
    "target-regex": Feature(
        llama, [qv(target_modules=r".*layers\.\d\.(self_attn|mlp)\.(q|down)_proj")], {"q_proj", "down_proj"}
    ),
    "target-all-linear": Feature(llama, [qv(target_modules="all-linear")], EVERY_LINEAR),
    "target-none": Feature(llama, [qv(target_modules=None)], ATTENTION),
    "exclude-modules": Feature(
        llama,
        [qv(target_modules="all-linear", exclude_modules=["k_proj", "down_proj"])],
        EVERY_LINEAR - {"k_proj", "down_proj"},
    ),
    "modules-to-save": Feature(llama, [qv(modules_to_save=["lm_head"])], ATTENTION, {"lm_head.weight"}),
    "head-of-the-task": Feature(bert, [BERT], {"query", "value"}, {"model.classifier.weight", "model.classifier.bias"}),
    "bias-all": Feature(
        bert,
        [BERT | {"bias": "all"}],
        {"query", "value"},
        {"LayerNorm.bias", "base_layer.bias", "pooler.dense.bias", "classifier.modules_to_save.bias"},
    ),
    "bias-lora-only": Feature(bert, [BERT | {"bias": "lora_only"}], {"query", "value"}, {"base_layer.bias"}),
    "trainable-token-indices": Feature(
        llama, [qv(trainable_token_indices=[1, 3])], ATTENTION, {"trainable_tokens_delta"}
    ),
    "target-parameters": Feature(
        Small, [{"r": 2, "target_modules": ["lin"], "target_parameters": PARAMETERS}], {"experts", "base_layer", "lin"}
    ),
    "target-parameters-with-patterns": Feature(
        OtherExperts,
        [
            {"r": 2, "target_modules": [], "target_parameters": ["experts.up"], "rank_pattern": {"experts.up": 4}},
            {
                "r": 2,
                "target_modules": [],
                "target_parameters": ["block.experts.up"],
                "alpha_pattern": {".*up": 64},
                "use_rslora": True,
            },
        ],
        {"experts"},
    ),
    "target-parameters-that-differ": Feature(
        Small,
        [{"r": 2, "target_modules": [], "target_parameters": PARAMETERS, "alpha_pattern": {"experts.down_proj": 1}}],
        set(),
        {"experts.lora_A"},
        exact="only the base model tells",
    ),
    "kasa": Feature(llama, [qv(kasa_config=KasaConfig())], set(), {"lora_diag", "lora_A"}, exact="KaSA"),
    "alora": Feature(llama, [qv(alora_invocation_tokens=[4, 5])], ATTENTION),
    "pissa": Feature(llama, [qv(init_lora_weights="pissa")], set(), {"lora_A"}, exact=PRINCIPAL),
    "pissa-niter": Feature(
        llama, [qv(init_lora_weights="pissa_niter_4")], set(), {"lora_A"}, exact=PRINCIPAL, reloads=False
    ),
    "olora": Feature(llama, [qv(init_lora_weights="olora")], set(), {"lora_A"}, exact=PRINCIPAL),
    "corda": Feature(
        llama,
        [qv(init_lora_weights="corda", corda_config=CordaConfig())],
        set(),
        {"lora_A"},
        exact=PRINCIPAL,
        prepare=corda,
    ),
    "lora-ga": Feature(
        llama,
        [qv(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())],
        set(),
        {"lora_A"},
        exact=PRINCIPAL,
        prepare=lora_ga,
    ),
    "loftq": Feature(
        llama,
        [qv(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})],
        set(),
        {"lora_A"},
        exact=PRINCIPAL,
    ),
    "eva": Feature(
        llama,
        [qv(init_lora_weights="eva", eva_config=EvaConfig(), rank_pattern={"model.layers.0.self_attn.q_proj": 7})],
        ATTENTION,
    ),
    "gaussian": Feature(llama, [qv(init_lora_weights="gaussian")], ATTENTION),
    "orthogonal": Feature(llama, [qv(init_lora_weights="orthogonal")], ATTENTION),
    "mica": Feature(llama, [qv(init_lora_weights="mica")], ATTENTION),
    "embeddings-targeted": Feature(
        llama,
        [qv(target_modules=["embed_tokens", "lm_head", "q_proj"])],
        {"lm_head", "q_proj"},
        {"embed_tokens.lora_embedding_A", "embed_tokens.base_layer.weight", "lm_head.base_layer.weight"},
    ),
    "embeddings-tied": Feature(
        tied_llama,
        [qv(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)],
        {"q_proj"},
        {"embed_tokens.lora_embedding_A", "lm_head.lora_A", "lm_head.lora_B"},
    ),
    "embeddings-resized": Feature(
        resized_llama, [QV], ATTENTION, {"embed_tokens.weight", "lm_head.weight"}, save={"save_embedding_layers": True}
    ),
    "monteclora": Feature(
        llama, [qv(monteclora_config=MontecloraConfig())], ATTENTION, {"lora_monteclora_sampler.std_prior"}
    ),
    "velora": Feature(llama, [qv(velora_config=VeloraConfig())], ATTENTION, {"lora_velora_embed"}),
    "bd-lora": Feature(
        llama,
        [qv(use_bdlora=BdLoraConfig(target_modules_bd_a=["v_proj"], target_modules_bd_b=["q_proj"], nblocks=2))],
        set(),
        {"lora_A", "lora_B"},
        exact="BD-LoRA",
    ),
    "many-in-one-collection": Feature(
        llama,
        [
            QV,
            qv(use_dora=True, r=3),
            qv(init_lora_weights="olora"),
            qv(kasa_config=KasaConfig()),
            qv(alora_invocation_tokens=[4, 5], use_rslora=True),
            qv(target_modules="all-linear", modules_to_save=["lm_head"]),
        ],
        EVERY_LINEAR,
        {"lora_magnitude_vector", "lora_diag", "lm_head.weight"},
    ),
}


def trained(feature: Feature, options: dict[str, Any], seed: int, folder: Path) -> torch.Tensor:
    """Save an adapter all of whose parameters have moved, and give the logits of its model."""
    config = LoraConfig(**copy.deepcopy(options))
    model = get_peft_model(prepare(feature, config), config).eval()
    generator = torch.Generator().manual_seed(seed)
    # A base that was split at the start has trained factors near those of the start.
    near = str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "lora_ga", "loftq"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.02 * noise if near else 0.3 * noise)
    model.save_pretrained(folder, **feature.save)
    return logits(model)


def prepare(feature: Feature, config: LoraConfig) -> Any:
    torch.manual_seed(7)  # what PEFT draws when it initialises
    base = feature.base()
    feature.prepare(base, config)
    return base


def loaded(feature: Feature, folder: Path) -> Any:
    """The adapter of a folder, on a fresh base model."""
    return PeftModel.from_pretrained(prepare(feature, LoraConfig.from_pretrained(folder)), folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    found: torch.Tensor = out if isinstance(out, torch.Tensor) else out.logits
    return found
