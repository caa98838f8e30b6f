"""Storage in int8 with a scale for each column: what it loses, what it takes, who reads it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lorashare
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from lorashare_stream.adapters.dtypes import as_stored, narrowed, stacked, stored_bytes, stored_shape, widened
from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.refit import refit
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import CheckpointError, UsageError
from lorashare_stream.hub.push import push
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import factor_keys, load_tensors, make_collection, tree_digest, write_adapter
from .fakehub import ALICE, FakeHub, patched
from .oracle import delta, groups
from .oracle import stacked as columns_of
from .test_budgets import disk_bytes
from .test_push import REPO
from .tiers import slow

Compress = Callable[..., Path]
WIDE = {f"layers.{i}.{name}": (96, d) for i in range(2) for name, d in (("q", 96), ("v", 48))}
values = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


def error_of(share: SHAREModel, folder: str | Path, scale: float = 2.0) -> float:
    """The relative dW error of one adapter: of float64 products of what `reconstruct` gives."""
    original = load_tensors(folder)
    found = {k: v.double().numpy() for k, v in share.reconstruct(Path(folder).name).items()}
    modules = {m for m, _ in groups([original])}
    lost = sum(np.sum((delta(original, m, scale) - delta(found, m, scale)) ** 2) for m in modules)
    return float(np.sqrt(lost / sum(np.sum(delta(original, m, scale) ** 2) for m in modules)))


def problems(share: SHAREModel, sources: Any) -> list[str | None]:
    return [v.problem for v in verify(share, originals_of(share, resolve(sources)))]


@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)), elements=values))
def test_a_value_is_off_by_half_a_scale_at_most_and_rounded_once(stack: np.ndarray) -> None:
    stored = narrowed(stack, "I8")
    m, rows, columns = stack.shape
    assert stored.dtype == np.int8
    assert stored.shape == (m, *stored_shape((rows, columns), "I8"))
    assert stored[0].nbytes == stored_bytes(rows, columns, "I8")
    back = as_stored(stack, "I8")
    assert back.dtype == np.float32
    assert back.shape == stack.shape
    # A scale is a bfloat16 near the 127th part of the peak of its column; smaller than normal numbers it never is.
    peaks = np.abs(stack).max(axis=1, keepdims=True).astype(np.float64)
    scales = np.maximum(peaks / 127 * (1 + 2.0**-8), 2.0**-126)
    assert (np.abs(stack.astype(np.float64) - back) <= scales / 2 * (1 + 1e-6)).all()
    assert np.array_equal(narrowed(back, "I8"), stored)
    raw, size = stored.reshape(-1).view(np.uint8), stored[0].nbytes
    assert np.array_equal(stacked(raw, [i * size for i in range(m)], "I8", stored.shape[1:]), back)


@given(arrays(np.float32, (7, 5), elements=values), st.integers(0, 7), st.integers(1, 5))
def test_first_rows_and_first_columns_are_those_of_what_is_stored(matrix: np.ndarray, rows: int, columns: int) -> None:
    stored, back = narrowed(matrix, "I8"), as_stored(matrix, "I8")
    some = np.ascontiguousarray(stored[: rows + 2, :columns])
    assert np.array_equal(widened(some.reshape(-1).view(np.uint8), "I8", some.shape), back[:rows, :columns])


def test_columns_of_any_strength_keep_their_digits() -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 4)) * [1e-30, 1e-3, 1.0, 1e30]
    off = np.linalg.norm(as_stored(matrix, "I8") - matrix, axis=0) / np.linalg.norm(matrix, axis=0)
    assert (off < 0.01).all()


@pytest.mark.parametrize("objective", ["delta", "factors"])
def test_what_is_certified_and_explained_is_what_the_stored_files_give(
    tmp_path: Path, compressed: Compress, objective: str
) -> None:
    folders = make_collection(tmp_path / "adapters", 20, WIDE)
    share = SHAREModel.from_pretrained(compressed(folders, num_components=6, objective=objective, dtype="int8"))
    assert share.config.ours["dtype"] == "I8"
    assert all(v.dtype == torch.float32 for v in share.components.values())
    adapters = [load_tensors(f) for f in folders]
    explained = share.config.compression_stats["per_layer_explained_variance"]
    for module, side in groups(adapters):
        x = columns_of(adapters, [2.0] * 20, module, side, objective)
        v = share.components[f"{module}:{side}"].double().numpy()
        assert v.shape == (len(x), 6)
        assert np.abs(v.T @ v - np.eye(6)).max() < 0.03
        left = np.sum((x - v @ (v.T @ x)) ** 2) / np.sum(x**2)
        assert explained[f"{module}:{side}"] == pytest.approx(1 - left, abs=1e-6)
    for name, folder in zip(share.adapter_names, folders, strict=True):
        assert {t.dtype for t in share.reconstruct(name).values()} == {torch.float32}
        assert share.certified(name)["relative_error"] == pytest.approx(error_of(share, folder), abs=1e-6)
        for group, loading in share.all_loadings[name].items():
            assert loading.dtype == torch.float32
            assert loading.shape == (6, 4)
            assert share.components[group].shape[1] == 6
    assert problems(share, folders) == [None] * 20


def test_it_takes_a_quarter_of_float32_and_a_little_error(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "adapters", 20, {"q": (768, 768)}, r=8)
    found = {}
    for dtype in ("float32", "int8"):
        out = compressed(folders, dtype, num_components=32, dtype=dtype)
        config = SHAREModel.from_pretrained(out).config
        raw = sum(p.stat().st_size - header_bytes(p) for p in out.rglob("*.safetensors") if p.stem in STORED)
        found[dtype] = raw, config.ours["errors"]["mean"]
        assert sum(config.ours["bytes"][p] for p in ("basis", "loadings", "verbatim", "metadata")) == disk_bytes(out)
    assert found["int8"][0] < 0.27 * found["float32"][0]
    assert found["int8"][1] ** 2 < found["float32"][1] ** 2 + 0.03**2


STORED = ("shared_components", "loadings")


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("ratio", [8, slow(16)])
def test_at_the_bytes_of_bfloat16_the_error_of_real_adapters_is_less(
    real: Path, compressed: Compress, record_property: Callable[[str, object], None], ratio: int
) -> None:
    found = {}
    for dtype in ("bfloat16", "int8"):
        out = compressed([real / "minilm"], dtype, ratio=ratio, dtype=dtype)
        share = SHAREModel.from_pretrained(out)
        assert disk_bytes(out) <= share.config.ours["bytes"]["originals"] / ratio
        assert set(problems(share, [real / "minilm"])) == {None}
        found[dtype] = share.config.ours["errors"]["mean"]
    record_property("told", ", ".join(f"{dtype} {error:.4f}" for dtype, error in found.items()))
    assert found["int8"] < 0.95 * found["bfloat16"]


def planted(folder: Path, n: int, d: int, latent: int) -> list[str]:
    """Adapters of a common subspace, and eight that share nothing with any; of ranks that differ, as training gives."""
    rng = np.random.default_rng(5)
    shared = {key: np.linalg.qr(rng.standard_normal((d, latent)))[0] for m in "qv" for key in factor_keys(m)}
    folders = []
    for i in range(n + 8):
        tensors = {}
        for key, basis in shared.items():
            vectors = basis @ rng.standard_normal((latent, 4)) if i < n else rng.standard_normal((len(basis), 4))
            tensors[key] = np.ascontiguousarray(vectors.T if "lora_A" in key else vectors, np.float32)
        folders.append(str(write_adapter(folder / f"a{i:02}", tensors, r=4, lora_alpha=8)))
    return folders


@pytest.mark.slow
def test_a_limit_on_errors_holds_and_own_factors_are_floats(tmp_path: Path, compressed: Compress) -> None:
    folders = planted(tmp_path / "adapters", 72, 64, 20)
    out = compressed(folders, max_error=0.05, dtype="int8")
    share = SHAREModel.from_pretrained(out)
    for folder in folders:
        certified = share.certified(Path(folder).name)
        assert certified["relative_error"] == pytest.approx(error_of(share, folder), abs=1e-6)
        assert certified["relative_error"] <= 0.05
    assert not share.config.ours["verbatim_adapters"]
    assert problems(share, folders) == [None] * 80
    heads, own = share.all_classifier_heads["a72"], share.certified("a72")["own"]
    keys = [key for module in own for key in factor_keys(module)]
    assert keys
    assert {heads[key].dtype for key in keys} == {torch.bfloat16}
    assert share.certified("a72")["kept_bytes"] == sum(heads[key].nbytes for key in keys)
    assert disk_bytes(out) < disk_bytes(compressed(folders, "halves", max_error=0.05, dtype="bfloat16"))


@pytest.mark.parametrize("asked", [{"ratio": 4}, {"max_bytes": 300_000}])
def test_budgets_of_bytes_count_one_a_number_and_the_scales(
    tmp_path: Path, compressed: Compress, asked: dict[str, Any]
) -> None:
    folders = planted(tmp_path / "adapters", 24, 384, 80)
    found = {}
    for dtype in ("float32", "int8"):
        out = compressed(folders, dtype, dtype=dtype, **asked)
        share = SHAREModel.from_pretrained(out)
        limit = asked.get("max_bytes") or share.config.ours["bytes"]["originals"] / asked["ratio"]
        assert 0.9 * limit < disk_bytes(out) <= limit
        assert problems(share, folders) == [None] * 32
        found[dtype] = share.config.ours["errors"]["mean"]
    assert found["int8"] < 0.9 * found["float32"]


@pytest.mark.parametrize("asked", [{"num_components": 6}, {"ratio": 1.5}])
def test_an_adapter_without_any_dw_is_stored_as_others_are(
    tmp_path: Path, compressed: Compress, asked: dict[str, Any]
) -> None:
    folders = make_collection(tmp_path / "adapters", 16, WIDE)
    zero = {key: t * ("lora_A" in key) for key, t in load_tensors(folders[0]).items()}
    folders.append(str(write_adapter(tmp_path / "zero", zero)))
    out = compressed(folders, dtype="int8", **asked)
    share = SHAREModel.from_pretrained(out)
    assert share.all_loadings["zero"] or share.certified("zero")["own"]  # as a budget has it, but not verbatim
    found = share.reconstruct("zero")
    assert not any(t.any() for key, t in found.items() if "lora_B" in key)
    assert problems(share, folders) == [None] * 17


def test_the_plan_says_what_it_takes(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "adapters", 8)
    plan = plan_for(resolve(folders), Settings(num_components=6, dtype="int8"))
    out = compressed(folders, num_components=6, dtype="int8")
    raw = {
        "basis": [out / "shared_components.safetensors"],
        "loadings": list((out / "adapters").glob("*/loadings.safetensors")),
    }
    for part, paths in raw.items():
        # A group has one tensor of loadings in every adapter, and so as many rows of scales.
        assert plan.sizes[part] == sum(p.stat().st_size - header_bytes(p) for p in paths)


def test_auto_never_chooses_it(compressed: Compress, collection: list[str]) -> None:
    assert SHAREModel.from_pretrained(compressed(collection)).config.ours["dtype"] == "F32"
    with pytest.raises(UsageError, match="int8"):
        Settings(dtype="int4")  # type: ignore[arg-type]


def test_lorashare_raises_whatever_the_shapes(tmp_path: Path, compressed: Compress) -> None:
    for k in (1, 2, 3, 8):
        folders = make_collection(tmp_path / f"adapters{k}", 4, {"q": (12, 12)})
        theirs = lorashare.SHAREModel.from_pretrained(compressed(folders, f"k{k}", num_components=k, dtype="int8"))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            theirs.reconstruct(theirs.adapter_names[0])


def test_what_lorashare_saves_of_it_again_is_read(tmp_path: Path, compressed: Compress, collection: list[str]) -> None:
    out = compressed(collection, num_components=5, dtype="int8")
    lorashare.SHAREModel.from_pretrained(out).save_pretrained(tmp_path / "again")
    ours, again = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(tmp_path / "again")
    for name in ours.adapter_names:
        a, b = ours.reconstruct(name), again.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("file", ["shared_components.safetensors", "adapters/a00/loadings.safetensors"])
@pytest.mark.parametrize("shape", [(1, 5), (7,), (0, 5)])
def test_a_matrix_without_scales_is_refused(
    compressed: Compress, collection: list[str], file: str, shape: tuple[int, ...]
) -> None:
    out = compressed(collection, num_components=5, dtype="int8")
    tensors = load_file(out / file)
    save_file({key: torch.zeros(shape, dtype=torch.int8) for key in tensors}, out / file)
    with pytest.raises(CheckpointError, match="without its scales"):
        SHAREModel.from_pretrained(out).reconstruct("a00")


def raw_of(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "shared_components.safetensors") | {
        f"{name}/{key}": t for key, t in load_file(out / "adapters" / name / "loadings.safetensors").items()
    }


def test_a_smaller_k_is_cut_without_rounding_again(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "adapters", 20, WIDE)
    out, small = compressed(folders, num_components=12, dtype="int8"), tmp_path / "small"
    assert refit(out, {"num_components": 5}, small, RunOptions()) == "sliced"
    whole, cut = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(small)
    for name, folder in zip(cut.adapter_names, folders, strict=True):
        before, after = raw_of(out, name), raw_of(small, name)
        assert before.keys() == after.keys()
        for key, tensor in after.items():
            assert tensor.dtype == torch.int8
            assert torch.equal(tensor, before[key][:, :5] if key in whole.components else before[key][:7])
            if key in whole.components:
                assert torch.equal(cut.components[key], whole.components[key][:, :5])
        assert cut.certified(name)["relative_error"] == pytest.approx(error_of(cut, folder), abs=5e-3)
    assert problems(cut, folders) == [None] * 20
    assert refit(small, {"num_components": 9}, small, RunOptions(workspace=default_workspace(out))) == "recompute"
    assert problems(SHAREModel.from_pretrained(small), folders) == [None] * 20


@pytest.mark.parametrize(
    ("asked", "workspace"),
    [
        ({"num_components": 6}, True),
        ({"num_components": 6}, False),
        ({"ratio": 1.5}, True),
        ({"max_error": 0.3}, True),
        ({"max_error": 0.3}, False),
    ],
)
def test_adapters_come_and_go(tmp_path: Path, compressed: Compress, asked: dict[str, Any], workspace: bool) -> None:
    folders = make_collection(tmp_path / "adapters", 16, WIDE)
    out = compressed(folders[:14], dtype="int8", **asked)
    if not workspace:
        shutil.rmtree(default_workspace(out))
    before = raw_of(out, "a00")
    done = add(out, resolve(folders[14:]), RunOptions(accept=0.5))
    share = SHAREModel.from_pretrained(out)
    assert share.adapter_names == [Path(f).name for f in folders]
    assert share.config.ours["dtype"] == "I8"
    assert problems(share, folders) == [None] * 16
    if done.method == "projection":
        assert all(torch.equal(tensor, before[key]) for key, tensor in raw_of(out, "a00").items())
    remove(out, ["a03"], RunOptions())
    assert problems(SHAREModel.from_pretrained(out), folders) == [None] * 15
    if workspace:
        remove(out, [], RunOptions(), refit=True)
        assert problems(SHAREModel.from_pretrained(out), folders) == [None] * 15


class Kill(BaseException):
    """A stop at any point, as a signal brings it."""


def test_interrupted_anywhere_it_comes_to_the_same_bytes(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "adapters", 6)

    def run(place: Path, stop: int | None = None) -> None:
        counter = itertools.count()

        def stopping(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
            for result in results:
                if next(counter) == stop:
                    raise Kill
                yield result

        settings = Settings.from_mapping({"device": "cpu", "dtype": "int8", "ratio": 1.1})
        plan = plan_for(resolve(folders), settings, default_workspace(place))
        compress(plan, place, executor=SerialExecutor(), progress=stopping)

    run(tmp_path / "whole" / "out")
    out = tmp_path / "cut" / "out"
    stops = 0
    for stop in range(2, 20, 3):
        with suppress(Kill):
            run(out, stop)
            break
        stops += 1
    run(out)
    assert stops > 2
    assert tree_digest(out) == tree_digest(tmp_path / "whole" / "out")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the client, of its own PUT
def test_it_is_pushed_as_it_is(
    tmp_path: Path, compressed: Compress, collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = compressed(collection, num_components=5, dtype="int8")
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home", ALICE)
        push(out, REPO)
        files = hub.files(REPO)
        for path in out.rglob("*.safetensors"):
            assert files[str(path.relative_to(out))] == path.read_bytes()
        assert b"With [lorashare-stream]" in files["README.md"]
        assert b"With [lorashare](" not in files["README.md"]
        ours, theirs = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(REPO)
        a, b = ours.reconstruct("a03"), theirs.reconstruct("a03")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_commands_say_it(tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compress", *collection, "-o", str(out), "-k", "6", "--dtype", "int8", "-q"]) == 0
    assert main(["info", str(out)]) == 0
    assert main(["verify", str(out), "--sources", *collection]) == 0
    assert main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    assert "I8" in (tmp_path / "page.html").read_text()
    assert main(["reconstruct", str(out), "--adapter", "a00", "-o", str(tmp_path / "a00")]) == 0
    assert load_tensors(tmp_path / "a00").keys() == load_tensors(collection[0]).keys()
    capsys.readouterr()
