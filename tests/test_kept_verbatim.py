"""Factors that dW tells nothing of, and modules that are others than their namesakes: they come back byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import CollectionError, WorkspaceError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings, summary_text
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import MODULES, factor_keys, load_tensors, make_collection, make_tensors, write_adapter

Compress = Callable[..., Path]
SHARED, CODED = {"num_components": 4}, {"max_error": 0.3}
both_forms = pytest.mark.parametrize("form", [SHARED, CODED], ids=["share", "coded"])
LABELS = (2, 2, 2, 2, 3, 3, 5, 2)


def same_bytes(found: Any, original: np.ndarray) -> bool:
    return bool(found.numpy().tobytes() == original.tobytes())


def modules_in(keys: Iterable[str]) -> set[str]:
    """The modules of which lora_A and lora_B are among some keys."""
    keys = set(keys)
    names = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in keys if ".lora_" in key}
    return {name for name in names if keys.issuperset(factor_keys(name))}


def kept_of(share: SHAREModel, folder: str | Path) -> set[str]:
    """The modules whose factors come back byte for byte."""
    original, found = load_tensors(folder), share.reconstruct(Path(folder).name)
    assert found.keys() == original.keys()
    return modules_in(key for key, tensor in original.items() if same_bytes(found[key], tensor))


def check_verified(share: SHAREModel, folders: Iterable[Any]) -> None:
    verdicts = {v.name: v for v in verify(share, originals_of(share, resolve([str(f) for f in folders])))}
    assert {v.problem for v in verdicts.values()} == {None}
    exact = share.config.ours["verbatim_adapters"]
    assert all((verdicts[name].worst_module is None) == (name in exact) for name in verdicts)
    for folder in map(Path, folders):
        if folder.name in exact:  # nothing else is called exact
            assert kept_of(share, folder) == modules_in(load_tensors(folder))


# -- dW tells nothing of the factors ----------------------------------------------------------------------------------


@both_forms
def test_what_has_no_scale_is_kept_and_named(tmp_path: Path, compressed: Compress, form: dict[str, Any]) -> None:
    """As verl's model_merger writes adapters: lora_alpha is mended by hand, later."""
    folders = make_collection(tmp_path / "in", 8)
    config = json.loads(Path(folders[0], "adapter_config.json").read_text())
    for name, change in {"a01": {"lora_alpha": 0}, "a02": {"alpha_pattern": {"v": 0.0}}}.items():
        (tmp_path / "in" / name / "adapter_config.json").write_text(json.dumps(config | change))
    warnings = "\n".join(plan_warnings(plan_for(resolve(folders), Settings.from_mapping(form))))
    assert (
        "kept exact, since lora_alpha is 0, so that dW is 0 and tells nothing of them: in 1 adapter (a01)" in warnings
    )
    assert "LoRA tensors of v kept verbatim, since lora_alpha is 0" in warnings
    share = SHAREModel.from_pretrained(compressed(folders, **form))
    assert kept_of(share, folders[1]) == MODULES.keys()
    assert kept_of(share, folders[2]) == {"layers.0.v"}
    assert kept_of(share, folders[3]) == set()
    assert share.config.ours["verbatim_adapters"] == ["a01"]
    assert share.config.ours["verbatim_factors"] == {"v": 1}
    check_verified(share, folders)
    assert share.certified("a02")["relative_error"] > 0.01
    assert share.reconstruction_error("a02", original_path=folders[2])["delta_per_module"]["layers.0.v"] == 0


@both_forms
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_without_dw_is_kept_and_named(
    tmp_path: Path, compressed: Compress, form: dict[str, Any], side: str
) -> None:
    folders = make_collection(tmp_path / "in", 6)
    zero = {k: np.zeros_like(v) if side in k else v for k, v in load_tensors(folders[0]).items()}
    folders.append(str(write_adapter(tmp_path / "in" / "zero", zero, r=4, lora_alpha=8)))
    share = SHAREModel.from_pretrained(compressed(folders, **form))
    assert share.config.ours["verbatim_adapters"] == ["zero"]
    assert kept_of(share, folders[-1]) == MODULES.keys()
    assert "kept exact, since dW is 0 and tells nothing of lora_A and lora_B" in share.certified("zero")["notes"]
    check_verified(share, folders)


@both_forms
def test_a_module_without_dw_is_not_called_exact(tmp_path: Path, compressed: Compress, form: dict[str, Any]) -> None:
    folders = make_collection(tmp_path / "in", 4)
    b = factor_keys("layers.0.v")[1]
    write_adapter(Path(folders[0]), load_tensors(folders[0]) | {b: np.zeros((12, 4), np.float32)}, r=4, lora_alpha=8)
    share = SHAREModel.from_pretrained(compressed(folders, **form))
    assert share.config.ours["verbatim_adapters"] == []
    assert not share.reconstruct("a00")[b].numpy().any()
    assert not any(key.endswith(("lora_A.weight", "lora_B.weight")) for key in share.certified("a00")["verbatim"])
    check_verified(share, folders)


@pytest.mark.parametrize("objective", ["delta", "factors"])
def test_no_scale_is_no_matter_of_the_objective(tmp_path: Path, compressed: Compress, objective: str) -> None:
    folders = make_collection(tmp_path / "in", 4)
    config = json.loads(Path(folders[0], "adapter_config.json").read_text())
    Path(folders[0], "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    out = compressed(folders, **SHARED, objective=objective)
    assert kept_of(SHAREModel.from_pretrained(out), folders[0]) == MODULES.keys()


# -- modules that are others than their namesakes ---------------------------------------------------------------------


def heads(root: Path, labels: Iterable[int] = LABELS) -> list[Path]:
    rng = np.random.default_rng(0)
    return [
        write_adapter(root / f"t{i}", make_tensors(rng, MODULES | {"classifier": (40, n)}), r=4, lora_alpha=8)
        for i, n in enumerate(labels)
    ]


def verbatim_in(out: Path) -> dict[str, list[str]]:
    """The adapters with LoRA tensors verbatim: which."""
    share = SHAREModel.from_pretrained(out)
    found = {name: share.certified(name)["verbatim"] for name in share.adapter_names}
    return {name: sorted(keys) for name, keys in found.items() if keys}


def classifiers(*names: str) -> dict[str, list[str]]:
    return {name: [f"base_model.model.classifier.lora_{side}.weight" for side in "AB"] for name in names}


def test_a_head_of_another_width_is_verbatim_alone(
    tmp_path: Path, compressed: Compress, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = heads(tmp_path / "in")
    out = compressed(folders, **SHARED)
    assert verbatim_in(out) == classifiers("t4", "t5", "t6")
    share = SHAREModel.from_pretrained(out)
    assert share.config.ours["verbatim_adapters"] == []
    assert kept_of(share, folders[4]) == {"classifier"}
    (note,) = share.certified("t6")["notes"]
    assert all(part in note for part in ("classifier, d_out = 5:", "d_out is 2 there in most adapters"))
    assert share.config.ours["verbatim_factors"] == {"classifier": 3}
    assert "LoRA tensors of classifier in 3 adapters" in summary_text(share.config)
    assert share.config.ours["groups"]["classifier:B"]["n"] == 5 * 4
    check_verified(share, folders)
    assert main(["plan", str(tmp_path / "in"), "-k", "4", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    (told,) = [text for text in notes if "classifier kept verbatim" in text]  # one for all
    assert "in 3 adapters (t4, t5, t6)" in told
    assert main(["refit", str(out), "-k", "2", "-o", str(tmp_path / "cut")]) == 0
    assert verbatim_in(tmp_path / "cut") == classifiers("t4", "t5", "t6")
    turned = compressed(folders[::-1], "turned", **SHARED)
    assert verbatim_in(turned) == classifiers("t4", "t5", "t6")


def test_a_tie_of_widths_does_not_depend_on_order(tmp_path: Path, compressed: Compress) -> None:
    folders = heads(tmp_path / "in", (2, 3))
    found = [verbatim_in(compressed(some, f"out{i}", **SHARED)) for i, some in enumerate((folders, folders[::-1]))]
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_a_coded_head_may_have_any_width(tmp_path: Path, compressed: Compress) -> None:
    folders = heads(tmp_path / "in")
    share = SHAREModel.from_pretrained(compressed(folders, **CODED))
    assert all(kept_of(share, folder) == set() for folder in folders)
    check_verified(share, folders)
    fresh = more(tmp_path, 9)
    add(tmp_path / "out", resolve([str(fresh)]), RunOptions())
    assert kept_of(SHAREModel.from_pretrained(tmp_path / "out"), fresh) == set()


def test_a_workspace_of_coded_adapters_with_several_widths_fits_no_bases(tmp_path: Path, compressed: Compress) -> None:
    folders = heads(tmp_path / "in", (2, 3, 2))
    compressed(folders, **CODED)
    with pytest.raises(WorkspaceError, match=r"'classifier': .*not the same in all.*another workspace"):
        compressed(folders, **SHARED)
    other = compressed(folders, "other", **SHARED)
    assert verbatim_in(other) == classifiers("t1")
    plan = plan_for(resolve([str(f) for f in folders]), Settings(max_error=0.3), default_workspace(other))
    compress(plan, other, overwrite=True)
    assert verbatim_in(other) == {}


def more(tmp_path: Path, labels: int, name: str = "new") -> Path:
    tensors = make_tensors(np.random.default_rng(7), MODULES | {"classifier": (40, labels)})
    return write_adapter(tmp_path / "more" / name, tensors, r=4, lora_alpha=8)


@pytest.mark.parametrize("workspace", [True, False])
def test_what_is_added_takes_the_width_of_the_checkpoint(tmp_path: Path, compressed: Compress, workspace: bool) -> None:
    out = compressed(heads(tmp_path / "in"), **SHARED)
    if not workspace:
        shutil.rmtree(tmp_path / "out.workspace")
    fresh = [more(tmp_path, n, name) for n, name in ((3, "b0"), (3, "b1"), (3, "b2"), (3, "b3"), (2, "b4"))]
    add(out, resolve([str(f) for f in fresh]), RunOptions(accept=1e-6))
    assert verbatim_in(out) == classifiers("t4", "t5", "t6", "b0", "b1", "b2", "b3")
    check_verified(SHAREModel.from_pretrained(out), [*(tmp_path / "in").iterdir(), *fresh])


def test_what_was_verbatim_stays_so_when_the_others_are_gone(tmp_path: Path, compressed: Compress) -> None:
    folders = heads(tmp_path / "in", (2, 2, 2, 3, 3))
    out = compressed(folders, **SHARED)
    assert verbatim_in(out) == classifiers("t3", "t4")
    remove(out, ["t0", "t1"], RunOptions(), refit=True)
    again = compressed(folders[2:], **SHARED)
    assert verbatim_in(again) == classifiers("t3", "t4")
    remove(out, ["t2"], RunOptions(), refit=True)
    again = compressed([*folders[3:], more(tmp_path, 3)], **SHARED)
    assert verbatim_in(again) == classifiers("t3", "t4")  # of the new one, the width is that of all now
    check_verified(SHAREModel.from_pretrained(again), [*folders[3:], tmp_path / "more" / "new"])


def test_another_base_model_is_refused_still(tmp_path: Path) -> None:
    folders = heads(tmp_path / "in", (2, 2, 2))
    rng = np.random.default_rng(3)
    wide = {"layers.0.q": (80, 24), "layers.0.v": (80, 12), "layers.1.q": (80, 24), "classifier": (40, 2)}
    write_adapter(tmp_path / "in" / "wide", make_tensors(rng, wide), r=4, lora_alpha=8)
    plan = plan_for(resolve([tmp_path / "in"]), Settings())
    with pytest.raises(CollectionError, match=r"'wide'.*in 3 of 4 modules \(found d_in = 80; expected d_in = 40"):
        plan.validate()
    coded = plan_for(resolve([tmp_path / "in"]), Settings(max_error=0.3))
    compress(coded, tmp_path / "coded")
    assert len(SHAREModel.from_pretrained(tmp_path / "coded").adapter_names) == len(folders) + 1
