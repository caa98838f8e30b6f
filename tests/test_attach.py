"""Each row of a batch is answered by its adapter as PEFT answers with that adapter alone."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lorashare_stream.errors import AdapterError, CheckpointError, UnknownAdapterError, UsageError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import make_collection
from .features import BERT, FEATURES, QV, Feature, bert, gpt2, llama, logits, prepare, qv, trained
from .test_features import PEFTS_OWN, adapters_of, loftq
from .tiers import some_fast

Compress = Callable[..., Path]
SHARED, CODED = {"num_components": 10_000}, {"max_error": 1e-5}
FORMS = pytest.mark.parametrize("options", [SHARED, CODED], ids=["share", "coded"])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))]
NONE = "__base__"
# Features that a row cannot have for itself, and why.
LEFT_OUT = {
    **dict.fromkeys(("conv1d", "conv2d", "conv2d-groups", "conv3d"), "a convolution"),
    **dict.fromkeys(("embedding", "embeddings-targeted"), "in another way than"),
    **dict.fromkeys(("multihead-attention", "multihead-attention-with-patterns"), "neither Linear nor Conv1D"),
    **dict.fromkeys(("target-parameters", "target-parameters-of-others"), "experts stacked"),
    "target-parameters-with-patterns": "experts stacked",
    "target-parameters-that-differ": "only the base model tells",
    **dict.fromkeys(("dora", "dora-on-others"), "DoRA"),
    "lora-bias": "lora_bias",
    "layer-replication": "layer_replication",
    "trainable-token-indices": "trainable_token_indices",
    "kasa": "KaSA",
    "bd-lora": "BD-LoRA",
    "alora": "aLoRA",
    **dict.fromkeys(("pissa", "pissa-niter", "olora", "corda", "lora-ga", "loftq"), "a part of the base"),
    "embeddings-tied": "ties to another",
}


def t5() -> Any:
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **size)).eval()


def saved(base: Any, options: dict[str, Any], seed: int, folder: Path) -> None:
    """Save an adapter all of whose parameters have moved."""
    model, generator = get_peft_model(base, LoraConfig(**options)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def t5_inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "decoder_input_ids": ids[:, :3]}


EVERY = qv(target_modules="all-linear", r=2)
T5_LORA = {"r": 3, "target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}
MODELS = {
    "llama": Feature(
        llama,
        [
            QV,
            EVERY,
            qv(target_modules=["q_proj"], use_rslora=True, lora_alpha=3),
            qv(rank_pattern={"q_proj": 6}, alpha_pattern={"layers.0.self_attn.v_proj": 3}, modules_to_save=["lm_head"]),
        ],
        set(),
    ),
    "gpt2": Feature(
        gpt2,
        [
            {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
            {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        ],
        set(),
    ),
    "bert": Feature(bert, [BERT, BERT | {"r": 2, "target_modules": ["query", "dense"]}, BERT | {"bias": "all"}], set()),
    "t5": Feature(t5, [T5_LORA, T5_LORA | {"r": 5, "target_modules": ["k", "o", "wi"]}], set()),
}


@pytest.fixture(autouse=True)
def loftq_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq)


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SHAREModel]:
    """A checkpoint of the adapters of a model, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, options: dict[str, Any] = SHARED, cut: int = 9) -> SHAREModel:
        key = name, f"{options}{cut}"
        if key not in made:
            root = tmp_path_factory.mktemp(name)
            for seed, its_own in enumerate(MODELS[name].adapters[:cut]):
                saved(MODELS[name].base(), its_own, seed, root / f"a{seed}")
            compress(plan_for(resolve([root / "a*"]), Settings.from_mapping({"device": "cpu"} | options)), root / "out")
            made[key] = root / "out"
        return SHAREModel.from_pretrained(made[key])

    return get


def inputs_of(name: str, rows: int, length: int = 7, seed: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    return t5_inputs(ids) if name == "t5" else {"input_ids": ids}


def rows_of(inputs: dict[str, torch.Tensor], which: Any) -> dict[str, torch.Tensor]:
    return {key: value[which] for key, value in inputs.items()}


def alone(share: SHAREModel, name: str, adapter: str) -> Any:
    """PEFT with the reconstructed adapter."""
    base = MODELS[name].base()
    return base if adapter == NONE else share.apply(base, adapter).eval()


@torch.no_grad()
def truth_of(share: SHAREModel, name: str, names: Sequence[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    models = {n: alone(share, name, n) for n in dict.fromkeys(names)}
    return torch.cat([models[n](**rows_of(inputs, [i])).logits for i, n in enumerate(names)])


@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize(
    ("name", "options"),
    [*some_fast([(n, SHARED) for n in FEATURES], 5), *some_fast([(n, CODED) for n in FEATURES], 7)],
)
def test_a_feature_of_peft(tmp_path: Path, compressed: Compress, name: str, options: dict[str, Any]) -> None:
    feature, adapters = FEATURES[name], adapters_of(FEATURES[name])
    for seed, (adapter, its_own) in enumerate(adapters.items()):
        trained(feature, its_own, seed, tmp_path / adapter)
    share, base = SHAREModel.from_pretrained(compressed([tmp_path / a for a in adapters], **options)), feature.base()
    if name in LEFT_OUT:
        with pytest.raises(CheckpointError, match=f"none of . adapters can be attached.*{LEFT_OUT[name]}"):
            share.attach(base)
        return
    plain = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "many-in-one-collection" else "error", UserWarning)
        model = share.attach(base)
    assert len(model.adapter_names) == (2 if name == "many-in-one-collection" else len(adapters))
    for n in model.adapter_names:
        truth = logits(share.apply(prepare(feature, LoraConfig.from_pretrained(tmp_path / n)), n).eval())
        close = 1e-4 * max(1.0, float(truth.abs().max()))
        both = logits(lambda ids, n=n: model(ids, adapter_names=[n, n]))
        mixed = logits(lambda ids, n=n: model(ids, adapter_names=[NONE, n]))
        assert torch.allclose(both, truth, atol=close)
        assert torch.allclose(mixed[1], truth[1], atol=close)
        assert torch.allclose(mixed[0], plain[0], atol=1e-5)
        assert not torch.allclose(plain, truth, atol=1e-2)


@pytest.mark.few(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), some_fast([(n, o) for n in MODELS for o in (SHARED, CODED)], 2))
def test_rows_of_one_batch(opened: Any, name: str, device: str, options: dict[str, Any]) -> None:
    share, base = opened(name, options), MODELS[name].base().to(device)
    model = share.attach(base)
    for names in (["a0", "a1"], [NONE, "a1", "a0", "a0", NONE], share.adapter_names[::-1], ["a1"]):
        inputs = inputs_of(name, len(names), length=len(names) + 2)
        truth = truth_of(share, name, names, inputs)
        with torch.inference_mode():
            found = model(**rows_of(inputs, slice(None)) | {k: v.to(device) for k, v in inputs.items()},
                          adapter_names=names).logits.cpu()  # fmt: skip
        assert torch.allclose(found, truth, atol=1e-4)
        assert len({tuple(row.flatten().tolist()) for row in truth}) == len(names)


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 1},
}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "way", "options"),
    some_fast([(n, way, o) for n in ("llama", "gpt2", "t5") for way in HOW for o in (SHARED, CODED)], 5),
)
def test_generate(opened: Any, name: str, way: str, options: dict[str, Any]) -> None:
    share, names = opened(name, options), ["a1", NONE, "a0"]
    inputs = {"input_ids": inputs_of("llama", 3, 4)["input_ids"]}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **HOW[way]}
    model = share.attach(MODELS[name].base())
    found = model.generate(**inputs, adapter_names=names, **how)
    each = [alone(share, name, n).generate(**rows_of(inputs, [i]), **how) for i, n in enumerate(names)]
    assert torch.equal(found, torch.cat(each))
    assert torch.equal(model.generate(**inputs, **how), MODELS[name].base().generate(**inputs, **how))


@FORMS
@given(names=st.lists(st.sampled_from([NONE, "a0", "a1", "a2", "a3"]), min_size=1, max_size=6), seed=st.randoms())
def test_a_batch_is_its_rows_in_any_order(opened: Any, options: dict[str, Any], names: list[str], seed: Any) -> None:
    model = opened("llama", options).attach(llama())
    inputs, order = inputs_of("llama", len(names)), seed.sample(range(len(names)), len(names))
    with torch.no_grad():
        whole = model(**inputs, adapter_names=names).logits
        permuted = model(**rows_of(inputs, order), adapter_names=[names[i] for i in order]).logits
        single = [model(**rows_of(inputs, [i]), adapter_names=[n]).logits for i, n in enumerate(names)]
    assert torch.allclose(whole[order], permuted, atol=1e-5)
    assert torch.allclose(whole, torch.cat(single), atol=1e-5)


@pytest.mark.few(2)
@FORMS
def test_threads_serve_side_by_side(opened: Any, options: dict[str, Any]) -> None:
    model = opened("bert", options).attach(bert(), memory=10_000)
    asked = [[n, m] for n in (NONE, "a0", "a1", "a2") for m in ("a2", "a1", NONE)] * 4
    inputs = inputs_of("bert", 2)

    @torch.no_grad()
    def answer(names: list[str]) -> torch.Tensor:
        return model(**inputs, adapter_names=names).logits

    truths = [answer(names) for names in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, asked))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, truths, strict=True))


def test_a_full_cache_forgets_what_was_used_longest_ago(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    share, decoded, read = opened("llama", CODED), [], None
    read = share._reader.tensors
    monkeypatch.setattr(share._reader, "tensors", lambda name: decoded.append(name) or read(name))
    model, inputs = share.attach(llama()), inputs_of("llama", 2)
    assert not decoded  # the index tells what fits
    for names in (["a0", "a1"], ["a1", "a0"], ["a0", NONE]):
        model(**inputs, adapter_names=names)
    assert decoded == ["a0", "a1"]
    one, truth = model.parts["a0"].nbytes, truth_of(share, "llama", ["a0", "a2"], inputs)
    model.detach()
    model = share.attach(model.base_model, memory=one)
    decoded.clear()
    for names in (["a0", "a0"], ["a0", NONE], ["a2", "a2"], ["a0", "a2"]):
        found = model(**inputs, adapter_names=names).logits
        assert model.parts.nbytes <= one
    assert torch.allclose(found, truth, atol=1e-4)  # both are held as long as the call needs them
    assert decoded[:2] == ["a0", "a2"]
    assert len(decoded) > 2


@FORMS
def test_the_base_comes_back_as_it_was(opened: Any, options: dict[str, Any]) -> None:
    share, base, inputs = opened("bert", options), bert(), inputs_of("bert", 2)
    before, state = base(**inputs).logits, {k: v.clone() for k, v in base.state_dict().items()}
    model = share.attach(base)
    assert model.config is base.config
    assert model.device == base.device
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model(**inputs, adapter_names=[NONE, NONE]).logits, before)
    assert not torch.allclose(model(**inputs, adapter_names=["a0", "a2"]).logits, before, atol=1e-2)
    assert torch.equal(base(**inputs).logits, before)  # who calls the base itself gets the base
    assert model.detach() is base
    assert torch.equal(base(**inputs).logits, before)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    with pytest.raises(UsageError, match="detached from its base"):
        model(**inputs, adapter_names=["a0", "a0"])
    again = share.attach(base)
    del again
    gc.collect()
    assert not any(m._forward_hooks for m in base.modules())  # nobody can ask any more


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    some_fast(
        [(n, d, o) for n in ("llama", "bert") for d in (torch.bfloat16, torch.float16) for o in (SHARED, CODED)], 4
    ),
)
def test_half_precision_is_as_good_as_that_of_peft(
    opened: Any, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    share, inputs = opened(name, options), inputs_of(name, 3)
    names = ["a0", "a1", "a2"]
    truth = truth_of(share, name, names, inputs)
    with torch.no_grad():
        peft = [alone(share, name, n).to(dtype)(**rows_of(inputs, [i])).logits for i, n in enumerate(names)]
        own = share.attach(MODELS[name].base().to(dtype))(**inputs, adapter_names=names).logits
        moved = share.attach(MODELS[name].base()).to(dtype)(**inputs, adapter_names=names).logits
    allowed = 3 * float((torch.cat(peft) - truth).abs().max())
    assert own.dtype == moved.dtype == dtype
    assert float((own - truth).abs().max()) < allowed
    assert float((moved - truth).abs().max()) < allowed


def test_what_is_held_moves_with_the_model(opened: Any) -> None:
    for options in (SHARED, CODED):
        share, inputs, names = opened("bert", options), inputs_of("bert", 2), ["a0", "a2"]
        model = share.attach(bert())
        with torch.inference_mode():
            model(**inputs, adapter_names=names)
        truth = truth_of(share, "bert", names, inputs)
        out = model(**inputs, adapter_names=names).logits  # with gradients, after a call without
        assert torch.allclose(out, truth, atol=1e-4)
        out.sum().backward()
        size = model.resident_bytes()
        model.double()
        assert model.resident_bytes() == 2 * size
        assert torch.allclose(model(**inputs, adapter_names=names).logits.float(), truth, atol=1e-4)


def test_memory_is_that_of_the_formula(opened: Any) -> None:
    share = opened("llama")
    model = share.attach(llama())
    verbatim = sum(t.nbytes for name in share.adapter_names for t in share.all_classifier_heads[name].values())
    ranks: dict[str, int] = {}
    for name in share.adapter_names:
        for group, loading in share.all_loadings[name].items():
            ranks[group] = max(ranks.get(group, 0), loading.shape[1])
    bases = sum(v.shape[0] * v.shape[1] for v in share.components.values())
    loadings = sum(5 * v.shape[1] * ranks[group] for group, v in share.components.items())
    assert model.resident_bytes() == 4 * (bases + loadings) + verbatim


def heads(root: Path, labels: Sequence[int]) -> list[Path]:
    """Adapters of BERT with LoRA of a classifier of so many labels."""
    for i, n in enumerate(labels):
        saved(with_labels(n), {"r": 2 + i, "target_modules": ["query", "classifier"]}, i, root / f"h{i}")
    return [root / f"h{i}" for i in range(len(labels))]


def with_labels(n: int) -> Any:
    model = bert()
    torch.manual_seed(5)
    model.classifier, model.num_labels, model.config.num_labels = nn.Linear(32, n), n, n
    return model


@FORMS
def test_factors_that_are_verbatim_in_a_share_checkpoint(
    tmp_path: Path, compressed: Compress, options: dict[str, Any]
) -> None:
    folders = heads(tmp_path / "in", [5, 5, 3])
    share, inputs = SHAREModel.from_pretrained(compressed(folders, **options)), inputs_of("bert", 2)
    if not share.config.coded:
        assert any("classifier.lora_A" in key for key in share.certified("h2")["verbatim"])
    for n, left, right in ((3, ["h0", "h1"], "h2"), (5, ["h2"], "h0")):
        with pytest.warns(UserWarning, match=f"not attached: {len(left)} of 3 adapters") as told:
            model = share.attach(with_labels(n))
        assert len(told) == 1
        assert list(model.left_out) == left
        truth = share.apply(with_labels(n), right).eval()(**inputs).logits
        assert torch.allclose(model(**inputs, adapter_names=[right, right]).logits, truth, atol=1e-4)
        assert torch.allclose(model(**inputs, adapter_names=[NONE, right]).logits[1], truth[1], atol=1e-4)
        with pytest.raises(AdapterError, match=f"adapter '{left[0]}'.*other widths"):
            model(**inputs, adapter_names=[right, left[0]])


@FORMS
def test_heads_of_other_widths_answer_in_batches_of_their_own(
    tmp_path: Path, compressed: Compress, options: dict[str, Any]
) -> None:
    for i, n in enumerate((5, 5, 3)):
        saved(with_labels(n), BERT, i, tmp_path / f"h{i}")
    share = SHAREModel.from_pretrained(compressed([tmp_path / f"h{i}" for i in range(3)], **options))
    model, inputs = share.attach(bert()), inputs_of("bert", 2)
    five = [share.apply(with_labels(5), n).eval()(**inputs).logits for n in ("h0", "h1")]
    found = model(**inputs, adapter_names=["h1", "h0"]).logits
    assert torch.allclose(found, torch.stack([five[1][0], five[0][1]]), atol=1e-4)
    for names in (["h1", "h2"], ["h2", "h1"]):
        with pytest.raises(UsageError, match=r"different widths.*'h1': 5, 'h2': 3|'h2': 3, 'h1': 5"):
            model(**inputs, adapter_names=names)
    with pytest.raises(UsageError, match="'__base__': 3, 'h0': 5"):
        model(**inputs, adapter_names=["h0", NONE])


@FORMS
def test_names_that_cannot_be_meant(opened: Any, options: dict[str, Any]) -> None:
    model, inputs = opened("llama", options).attach(llama()), inputs_of("llama", 2)
    before = model(**inputs, adapter_names=["a0", "a1"]).logits
    with pytest.raises(UnknownAdapterError, match=r"no adapter named 'a9' among 4. Near: a"):
        model(**inputs, adapter_names=["a0", "a9"])
    for names in (["a0"], ["a0"] * 3, []):
        for run in (model, model.generate):
            with pytest.raises(UsageError, match=f"found {len(names)} name.*expected 2 rows"):
                run(**inputs, adapter_names=names)
    with pytest.raises(UsageError, match="no list of names"):
        model(**inputs, adapter_names="a0")
    with pytest.raises(UsageError, match="no list of names"):
        model(**inputs, adapter_names={"a0": 1})
    assert torch.equal(model(**inputs, adapter_names=["a0", "a1"]).logits, before)


@FORMS
def test_bases_that_do_not_fit(opened: Any, options: dict[str, Any]) -> None:
    share, base = opened("llama", options), llama()
    with pytest.raises(CheckpointError, match=r"no such module.*found GPT2LMHeadModel.*AutoModelForCausalLM"):
        share.attach(gpt2())
    wide = llama()
    wide.model.layers[0].self_attn.q_proj = nn.Linear(32, 48)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj'.*found d_in, d_out = \(32, 48\)"):
        share.attach(wide)
    with pytest.raises(UsageError, match=r"no torch.nn.Module"):
        share.attach("a model")
    with pytest.raises(UsageError, match="has adapters of PEFT"):
        share.attach(share.apply(llama(), "a0"))
    model = share.attach(base)
    for taken in (base, model):
        with pytest.raises(UsageError, match="has a checkpoint attached"):
            share.attach(taken)
    for memory in ("much", -1):
        with pytest.raises(UsageError, match="memory"):
            share.attach(llama(), memory=memory)


class Routed(nn.Module):
    """A layer that sees other rows than those of the batch."""

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.lin, self.choose = nn.Linear(16, 16), choose

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.choose(x))


def routed(folder: Path, compressed: Compress) -> SHAREModel:
    for seed in range(2):
        saved(Routed(lambda x: x), {"r": 2, "target_modules": ["lin"]}, seed, folder / f"a{seed}")
    return SHAREModel.from_pretrained(compressed([folder / "a0", folder / "a1"], num_components=8))


def test_a_layer_that_sees_other_rows_is_named(tmp_path: Path, compressed: Compress) -> None:
    share, x = routed(tmp_path, compressed), torch.randn(2, 3, 16)
    for choose in (
        lambda x: x[:1], lambda x: x.flatten(0, 1)[:4], lambda x: x.transpose(0, 1), lambda x: x[0, 0],
    ):  # fmt: skip
        with pytest.raises(UsageError, match="the module lin does not see the rows"):
            share.attach(Routed(choose))(x, adapter_names=["a0", "a1"])


def test_rows_that_are_flattened_with_their_lengths(tmp_path: Path, compressed: Compress) -> None:
    share, x, names = routed(tmp_path, compressed), torch.randn(2, 3, 16), ["a1", "a0"]
    base = Routed(lambda x: x.flatten(0, 1))
    found = share.attach(base)(x, adapter_names=names)
    each = [share.apply(fresh(base), n) for n in names]
    assert torch.allclose(found, torch.cat([model(x[[i]]) for i, model in enumerate(each)]), atol=1e-5)


def fresh(base: Routed) -> Routed:
    found = Routed(base.choose)
    found.load_state_dict(base.state_dict())
    return found


def test_a_large_error_is_told(tmp_path: Path, compressed: Compress) -> None:
    for seed, its_own in enumerate(MODELS["llama"].adapters[:3]):
        saved(llama(), its_own, seed, tmp_path / f"a{seed}")
    share = SHAREModel.from_pretrained(compressed([tmp_path / f"a{i}" for i in range(3)], num_components=1))
    with pytest.warns(UserWarning, match=r"the mean relative dW error of this checkpoint is 0\.\d\d.*larger k"):
        model = share.attach(llama())
    inputs = inputs_of("llama", 2)
    truth = truth_of(share, "llama", ["a2", "a0"], inputs)
    assert torch.allclose(model(**inputs, adapter_names=["a2", "a0"]).logits, truth, atol=1e-4)


@FORMS
def test_a_checkpoint_that_is_replaced_while_it_is_served(
    tmp_path: Path, opened: Any, compressed: Compress, options: dict[str, Any]
) -> None:
    served = tmp_path / "served"
    shutil.copytree(opened("llama", options)._folder().root, served)
    share, late = SHAREModel.from_pretrained(served), SHAREModel.from_pretrained(served)
    model, inputs = share.attach(llama()), inputs_of("llama", 2)
    before = model(**inputs, adapter_names=["a0", "a1"]).logits
    for seed in range(2):
        saved(llama(), QV, 10 + seed, tmp_path / f"a{seed}")
    other = compressed([tmp_path / "a0", tmp_path / "a1"], **options)
    shutil.rmtree(served)
    shutil.copytree(other, served)
    assert torch.equal(model(**inputs, adapter_names=["a0", "a1"]).logits, before)
    if share.config.coded:
        with pytest.raises(CheckpointError, match=r"adapter 'a2'.*is missing"):
            model(**inputs, adapter_names=["a0", "a2"])
        assert torch.equal(model(**inputs, adapter_names=["a0", "a1"]).logits, before)
    else:
        with pytest.raises(CheckpointError, match=r"the checkpoint was replaced|is missing"):
            late.attach(llama())


def test_an_adapter_that_is_added_while_a_checkpoint_is_attached(tmp_path: Path, opened: Any) -> None:
    """It keeps the packs: what was attached goes on, and the new one is there after another attach."""
    served = tmp_path / "served"
    shutil.copytree(opened("llama", CODED)._folder().root, served)
    share = SHAREModel.from_pretrained(served)
    model, inputs = share.attach(llama()), inputs_of("llama", 2)
    saved(llama(), QV, 10, tmp_path / "new")
    other = SHAREModel.from_pretrained(served)
    other.add_adapter(str(tmp_path / "new"))
    truth = truth_of(other, "llama", ["a1", "a2"], inputs)
    assert torch.allclose(model(**inputs, adapter_names=["a1", "a2"]).logits, truth, atol=1e-4)
    with pytest.raises(UnknownAdapterError):
        model(**inputs, adapter_names=["a1", "new"])
    model.detach()
    model = other.attach(model.base_model)
    truth = truth_of(other, "llama", ["a1", "new"], inputs)
    assert torch.allclose(model(**inputs, adapter_names=["a1", "new"]).logits, truth, atol=1e-4)


def test_a_model_that_was_not_read_cannot_be_attached(tmp_path: Path, compressed: Compress) -> None:
    share = SHAREModel.from_pretrained(compressed(make_collection(tmp_path / "in", 3), num_components=4))
    loose = SHAREModel(share.config, share.components, share.all_loadings, share.adapter_configs)
    with pytest.raises(CheckpointError, match="was not read from a checkpoint"):
        loose.attach(llama())


def test_a_base_that_is_in_use_is_not_given_to_peft(opened: Any) -> None:
    share, base = opened("llama", SHARED), MODELS["llama"].base()
    model = share.attach(base)
    with pytest.raises(UsageError, match=r"checkpoint attached.*detach\(\)"):
        share.apply(base, "a0")
    with pytest.raises(UsageError, match="checkpoint attached"):
        share.apply(model, "a0")
    applied = share.apply(model.detach(), "a0")
    with pytest.raises(UsageError, match=r"PeftModel.*unload\(\)"):
        share.apply(applied, "a1")


def test_what_the_base_lacks_is_told_before_what_an_adapter_has(tmp_path: Path, compressed: Compress) -> None:
    for seed, options in enumerate([{"use_dora": True}, {}]):
        trained(FEATURES["linear"], {**adapters_of(FEATURES["linear"])["a0"], **options}, seed, tmp_path / f"a{seed}")
    share = SHAREModel.from_pretrained(compressed([tmp_path / "a0", tmp_path / "a1"], max_error=0.2))
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, max_position_embeddings=32, **size))
    with pytest.raises(CheckpointError, match="other widths"):
        share.attach(wide)
    with pytest.raises(UsageError, match=r"other widths.*size mismatch"):
        share.apply(wide, "a1")
