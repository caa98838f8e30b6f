"""Coded checkpoints with directions: within their limits, smaller, the same however they are made, and honest."""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorashare_stream.adapters.pickles import raw_bytes
from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.checkpoint.format import DIRECTIONS, INDEX, SHARED, ours_of, total_bytes
from lorashare_stream.checkpoint.index import read_index
from lorashare_stream.cli.app import main
from lorashare_stream.codec.code import Subject, decoded
from lorashare_stream.codec.directions import Basis, Shared, as_bytes, from_bytes, unit
from lorashare_stream.codec.quantiser import HIGHEST
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.refit import refit
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import CheckpointError, CollectionError, UsageError, WorkspaceError
from lorashare_stream.hub.push import push
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.stages import coding
from lorashare_stream.workspace.workspace import Workspace

from . import independent_reader
from .conftest import akin_tensors, factor_keys, load_tensors, make_akin, tree_digest, write_adapter
from .fakehub import ALICE, FakeHub, patched
from .features import QV, llama
from .mixed import EXPERTS, MODULES, mixed_collection
from .test_codec import Factors, certificate, delta_of, factors, subject_of
from .test_coded_edits import WIDE, alone, go, measured, nodes, said
from .tiers import slow

Compress = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
LIMIT = 0.1
ON: dict[str, Any] = {"max_error": LIMIT, "directions": True}
OFF: dict[str, Any] = {"max_error": LIMIT}


def kin(root: Path) -> list[str]:
    """Adapters with an initial lora_A in common, of several ranks and dtypes, one with a head, one zero, some with
    stacked experts; and one that has nothing in common with them."""
    folders, rng = [Path(f) for f in make_akin(root, 8, MODULES)], np.random.default_rng(1)
    for r in (2, 8):
        folders.append(write_adapter(root / f"rank{r}", akin_tensors(rng, MODULES, r), r=r))
    head = {"base_model.model.head.weight": rng.standard_normal((3, 5)).astype(np.float32)}
    folders.append(write_adapter(root / "head", akin_tensors(rng, MODULES) | head))
    zero = {k: 0 * t if "lora_B" in k else t for k, t in akin_tensors(rng, MODULES).items()}
    folders.append(write_adapter(root / "zero", zero))
    folders.append(write_adapter(root / "stranger", akin_tensors(rng, MODULES, own=100.0)))
    folders.append(write_adapter(root / "half", tensors := akin_tensors(rng, MODULES)))
    save_file({k: torch.from_numpy(t).bfloat16() for k, t in tensors.items()}, root / "half/adapter_model.safetensors")
    a, b = factor_keys(EXPERTS)
    common = rng.standard_normal((3 * 2, 40))
    for i in range(5):
        stacked = {a: common + 0.05 * rng.standard_normal(common.shape), b: rng.standard_normal((16, 2 * 3))}
        tensors = {k: t.astype(np.float32) for k, t in stacked.items()} | akin_tensors(rng, {"layers.0.q": (40, 24)}, 2)
        config = {"r": 2, "lora_alpha": 4, "target_parameters": ["experts.up"]}
        folders.append(write_adapter(root / f"experts{i}", tensors, **config))
    return [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the adapters in `in` two checkpoints: `out`, with directions, and `plain`."""
    root = tmp_path_factory.mktemp("kin")
    sources = kin(root / "in")
    go(sources, root / "out", **ON)
    go(sources, root / "plain", **OFF)
    return root


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, without a workspace."""
    return Path(shutil.copytree(made / "out", tmp_path / "copy"))


def basis(k: int, d: int, seed: int = 0) -> Basis:
    """k directions of d numbers, of falling eigenvalues."""
    q = np.linalg.qr(np.random.default_rng([seed, k, d]).standard_normal((d, d)))[0]
    return Basis.of(q[:, :k], [2.0**-i for i in range(k)], 2.5)


def sizes(out: Path) -> dict[str, Any]:
    return dict(read_share_config(out).ours["bytes"])


def codes(out: Path) -> dict[str, str]:
    """The digest of the code of each adapter."""
    return {name: adapter.code.digest for name, adapter in read_index(out / INDEX).adapters.items()}


def groups_in(out: Path) -> dict[str, Basis]:
    """The directions of a checkpoint, by group."""
    index = read_index(out / INDEX)
    return dict(from_bytes(coding._directions_in(out, index), 1 << 30))


def fitted_to_all(out: Path) -> bool:
    ours = ours_of(out)
    assert ours is not None
    return not ours.get("projected") and not ours.get("removed")


def error_of(original: Path, back: Mapping[str, torch.Tensor]) -> float:
    """||dW - dW^|| / ||dW||, each dW formed in float64, by the rules of PEFT."""
    config = json.loads((original / "adapter_config.json").read_text())
    before, error, norm = load_file(original / "adapter_model.safetensors"), 0.0, 0.0
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in back.items()}
    for key in (k for k in before if "lora_A" in k):
        experts, scale = len(before[key]) // config["r"], config["lora_alpha"] / config["r"]
        each = ([t[k].double().numpy() for k in (key, key.replace("_A", "_B"))] for t in (before, back))
        one, other = (delta_of(a, b, scale, experts) for a, b in each)
        error, norm = error + np.sum((one - other) ** 2), norm + np.sum(one**2)
    return float(np.sqrt(error / norm)) if norm else 0.0


# -- what is made ------------------------------------------------------------------------------------------------------


def test_every_adapter_is_within_its_limit_as_its_certificate_says(made: Path, tmp_path: Path) -> None:
    share = SHAREModel.from_pretrained(made / "out")
    for name in share.adapter_names:
        share.reconstruct(name, output_dir=tmp_path / name)
        back, certified = load_file(tmp_path / name / "adapter_model.safetensors"), share.certified(name)
        assert error_of(made / "in" / name, back) == pytest.approx(certified["relative_error"], rel=1e-5, abs=1e-9)
        assert certified["relative_error"] <= LIMIT
        assert DIRECTIONS not in certified["verbatim"]
    measured(made / "out", sorted(map(str, (made / "in").iterdir())))


def test_what_is_in_common_is_stored_once_and_codes_are_smaller(made: Path) -> None:
    config, with_, without = read_share_config(made / "out"), sizes(made / "out"), sizes(made / "plain")
    assert (config.coded["version"], read_share_config(made / "plain").coded["version"]) == (2, 1)
    assert with_["codes"] + with_["basis"] < 0.8 * without["codes"]
    assert with_["verbatim"] == without["verbatim"]
    assert "basis" not in without
    assert total_bytes(with_) == sum(p.stat().st_size for p in (made / "out").rglob("*") if p.is_file())
    found = groups_in(made / "out")
    assert {f"{module}:A" for module in (*MODULES, EXPERTS)} <= found.keys()  # what they have in common
    assert not any(f"{module}:B" in found for module in MODULES)  # and nothing else
    index = read_index(made / "out" / INDEX)
    named = {name for name, adapter in index.adapters.items() if DIRECTIONS in adapter.verbatim}
    assert named == set(config.adapter_names) - {"zero"}
    assert len({index.adapters[name].verbatim[DIRECTIONS] for name in named}) == 1


def test_a_reader_written_from_the_page_gets_the_same_bytes(made: Path) -> None:
    share = SHAREModel.from_pretrained(made / "out")
    read = {name: tensors for name, tensors, _ in independent_reader.read(made / "out")}
    assert list(read) == share.adapter_names
    for name, tensors in read.items():
        expected = share.reconstruct(name)
        assert tensors.keys() == expected.keys()
        for key, (_, shape, raw) in tensors.items():
            assert shape == list(expected[key].shape)
            assert raw == raw_bytes(expected[key]).tobytes(), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("options", [ON, slow({"ratio": 5.0, "directions": True})])
def test_workers_memory_and_order_of_work_change_no_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    from concurrent.futures import ProcessPoolExecutor

    sources = make_akin(tmp_path / "in", 8)
    go(sources, tmp_path / "one", **options)
    go(sources, tmp_path / "again", **options, memory="1GiB")
    settings = Settings.from_mapping({"device": "cpu", "workers": 2} | options)
    with ProcessPoolExecutor(2) as executor:
        plan = plan_for(resolve(sources), settings, tmp_path / "work")
        compress(plan, tmp_path / "two", workspace=tmp_path / "work", executor=executor)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "again") == tree_digest(tmp_path / "two")


def test_nothing_in_common_gives_no_directions_and_the_same_codes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sources = [str(write_adapter(tmp_path / f"in{i}", akin_tensors(rng, MODULES, own=1e4))) for i in range(8)]
    go(sources, tmp_path / "on", **ON)
    go(sources, tmp_path / "off", **OFF)
    assert groups_in(tmp_path / "on") == {}
    assert codes(tmp_path / "on") == codes(tmp_path / "off")
    assert "basis" not in sizes(tmp_path / "on")
    assert read_share_config(tmp_path / "on").coded["version"] == 1
    packs = [{p.name for p in (tmp_path / name / "packs").iterdir()} for name in ("on", "off")]
    assert packs[0] == packs[1]
    assert go(sources, tmp_path / "on", **ON).method == "current"
    more = str(write_adapter(tmp_path / "more", akin_tensors(rng, MODULES)))
    assert add(tmp_path / "on", resolve([more]), RunOptions()).method == "projection"
    measured(tmp_path / "on", [*sources, more])
    assert remove(tmp_path / "on", ["in0"], RunOptions()).in_bases == ()  # nothing holds a trace of it
    assert (ours_of(tmp_path / "on") or {})["projected"] == ["more"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"ratio": 5.0}, slow({"max_bytes": 8000})])
def test_a_limit_on_bytes_gives_less_error_with_directions(tmp_path: Path, limit: dict[str, Any]) -> None:
    sources = make_akin(tmp_path / "in", 12)
    go(sources, tmp_path / "on", **limit, directions=True)
    go(sources, tmp_path / "off", **limit)
    on, off = (read_share_config(tmp_path / name).ours for name in ("on", "off"))
    most = limit.get("max_bytes", on["bytes"]["originals"] / 5)
    for ours, name in ((on, "on"), (off, "off")):
        assert 0.9 * most < total_bytes(ours["bytes"]) <= most
        assert total_bytes(ours["bytes"]) == sum(p.stat().st_size for p in (tmp_path / name).rglob("*") if p.is_file())
    assert on["errors"]["mean"] < 0.8 * off["errors"]["mean"]
    measured(tmp_path / "on", sources)
    assert go(sources, tmp_path / "on", **limit, directions=True).method == "current"


def test_bad_ones_are_left_out_and_fitted_to_none(tmp_path: Path) -> None:
    sources = make_akin(tmp_path / "in", 6)
    bad = load_tensors(sources[3])
    bad[factor_keys("layers.0.q")[0]][0, 0] = np.nan
    write_adapter(Path(sources[3]), bad, r=4, lora_alpha=8)
    with pytest.raises(CollectionError, match="a03"):
        go(sources, tmp_path / "out", **ON)
    assert [e.adapter for e in go(sources, tmp_path / "out", **ON, on_error="skip").skipped] == ["a03"]
    rest = [s for s in sources if not s.endswith("a03")]
    go(rest, tmp_path / "rest", **ON)
    assert codes(tmp_path / "out") == codes(tmp_path / "rest")
    measured(tmp_path / "out", rest)


def test_the_precision_of_each_adapter_and_rank_comes_back(made: Path) -> None:
    share = SHAREModel.from_pretrained(made / "out")
    assert {t.dtype for t in share.reconstruct("half").values()} == {torch.bfloat16}
    a, _ = factor_keys("layers.0.q")
    assert [len(share.reconstruct(name)[a]) for name in ("rank2", "a00", "rank8")] == [2, 4, 8]
    zero = share.reconstruct("zero")
    assert all(np.array_equal(zero[k].numpy(), t) for k, t in load_tensors(made / "in" / "zero").items())


def test_all_that_a_coded_checkpoint_may_hold(tmp_path: Path) -> None:
    """Tiny and huge adapters, of rank 1 and above d, of scale 0 in a module, in all dtypes."""
    sources = mixed_collection(tmp_path / "in")
    go(sources, tmp_path / "out", **ON)
    measured(tmp_path / "out", sources)
    share = SHAREModel.from_pretrained(tmp_path / "out")
    read = {name: tensors for name, tensors, _ in independent_reader.read(tmp_path / "out")}
    for name in share.adapter_names:
        back = share.reconstruct(name)
        assert all(raw == raw_bytes(back[key]).tobytes() for key, (_, _, raw) in read[name].items()), name
        assert share.certified(name)["relative_error"] <= LIMIT


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Factors], Shared]:
    """An adapter and directions, of its modules or of others, some of which it has in common with them."""
    seed, shared, adapter = draw(st.integers(0, 1 << 30)), {}, {}
    for i in range(draw(st.integers(1, 3))):
        r, experts, dims = draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 3])), draw(st.tuples(*2 * [WIDTHS]))
        found = factors([seed, i], r, *dims, draw(st.sampled_from([2.0, -0.5, 1e-9])), experts)
        for side, d in zip("BA", dims, strict=True):
            k = draw(st.integers(0, min(d, 9)))
            one = basis(k, d, seed + i)
            near = np.random.default_rng([seed, i]).standard_normal((experts * r, k)) @ one.vectors
            if side == "A" and draw(st.booleans()):
                found = Factors(near + 0.1 * found.a / d**0.5, found.b, found.scale, experts)
            if k and draw(st.booleans()):
                shared[f"m{i}:{side}"] = one if draw(st.booleans()) else basis(1, d + 1, seed)
        adapter[f"m{i}"] = found
    return adapter, shared


WIDTHS = st.integers(1, 40)


@given(cases(), st.sampled_from([0.02, 0.1, 0.5]), st.sampled_from(["F32", "BF16"]))
def test_any_adapter_on_any_directions_is_as_its_certificate_says(
    case: tuple[dict[str, Factors], Shared], limit: float, dtype: str
) -> None:
    adapter, shared = case
    alone, truth = subject_of(adapter, dtype)
    subject = Subject.of(alone.modules, alone.batches, from_bytes(as_bytes(shared), 1 << 30))
    coded = subject.within(limit)
    if coded is None:
        assert dtype == "BF16"
        return
    assert certificate(coded) <= limit
    back = {m.name: (a, b) for m, a, b in decoded(coded.code, subject.modules, shared)}
    error = sum(np.sum((t.delta - Factors(*back[n], t.scale, t.experts).delta) ** 2) for n, t in truth.items())
    norm = sum(np.sum(t.delta**2) for t in truth.values())
    assert np.sqrt(error / norm) == pytest.approx(certificate(coded), abs=1e-6)
    tensors = independent_reader.factors(coded.code, [list(m) for m in subject.modules], as_bytes(shared))
    for m in subject.modules:
        for key, array in zip(factor_keys(m.name), back[m.name], strict=True):
            values = torch.from_numpy(np.array(array)).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
            assert tensors[key][2] == raw_bytes(values).tobytes()


# -- what shows it -----------------------------------------------------------------------------------------------------


def test_what_is_said_of_it(made: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["info", str(made / "out"), "--json"]) == 0
    told, ours = json.loads(capsys.readouterr().out), read_share_config(made / "out").ours
    assert told["bytes"] == ours["bytes"]
    assert told["coded"]["version"] == 2
    assert main(["info", str(made / "out")]) == 0
    text = capsys.readouterr().out
    assert "on directions that they share" in text
    assert "  basis " in text
    assert "loadings" not in text
    assert main(["report", str(made / "out"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert f"{ours['errors']['max']:.4f}" in page
    assert "each adapter is coded on directions that they share" in page
    assert "loadings" not in re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)
    assert main(["info", str(made / "plain")]) == 0
    assert "directions" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_line_does_all_of_it(tmp_path: Path, capsys: Capture) -> None:
    sources, out, fresh = make_akin(tmp_path / "in", 6), tmp_path / "out", tmp_path / "fresh"
    limit, plan, quiet = ["--max-error", "0.1", "--directions"], str(tmp_path / "plan.json"), ["-q", "--device", "cpu"]
    assert main(["plan", *sources[:5], *limit, "-o", plan]) == 0
    assert "note: what directions save is not forecast" in capsys.readouterr().out
    assert main(["compress", "--plan", plan, "-o", str(out), "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["compress", *sources[:5], "-o", str(tmp_path / "two"), *limit, *quiet]) == 0
    assert tree_digest(tmp_path / "two") == tree_digest(out)
    assert main(["add", str(out), sources[5], *quiet]) == 0
    assert main(["verify", str(out), "--sources", str(tmp_path / "in"), "--json"]) == 0
    told = capsys.readouterr().out
    assert all(v["problem"] is None for v in json.loads(told[told.index("{") :])["adapters"])
    assert (ours_of(out) or {})["projected"] == ["a05"]
    assert main(["remove", str(out), "a00", *quiet]) == 0
    assert main(["info", str(out)]) == 0
    told = capsys.readouterr().out
    assert "directions were fitted to a00 too, and still contain their trace; lorashare-stream refit" in told
    assert "1, on directions not fitted to them: a05" in told
    assert "1, still in the directions (remove --refit frees them, with the workspace): a00" in told
    assert main(["refit", str(out), "-o", str(out), *quiet]) == 0
    assert fitted_to_all(out)
    assert main(["compress", *sources[1:], "-o", str(fresh), *limit, *quiet]) == 0
    assert tree_digest(out) == tree_digest(fresh)
    assert main(["refit", str(out), "-o", str(out), "--no-directions", *quiet]) == 0
    assert "basis" not in sizes(out)
    assert main(["refit", str(out), "-o", str(out), "--directions", *quiet]) == 0
    assert tree_digest(out) == tree_digest(fresh)


def test_directions_without_a_limit_are_an_error_of_usage(tmp_path: Path, capsys: Capture) -> None:
    sources = make_akin(tmp_path / "in", 3)
    for more in ([], ["-k", "3"]):
        assert main(["compress", *sources, "-o", str(tmp_path / "out"), "--directions", *more]) == 2
        assert "directions belong to a coded checkpoint" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Give max_error, ratio or max_bytes"):
        Settings(directions=True)
    go(sources, tmp_path / "share", num_components=2)
    with pytest.raises(UsageError, match="directions belong to a coded checkpoint"):
        refit(tmp_path / "share", {"directions": True}, tmp_path / "share", RunOptions())
    assert not (tmp_path / "out").exists()


# -- more, fewer, other ------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("workspace", [True, False])
def test_one_that_is_added_is_coded_on_the_directions_that_are_there(
    tmp_path: Path, workspace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorashare_stream")
    sources, out = make_akin(tmp_path / "in", 8), tmp_path / "out"
    go(sources[:6], out, **ON)
    before, there, on = nodes(out), codes(out), groups_in(out)
    go(sources[6:], tmp_path / "others", **OFF)
    if not workspace:
        alone(out)
    for i in (6, 7):
        assert add(out, resolve([sources[i]]), RunOptions()).method == "projection"
    assert "directions are not fitted to 1 adapter" in caplog.text
    assert before.items() <= nodes(out).items()
    assert codes(out).items() >= there.items()
    assert {g: b.numbers.tolist() for g, b in groups_in(out).items()} == {g: b.numbers.tolist() for g, b in on.items()}
    index, others = read_index(out / INDEX), read_index(tmp_path / "others" / INDEX)
    assert len({adapter.verbatim[DIRECTIONS] for adapter in index.adapters.values()}) == 1  # stored once
    assert all(index.adapters[n].code.nbytes < 0.75 * others.adapters[n].code.nbytes for n in ("a06", "a07"))
    assert (ours_of(out) or {})["projected"] == ["a06", "a07"]
    measured(out, sources)
    assert add(out, resolve(sources[6:]), RunOptions()).method == "current"
    if not workspace:
        with pytest.raises(WorkspaceError, match="only the workspace knows"):
            refit(out, {}, out, RunOptions())
        return
    assert refit(out, {}, out, RunOptions()) == "recompute"
    go(sources, tmp_path / "fresh", **ON)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")
    assert refit(out, {}, out, RunOptions()) == "current"


def test_compress_with_more_grows_and_add_with_refit_fits_anew(tmp_path: Path) -> None:
    sources, out = make_akin(tmp_path / "in", 6), tmp_path / "out"
    go(sources[:4], out, **ON)
    assert go(sources[:5], out, **ON).method == "projection"
    assert (ours_of(out) or {})["projected"] == ["a04"]
    assert go(sources[:5], out, **ON).method == "current"
    assert add(out, resolve(sources[5:]), RunOptions(), refit=True).method == "recompute"
    go(sources, tmp_path / "fresh", **ON)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


def test_an_adapter_of_another_width_has_no_directions_where_its_columns_are_others(tmp_path: Path) -> None:
    sources, out = make_akin(tmp_path / "in", 6), tmp_path / "out"
    go(sources, out, **ON)
    alone(out)
    rng = np.random.default_rng(5)
    wide = {"layers.0.q": (56, 24), "layers.0.v": (40, 12), "layers.9.new": (40, 24)}
    other = str(write_adapter(tmp_path / "other", akin_tensors(rng, wide)))
    assert add(out, resolve([other]), RunOptions()).method == "projection"
    adapter = read_index(out / INDEX).adapters["other"]
    assert {row[0] for row in adapter.layout} == set(wide)
    measured(out, [*sources, other])


@pytest.mark.few(2)
@pytest.mark.parametrize("workspace", [True, False])
def test_one_that_is_removed_is_named_until_directions_are_fitted_anew(tmp_path: Path, workspace: bool) -> None:
    sources, out = make_akin(tmp_path / "in", 6), tmp_path / "out"
    go(sources[:5], out, **ON)
    there = codes(out)
    add(out, resolve(sources[5:]), RunOptions())
    if not workspace:
        alone(out)
    done = remove(out, ["a05"], RunOptions())
    assert (done.names, done.in_bases) == (("a05",), ())  # nothing of it has gone into directions
    assert b"a05" not in said(out)
    done = remove(out, ["a02"], RunOptions())
    assert (done.names, done.in_bases) == (("a02",), ("a02",))
    assert codes(out) == {name: code for name, code in there.items() if name != "a02"}
    assert (ours_of(out) or {})["removed"] == ["a02"]
    rest = [s for s in sources[:5] if not s.endswith("a02")]
    measured(out, rest)
    if not workspace:
        return
    work = Workspace(default_workspace(out))
    assert work.markers == {}
    assert not list(work.root.rglob(f"{SHARED}*"))
    assert go(rest, out, **ON).method == "current"
    assert refit(out, {}, out, RunOptions()) == "recompute"
    go(rest, tmp_path / "rest", **ON)
    assert tree_digest(out) == tree_digest(tmp_path / "rest")
    assert fitted_to_all(out)


def test_one_that_was_changed_without_its_workspace_goes_back_to_it(tmp_path: Path) -> None:
    sources, out, other = make_akin(tmp_path / "in", 6), tmp_path / "out", tmp_path / "other"
    go(sources, out, **ON)
    own = RunOptions(workspace=default_workspace(out))
    assert refit(default_workspace(out), {}, other, RunOptions()) == "recompute"
    assert remove(other, ["a02"], RunOptions()).in_moments is None  # beside it lies no workspace
    with pytest.raises(WorkspaceError, match=r"the checkpoint has not.*a02"):
        refit(other, {}, other, own)
    assert remove(other, ["a02"], own).in_bases == ("a02",)
    assert refit(other, {}, other, own) == "recompute"
    rest = [s for s in sources if not s.endswith("a02")]
    go(rest, tmp_path / "rest", **ON)
    assert tree_digest(other) == tree_digest(tmp_path / "rest")
    strange = make_akin(tmp_path / "strange", 6, seed=9)
    go(strange, tmp_path / "s", **ON)
    with pytest.raises(WorkspaceError, match="not the one that the checkpoint was made with"):  # other adapters
        remove(other, ["a03"], RunOptions(workspace=default_workspace(tmp_path / "s")))


def test_one_that_is_removed_and_added_and_removed_again_is_still_named(tmp_path: Path) -> None:
    sources, out = make_akin(tmp_path / "in", 6), tmp_path / "out"
    go(sources, out, **ON)
    remove(out, ["a02"], RunOptions())
    add(out, resolve(sources[2:3]), RunOptions())
    measured(out, sources)
    assert remove(out, ["a02"], RunOptions()).in_bases == ("a02",)


def test_removing_with_refit_fits_anew(tmp_path: Path, capsys: Capture) -> None:
    sources, out = make_akin(tmp_path / "in", 6), tmp_path / "out"
    go(sources, out, **ON)
    assert main(["remove", str(out), "a02", "--refit", "-q", "--device", "cpu"]) == 0
    go([s for s in sources if not s.endswith("a02")], tmp_path / "rest", **ON)
    assert tree_digest(out) == tree_digest(tmp_path / "rest")


OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what is asked for, and what the checkpoint then is
    (ON, ON), ({"max_error": 0.2}, {**ON, "max_error": 0.2}), ({"num_components": 3}, {"num_components": 3}),
    ({"max_error": 0.2}, {"max_error": 0.2}), ({"directions": True}, {**ON, "max_error": 0.2}),
    ({"ratio": 4.0}, {"ratio": 4.0, "directions": True}), ({"directions": False}, {"ratio": 4.0}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("some", [OTHERS[:3], slow(OTHERS)])
def test_another_limit_and_another_form_are_made_from_the_sources(tmp_path: Path, some: Any) -> None:
    sources, out = make_akin(tmp_path / "in", 5), tmp_path / "out"
    go(sources, out, num_components=3)
    for i, (change, whole) in enumerate(some):
        assert refit(out, change, out, RunOptions()) == "recompute", change
        go(sources, tmp_path / f"fresh{i}", **whole)
        assert tree_digest(out) == tree_digest(tmp_path / f"fresh{i}"), change
        assert refit(out, change, out, RunOptions()) == refit(out, {}, out, RunOptions()) == "current"
        assert go(sources, out, **whole).method == "current"
    assert refit(tmp_path / "fresh0", {}, tmp_path / "other", RunOptions()) == "recompute"
    assert tree_digest(tmp_path / "other") == tree_digest(tmp_path / "fresh0")


@pytest.mark.slow
@pytest.mark.parametrize("removed", [slow(False), True])
def test_a_limit_on_bytes_that_is_exceeded_fits_and_codes_all_again(tmp_path: Path, removed: bool) -> None:
    sources, out = make_akin(tmp_path / "in", 6, WIDE), tmp_path / "out"
    go(sources[:4], tmp_path / "size", ratio=5, directions=True)
    limit = total_bytes(sizes(tmp_path / "size")) + 100
    go(sources[:4], out, max_bytes=limit, directions=True)
    if removed:
        remove(out, ["a00"], RunOptions())
    assert add(out, resolve(sources[4:]), RunOptions()).method == "recompute"
    assert 0.94 * limit < total_bytes(sizes(out)) <= limit
    assert fitted_to_all(out)
    measured(out, sources[removed:])
    go(sources[removed:], tmp_path / "fresh", max_bytes=limit, directions=True)
    assert codes(out) == codes(tmp_path / "fresh")


# -- damage, and lies --------------------------------------------------------------------------------------------------


def at_directions(out: Path) -> tuple[Path, int, int]:
    """The pack of the directions, where they lie in it, and how many bytes they are."""
    index = read_index(out / INDEX)
    digest = next(a.verbatim[DIRECTIONS] for a in index.adapters.values() if DIRECTIONS in a.verbatim)
    at = index.tensors[digest].at
    return out / at.pack.file, at.offset, at.nbytes


def test_a_flipped_bit_of_the_directions_is_told_by_all_readers(made: Path, out: Path, capsys: Capture) -> None:
    pack, at, count = at_directions(out)
    data = bytearray(pack.read_bytes())
    data[at + count // 2] ^= 4
    pack.write_bytes(data)
    share = SHAREModel.from_pretrained(out)
    with pytest.raises(CheckpointError, match=rf"'a00'.*{DIRECTIONS}.*damaged"):
        share.reconstruct("a00")
    share.reconstruct("zero")  # which is on none
    assert main(["verify", str(out), "--sources", str(made / "in"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["damaged"] == [f"packs/{pack.name} is damaged"]
    assert {v["name"] for v in told["adapters"] if v["problem"]} == set(share.adapter_names) - {"zero"}
    assert all(DIRECTIONS in v["problem"] for v in told["adapters"] if v["problem"])
    with pytest.raises(CheckpointError, match="damaged"):
        remove(out, ["a01"], RunOptions())


def test_what_needs_sources_that_are_gone_names_them(tmp_path: Path, capsys: Capture) -> None:
    sources, out = make_akin(tmp_path / "in", 5), tmp_path / "out"
    go(sources, out, **ON)
    shutil.rmtree(sources[1])
    assert main(["remove", str(out), "a00", "--refit", "-q", "--device", "cpu"]) == 1
    assert "Restore the sources of a01" in capsys.readouterr().err
    assert (ours_of(out) or {})["removed"] == ["a00"]
    with pytest.raises(CollectionError, match="a01"):
        refit(out, {}, out, RunOptions())
    share = SHAREModel.from_pretrained(out)
    assert share.adapter_names == ["a01", "a02", "a03", "a04"]
    share.reconstruct("a01")
    alone(out)
    with pytest.raises(WorkspaceError, match="no workspace"):
        remove(out, ["a02"], RunOptions(), refit=True)
    assert remove(out, ["a02"], RunOptions()).in_bases == ("a00", "a02")


@pytest.mark.few(3)
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_directions_that_are_damaged_are_fitted_again(tmp_path: Path, damage: str) -> None:
    sources, out = make_akin(tmp_path / "in", 6), tmp_path / "out"
    go(sources, out, **ON)
    before = tree_digest(out)
    pack, at, _ = at_directions(out)
    data = bytearray(pack.read_bytes())
    pack.unlink()
    if damage == "cut":
        pack.write_bytes(data[: at + 1])
    elif damage == "flipped":
        data[at] ^= 1
        pack.write_bytes(data)
    if damage == "flipped":  # which is seen when it is read
        assert go(sources, out, **ON).method == "current"
        assert refit(out, {"max_error": 0.2}, out, RunOptions()) == "recompute"
        assert refit(out, OFF, out, RunOptions()) == "recompute"
    else:
        assert go(sources, out, **ON).method == "recompute"
    assert tree_digest(out) == before


@pytest.mark.parametrize("shapes", [{}, {"m:A": (1, 1)}, {"m:A": (3, 40), "m:B": (1, 24), "a\u00e9:A": (48, 64)}])
def test_directions_come_back(shapes: dict[str, tuple[int, int]]) -> None:
    given = {group: basis(k, d) for group, (k, d) in shapes.items()}
    stored = as_bytes(given)
    back = from_bytes(stored, sum(k * d for k, d in shapes.values()))
    assert back.keys() == given.keys()
    for group, one in given.items():
        assert np.array_equal(back[group].numbers, one.numbers)
        assert np.array_equal(back[group].offsets, one.offsets)
        k, d = shapes[group]
        near = one.numbers * unit(d)
        assert np.abs(near @ near.T - np.eye(k)).max() < 0.5
    assert as_bytes(back) == stored


def lying(facts: Any, words: bytes = bytes(64)) -> bytes:
    header = zlib.compress(facts if isinstance(facts, bytes) else json.dumps(facts).encode())
    return struct.pack("<I", len(header)) + header + words


LIES = {
    "too many numbers": lying({"m:A": [1 << 20, [[0, 0]] * 3000]}),
    "a class out of range": lying({"m:A": [4, [[0, HIGHEST + 1]]]}),
    "an offset out of range": lying({"m:A": [4, [[-1000, 0]]]}),
    "more directions than numbers": lying({"m:A": [1, [[0, 0]] * 5000]}),
    "no numbers": lying({"m:A": [0, []]}),
    "no table": lying([1, 2]),
    "no JSON": lying(b"\xff{"),
    "no zlib": struct.pack("<I", 8) + bytes(100),
    "a header that is cut": lying({"m:A": [4, [[0, 0]]]})[:12],
    "half a length": b"\x01\x02",
    "half a word": lying({"m:A": [4, [[0, 0]]]}, bytes(7)),
    "words that no encoder writes": lying({"m:A": [4, [[0, 0]] * 4]}, b"\xff" * 16),
}


@pytest.mark.parametrize("lie", LIES)
def test_stored_directions_that_lie_are_an_error(lie: str) -> None:
    with pytest.raises(CheckpointError, match="directions of a checkpoint are none") as caught:
        from_bytes(LIES[lie], 1 << 30)
    assert "\n" not in str(caught.value)


def test_a_lie_in_a_whole_checkpoint_is_an_error_of_the_checkpoint(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorashare_stream.stages import encode as encoding

    sources, real = make_akin(tmp_path / "in", 6), as_bytes
    monkeypatch.setattr("lorashare_stream.stages.directions.as_bytes", lambda _: LIES["too many numbers"])
    given = real({"layers.0.q:A": basis(2, 40)})
    monkeypatch.setattr(encoding, "directions_at", lambda _: from_bytes(given, 1 << 30))
    monkeypatch.setattr(coding, "directions_at", lambda _: from_bytes(given, 1 << 30))
    monkeypatch.setattr("lorashare_stream.stages.directions._pay", lambda *_: True)
    go(sources, tmp_path / "out", **ON)
    with pytest.raises(CheckpointError, match="directions of a checkpoint are none"):
        SHAREModel.from_pretrained(tmp_path / "out").reconstruct("a00")


def test_directions_of_a_foreign_version_are_refused(out: Path) -> None:
    path = out / "share_config.json"
    config = json.loads(path.read_text())
    config["coded"]["version"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of another version"):
        SHAREModel.from_pretrained(out)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_it_is_pushed_and_read_from_the_hub(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, repo = SHAREModel.from_pretrained(out), "alice/kin"
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home", ALICE)
        push(out, repo, token=ALICE)
        text = hub.files(repo)["README.md"].decode()
        assert "coded checkpoint" in text
        assert "basis" in text
        share = SHAREModel.from_pretrained(repo)
        for name in local.adapter_names:
            one, other = share.reconstruct(name), local.reconstruct(name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[k], other[k]) for k in one)
            hub.requests.clear()
        share.reconstruct("a00")
        assert len([r for r in hub.requests if r.kind == "resolve"]) <= 1  # directions are read once
        share.save_pretrained(tmp_path / "saved")
        assert push(tmp_path / "saved", repo).files == 0


def kin_of_llama(root: Path, n: int = 6) -> list[str]:
    """Adapters of a small LLaMA with an initial lora_A in common."""
    modules = {
        f"model.layers.{i}.self_attn.{m}": (32, d) for i in range(2) for m, d in (("q_proj", 32), ("v_proj", 16))
    }
    rng, folders = np.random.default_rng(0), []
    for i in range(n):
        tensors = {k: 0.3 * t for k, t in akin_tensors(rng, modules, QV["r"]).items()}
        folders.append(str(write_adapter(root / f"a{i}", tensors, **QV)))
    return folders


def test_peft_attach_and_uniform_adapters_answer_alike(tmp_path: Path) -> None:
    sources, out = kin_of_llama(tmp_path / "in"), tmp_path / "out"
    go(sources, out, **ON)
    assert groups_in(out)
    share, ids = SHAREModel.from_pretrained(out), torch.arange(1, 9)[None]
    answers: dict[str, torch.Tensor] = {}

    def answered(form: str, name: str) -> torch.Tensor:
        logits: torch.Tensor = PeftModel.from_pretrained(llama(), tmp_path / form / name)(ids).logits
        return logits

    with torch.no_grad():
        for name in share.adapter_names:
            share.reconstruct(name, tmp_path / "back" / name)
            share.reconstruct(name, tmp_path / "uniform" / name, uniform=True)
            answers[name], same, original = (answered(form, name) for form in ("back", "uniform", "in"))
            assert torch.allclose(answers[name], same, atol=1e-4)
            assert (answers[name] - original).norm() < 0.3 * (original - llama()(ids).logits).norm()
        model, names = share.attach(llama()), share.adapter_names
        logits = model(ids.repeat(len(names), 1), adapter_names=names).logits
    for name, row in zip(names, logits, strict=True):
        assert torch.allclose(row, answers[name][0], atol=1e-4)
