"""The laws of coded checkpoints: what comes back, how many bytes it takes, and what may change none of them."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorashare_stream.adapters.adapter import Adapter
from lorashare_stream.adapters.folder import digest_files
from lorashare_stream.checkpoint import packs
from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.checkpoint.format import INDEX
from lorashare_stream.checkpoint.index import CodedAdapter, Index, Location, read_index, write_index
from lorashare_stream.checkpoint.location import Folder
from lorashare_stream.cli.app import main
from lorashare_stream.codec.code import Subject
from lorashare_stream.errors import BudgetError, CheckpointError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.catalog import make_plan
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings
from lorashare_stream.stages import coding
from lorashare_stream.stages.encode import encode_adapter, subject_of
from lorashare_stream.stages.job import Admitted
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import factor_keys, load_tensors, make_collection, make_tensors, tree_digest, write_adapter
from .oracle import delta

Compress = Callable[..., Path]
MODULES = {"layers.0.q": (96, 64), "layers.0.v": (96, 32), "layers.1.q": (96, 64)}
ZERO = "bhaveshasasik-generative_AI_model--gpt-lora"  # a gpt2 adapter whose every B is zero
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_collection(tmp_path_factory.mktemp("many"), 12, MODULES)


@pytest.fixture(scope="module")
def coded_once(tmp_path_factory: pytest.TempPathFactory, many: list[str]) -> Path:
    return made(tmp_path_factory.mktemp("once"), many, max_error=0.2)


def made(root: Path, sources: object, executor: Executor | None = None, **options: object) -> Path:
    plan = plan_for(resolve(sources), Settings.from_mapping({"device": "cpu"} | options), root / "out.workspace")
    compress(plan, root / "out", executor=executor)
    return root / "out"


def index_at(out: Path) -> Index:
    return read_index(out / INDEX)


def size_of(out: Path) -> int:
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


def code_of(out: Path, name: str) -> bytes:
    adapter = index_at(out).adapters[name]
    return packs.read_code(Folder(out).read, adapter)


def measured(original: Path, written: Path, scale: float) -> float:
    """||dW - dW^|| / ||dW|| of two adapter folders, each dW formed."""
    before, after = ({k: t.double().numpy() for k, t in load_file(f / WEIGHTS).items()} for f in (original, written))
    error = norm = 0.0
    for key in before:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            one, other = delta(before, module, scale), delta(after, module, scale)
            error, norm = error + np.sum((one - other) ** 2), norm + np.sum(one**2)
    return float(np.sqrt(error / norm))


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_adapter_that_is_written_is_as_far_off_as_its_certificate_says(
    tmp_path: Path, compressed: Compress, dtype: torch.dtype
) -> None:
    folders = [Path(f) for f in make_collection(tmp_path / "in", 4, MODULES)]
    for folder in folders:
        save_file({k: t.to(dtype) for k, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    for limit in (0.02, 0.3):
        share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], f"out{limit}", max_error=limit))
        for folder in folders:
            share.reconstruct(folder.name, output_dir=tmp_path / f"rec{limit}" / folder.name)
            certified = share.certified(folder.name)["relative_error"]
            assert 0.9 * limit < certified <= limit
            assert measured(folder, tmp_path / f"rec{limit}" / folder.name, 2.0) == pytest.approx(certified, abs=1e-6)
            written, original = (load_file(f / WEIGHTS) for f in (tmp_path / f"rec{limit}" / folder.name, folder))
            assert {k: (t.dtype, t.shape) for k, t in written.items()} == {
                k: (t.dtype, t.shape) for k, t in original.items()
            }
            head = "base_model.model.head.weight"
            assert torch.equal(written[head], original[head])


@pytest.mark.parametrize(("limit", "dtype"), [(1e-9, torch.float32), (1e-4, torch.bfloat16)])
def test_a_limit_that_no_code_meets_keeps_the_tensors(
    tmp_path: Path, compressed: Compress, limit: float, dtype: torch.dtype
) -> None:
    for folder in make_collection(tmp_path / "in", 2, MODULES):
        path = Path(folder) / WEIGHTS
        save_file({k: t.to(dtype) for k, t in load_file(path).items()}, path)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], max_error=limit))
    for name in ("a00", "a01"):
        original = load_file(tmp_path / "in" / name / WEIGHTS)
        assert share.certified(name)["relative_error"] == 0
        assert sorted(share.certified(name)["verbatim"]) == sorted(original)
        assert all(torch.equal(t, original[k]) for k, t in share.reconstruct(name).items())


def test_a_code_that_is_not_smaller_than_its_tensors_is_not_made(tmp_path: Path, compressed: Compress) -> None:
    tensors = {key: np.full((1, 1), 0.7, np.float32) for key in factor_keys("q")}
    write_adapter(tmp_path / "in" / "tiny", tensors, r=1)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], max_error=0.1))
    assert len(share.certified("tiny")["verbatim"]) == 2
    assert share.certified("tiny")["relative_error"] == 0


def test_an_adapter_beyond_float16_is_kept_by_any_limit(tmp_path: Path, compressed: Compress) -> None:
    a, b = np.zeros((2, 6400), np.float16), np.zeros((8, 2), np.float16)
    a[0], b[3, 0] = 6e4, 6e4
    write_adapter(tmp_path / "in" / "wide", dict(zip(factor_keys("q"), (a, b), strict=True)), r=2)
    make_collection(tmp_path / "in", 3, {"v": (640, 320)})
    for options in ({"max_error": 0.2}, {"ratio": 2.5}):
        share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], f"out{[*options]}", **options))
        assert np.array_equal(share.reconstruct("wide")[factor_keys("q")[0]].numpy(), a)
        assert not share.certified("a00")["verbatim"][1:]


def test_modules_with_scale_0_stay_byte_for_byte_beside_coded_ones(tmp_path: Path, compressed: Compress) -> None:
    """And a negative scale is a scale."""
    (folder,) = make_collection(tmp_path / "in", 1, MODULES)
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    for pattern in ({"layers.0.v": 0}, {"layers.0.v": 0, "layers.1.q": -3}):
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": pattern}))
        out = compressed([tmp_path / "in"], f"out{len(pattern)}", max_error=0.2)
        share, original = SHAREModel.from_pretrained(out), load_tensors(folder)
        back, kept = share.reconstruct("a00"), share.certified("a00")["verbatim"]
        assert sorted(kept) == sorted([*factor_keys("layers.0.v"), "base_model.model.head.weight"])
        assert all(np.array_equal(back[k].numpy(), original[k]) for k in kept)
        scales = {"layers.0.q": 2.0, "layers.1.q": pattern.get("layers.1.q", 8) / 4}
        pairs = [
            (delta(t, m, s)) for t in (original, {k: v.numpy() for k, v in back.items()}) for m, s in scales.items()
        ]
        error = np.sqrt(
            sum(np.sum((pairs[i] - pairs[i + 2]) ** 2) for i in (0, 1)) / sum(np.sum(p**2) for p in pairs[:2])
        )
        assert error == pytest.approx(share.certified("a00")["relative_error"], abs=1e-6)
        assert 0.15 < error <= 0.2


def test_alpha_0_leaves_nothing_to_code(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 2, MODULES)
    config = json.loads((Path(folders[0]) / "adapter_config.json").read_text())
    (Path(folders[0]) / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], max_error=0.2))
    original = load_tensors(folders[0])
    assert all(np.array_equal(t.numpy(), original[k]) for k, t in share.reconstruct("a00").items())
    assert share.certified("a00")["relative_error"] == 0
    assert share.certified("a01")["relative_error"] > 0.15


def test_an_adapter_without_dw_keeps_its_factors(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 6, MODULES)
    zero = {k: 0 * t if "lora_B" in k else t for k, t in load_tensors(folders[0]).items()}
    before = size_of(compressed([tmp_path / "in"], "before", max_error=0.2))
    write_adapter(tmp_path / "in" / "zero", zero, r=4, lora_alpha=8)
    out = compressed([tmp_path / "in"], "after", max_error=0.2)
    assert code_of(out, "zero") == b""
    assert size_of(out) - before < sum(t.nbytes for t in zero.values()) + 1000
    share = SHAREModel.from_pretrained(out)
    assert share.certified("zero")["relative_error"] == 0
    back = share.reconstruct("zero")
    assert all(back[k].numpy().tobytes() == zero[k].tobytes() for k in zero)
    assert main(["verify", str(out)]) == 0


# -- bytes -----------------------------------------------------------------------------------------------------------


def real_adapters(folder: Path) -> list[Adapter]:
    return [a for one in sorted(folder.iterdir()) for a in make_plan(resolve([str(one)]), Settings()).adapters]


def norm_of(adapter: Adapter) -> float:
    """||dW||."""
    with adapter.open() as tensors:
        return subject_of(adapter, tensors).norm


def bound(subject: Subject, error: float) -> float:
    """The bytes that Gaussian coefficients take at least: sum d / 2 log2(var / D) (Cover & Thomas, 10.3.3)."""
    sides = [
        (np.square(p.values / subject.norm), d) for p in subject.pairs for d in (p.left.shape[2], p.right.shape[2])
    ]
    energy = np.concatenate([e.ravel() for e, _ in sides])
    d = np.concatenate([np.full(e.size, d) for e, d in sides])
    low, high = -80.0, 0.0
    for _ in range(60):
        level = (low + high) / 2
        low, high = (low, level) if np.minimum(energy, d * 2.0**level).sum() > error**2 else (level, high)
    return float((d / 2 * np.maximum(0, np.log2(np.maximum(energy / d, 1e-300)) - low)).sum() / 8)


@pytest.mark.parametrize("name", ["minilm", "distilbert", "gpt2", "spectra"])
def test_codes_of_real_adapters_are_near_the_gaussian_bound(real: Path, name: str, record_property: Any) -> None:
    found: dict[float, list[float]] = {}
    for adapter in real_adapters(real / name)[:: 3 if name == "minilm" else 2]:
        with adapter.open() as tensors:
            subject = subject_of(adapter, tensors)
        for limit in (0.05, 0.1, 0.25, 0.5) if subject.norm else ():
            coded = subject.within(limit)
            assert coded is not None
            errors = coded.errors.values()
            error = float(np.sqrt(sum(e.error for e in errors) / sum(e.norm for e in errors)))
            assert 0.97 * limit < error <= limit
            found.setdefault(limit, []).append(len(coded.code) / bound(subject, error))
    record_property("told", {limit: round(max(ratios), 3) for limit, ratios in found.items()})
    assert max(max(ratios) for ratios in found.values()) <= 1.18


BYTES = [
    ("minilm", {"ratio": 10}),
    ("minilm", {"ratio": 40}),
    ("gpt2", {"max_bytes": 900_000}),
    ("gpt2", {"ratio": 60}),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "options"), BYTES)
def test_a_limit_on_bytes_is_met_and_used(
    real: Path, compressed: Compress, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    times: Counter[str] = Counter()

    def counted(job: Any, task: Admitted) -> Any:
        times[task.name] += 1
        return encode_adapter(job, task)

    monkeypatch.setattr(coding, "encode_adapter", counted)
    out = compressed([adapter.folder for adapter in real_adapters(real / name) if norm_of(adapter)], **options)
    config = read_share_config(out)
    limit = options.get("max_bytes") or config.ours["bytes"]["originals"] // options["ratio"]
    assert 0.97 * limit <= size_of(out) <= limit
    assert set(times) == set(config.adapter_names)
    assert max(times.values()) <= 2


def test_bytes_that_cannot_be_had_are_refused_with_the_fewest_that_can(
    tmp_path: Path, compressed: Compress, many: list[str]
) -> None:
    originals = sum((Path(f) / WEIGHTS).stat().st_size for f in many)
    found = []
    for size, problem in ((2500, "take more than the checkpoint may have"), (4300, "leave nothing of the adapters")):
        with pytest.raises(BudgetError, match=problem) as caught:
            compressed(many, max_bytes=size)
        found.append(int(caught.value.remedy.split()[2]))
        assert not (tmp_path / "out").exists()
        assert size < found[-1] < originals / 6
    for name, fewest in zip(("early", "late"), found, strict=True):  # what they name can be had
        out = compressed(many, name, max_bytes=fewest)
        assert size_of(out) <= fewest
        assert SHAREModel.from_pretrained(out).config.ours["errors"]["mean"] < 0.9
    with pytest.raises(BudgetError, match="leave nothing"):
        compressed(many, "other", max_bytes=int(0.8 * found[1]))


def test_tensors_that_all_have_count_once_in_a_limit_on_bytes(tmp_path: Path, compressed: Compress) -> None:
    shared = np.random.default_rng(9).standard_normal((300, 50)).astype(np.float32)  # 60 KB, which planes make 0.85 of
    folders = make_collection(tmp_path / "in", 12, MODULES)
    for folder in map(Path, folders):
        write_adapter(folder, {**load_tensors(folder), "base_model.model.embed.weight": shared}, r=4, lora_alpha=8)
    limit = 75_000  # of 12 copies it is a tenth
    assert 0.94 * limit <= size_of(compressed(folders, max_bytes=limit)) <= limit


def test_with_bytes_to_spare_the_finest_step_or_the_tensors_are_taken(many: list[str], compressed: Compress) -> None:
    share = SHAREModel.from_pretrained(compressed(many, ratio=1))
    assert share.config.ours["errors"]["max"] < 1e-4


# -- what changes no byte --------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4),
    st.sampled_from(["512MiB", "8GiB"]),
    st.sampled_from([SerialExecutor(), ThreadPoolExecutor(3)]),
    st.sampled_from([{"max_error": 0.2}, {"ratio": 6.0}]),
)
@settings(max_examples=4)
def test_memory_workers_and_executor_change_no_byte(
    many: list[str], tmp_path_factory: pytest.TempPathFactory, workers: int, memory: str, executor: Executor,
    limit: dict[str, float],
) -> None:  # fmt: skip
    base = tmp_path_factory.getbasetemp()
    reference = base / f"reference-{next(iter(limit))}"
    if not (reference / "out").exists():
        made(reference, many, **limit)
    shutil.rmtree(base / "bytes", ignore_errors=True)
    found = made(base / "bytes", many, executor, workers=workers, memory=memory, **limit)
    assert tree_digest(found) == tree_digest(reference / "out")


def test_neither_the_order_of_sources_nor_their_company_changes_a_code(
    tmp_path: Path, compressed: Compress, many: list[str], coded_once: Path
) -> None:
    shuffled = random.Random(0).sample(many, len(many))
    for name, sources in (("order", shuffled), ("alone", many[3:4]), ("few", many[2:7])):
        out = compressed(sources, name, max_error=0.2)
        for folder in sources:
            assert code_of(out, Path(folder).name) == code_of(coded_once, Path(folder).name)


def test_two_halves_are_the_whole(tmp_path: Path, compressed: Compress, many: list[str], coded_once: Path) -> None:
    compressed(many[:5], "grown", max_error=0.2)
    first = tree_digest(tmp_path / "grown")
    out = compressed(many, "grown", max_error=0.2)
    grown, whole = index_at(out), index_at(coded_once)
    assert len(grown.packs) == 2
    assert tree_digest(out)[grown.packs[0].file] == first[grown.packs[0].file]
    assert list(grown.adapters) == list(whole.adapters)
    one, other = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(coded_once)
    for name in grown.adapters:
        assert code_of(out, name) == code_of(coded_once, name)
        assert grown.adapters[name].record == whole.adapters[name].record
        a, b = one.reconstruct(name), other.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_equal_adapters_have_equal_codes(tmp_path: Path, compressed: Compress, many: list[str]) -> None:
    shutil.copytree(many[0], tmp_path / "in" / "one")
    shutil.copytree(many[0], tmp_path / "in" / "two")
    out = compressed([tmp_path / "in"], max_error=0.2)
    assert code_of(out, "one") == code_of(out, "two")
    assert len(index_at(out).tensors) == 1  # one head


def test_the_gauge_of_an_adapter_changes_its_bytes_by_less_than_1_percent(tmp_path: Path, compressed: Compress) -> None:
    rng, shapes = np.random.default_rng(0), {f"m{i}": (256, 192) for i in range(4)}
    plain = make_tensors(rng, shapes, 8)
    turned = dict(plain)
    for module in shapes:
        a, b = factor_keys(module)
        t = np.linalg.qr(rng.standard_normal((8, 8)))[0] * rng.uniform(0.1, 10, 8)
        turned[a] = np.ascontiguousarray(t @ plain[a] * 4, np.float32)
        turned[b] = np.ascontiguousarray(plain[b] @ np.linalg.inv(t), np.float32)
    write_adapter(tmp_path / "in" / "plain", plain, r=8, lora_alpha=16)
    write_adapter(tmp_path / "in" / "turned", turned, r=8, lora_alpha=4)
    out = compressed([tmp_path / "in"], max_error=0.1)
    codes = [code_of(out, name) for name in ("plain", "turned")]
    assert len(codes[0]) > 2000
    assert abs(len(codes[0]) - len(codes[1])) <= 0.01 * len(codes[0])
    errors = [SHAREModel.from_pretrained(out).certified(name)["relative_error"] for name in ("plain", "turned")]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def coded(tmp_path: Path, coded_once: Path) -> Path:
    """A checkpoint to be damaged; its workspace stays where it was."""
    return Path(shutil.copytree(coded_once, tmp_path / "out"))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 16
    path.write_bytes(raw)


def test_a_flipped_bit_in_a_code_is_found_named_and_alone(coded: Path, many: list[str]) -> None:
    adapter = index_at(coded).adapters["a03"]
    flip(coded / adapter.code.pack.file, adapter.code.offset + adapter.code.nbytes // 2)
    share = SHAREModel.from_pretrained(coded)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        share.reconstruct("a03")
    assert caught.value.adapter == "a03"
    verdicts = {v.name: v.problem for v in verify(share, originals_of(share, resolve(many)))}
    assert {name for name, problem in verdicts.items() if problem} == {"a03"}
    assert "damaged" in str(verdicts["a03"])


def test_a_flipped_bit_in_a_head_is_found_and_named(coded: Path, many: list[str]) -> None:
    index = index_at(coded)
    (digest,) = index.adapters["a05"].verbatim.values()
    flip(coded / index.tensors[digest].at.pack.file, index.tensors[digest].at.offset + 3)
    share = SHAREModel.from_pretrained(coded)
    with pytest.raises(CheckpointError, match=r"head\.weight") as caught:
        share.reconstruct("a05")
    assert caught.value.adapter == "a05"
    verdicts = {v.name: v.problem for v in verify(share, originals_of(share, resolve(many)))}
    assert {name for name, problem in verdicts.items() if problem} == {"a05"}


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_the_index_is_an_error_at_open(
    coded: Path, capsys: pytest.CaptureFixture[str], part: float
) -> None:
    flip(coded / INDEX, int(part * (coded / INDEX).stat().st_size))
    with pytest.raises(CheckpointError, match=INDEX):
        SHAREModel.from_pretrained(coded)
    assert main(["verify", str(coded)]) == 1
    assert INDEX in capsys.readouterr().err


def test_a_pack_that_is_cut_short_gives_what_is_left(coded: Path) -> None:
    index = index_at(coded)
    adapter = index.adapters["a06"]
    path = coded / adapter.code.pack.file
    path.write_bytes(path.read_bytes()[: adapter.code.offset + 5])
    share = SHAREModel.from_pretrained(coded)
    with pytest.raises(CheckpointError, match="cut short"):
        share.reconstruct("a06")
    assert packs.read_code(Folder(coded).read, index.adapters["a02"])


def lying(coded: Path, change: Callable[[CodedAdapter], CodedAdapter], code: bytes | None = None) -> SHAREModel:
    """The checkpoint, with another code and index of a00 whose digests are right."""
    index = index_at(coded)
    pack, adapter = index.packs[0], index.adapters["a00"]
    if code is not None:
        whole = bytearray((coded / pack.file).read_bytes())
        at = adapter.code
        whole[at.offset : at.offset + at.nbytes] = code.ljust(at.nbytes, b"\0")[: at.nbytes]
        (coded / pack.file).unlink()
        (coded / "packs" / "new").write_bytes(whole)
        new = pack._replace(sha256=digest_files([coded / "packs" / "new"]))
        (coded / "packs" / "new").rename(coded / new.file)

        def moved(at: Location) -> Location:
            return replace(at, pack=new, digest=packs._digest_of_code(whole[at.offset : at.offset + at.nbytes]))

        adapters = {n: replace(a, code=moved(a.code)) for n, a in index.adapters.items()}
        tensors = {d: replace(t, at=replace(t.at, pack=new)) for d, t in index.tensors.items()}
        index = Index((new, *index.packs[1:]), adapters, tensors)
    adapters = {n: change(a) if n == "a00" else a for n, a in index.adapters.items()}
    write_index(coded / INDEX, Index(index.packs, adapters, index.tensors))
    config = json.loads((coded / "share_config.json").read_text())
    config["coded"]["index"] = digest_files([coded / INDEX])
    (coded / "share_config.json").write_text(json.dumps(config))
    return SHAREModel.from_pretrained(coded)


@given(st.integers(0, 1 << 30), st.sampled_from(["random", "flipped", "cut", "step"]))
@settings(max_examples=20)
def test_a_code_that_lies_gives_numbers_or_an_error(
    coded_once: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str
) -> None:
    rng, root = np.random.default_rng(seed), tmp_path_factory.getbasetemp() / "lies"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(coded_once, root)
    code = bytearray(code_of(root, "a00"))
    if kind == "flipped":
        code[int(rng.integers(8, len(code)))] ^= 1 << int(rng.integers(8))
    changed = {
        "random": bytes(code[:8]) + rng.bytes(len(code) - 8), "flipped": bytes(code),
        "cut": bytes(code[: 8 + 4 * int(rng.integers(len(code) // 4 - 2))]),
        "step": rng.bytes(8) + bytes(code[8:]),
    }[kind]  # fmt: skip
    share = lying(root, lambda adapter: adapter, changed)
    shapes = {k: t.shape for k, t in SHAREModel.from_pretrained(coded_once).reconstruct("a00").items()}
    try:
        found = share.reconstruct("a00")
    except CheckpointError as e:
        assert e.adapter == "a00"  # noqa: PT017
    else:
        assert {k: t.shape for k, t in found.items()} == shapes
    assert share.reconstruct("a01")


LAYOUTS: Mapping[str, Callable[[list[Any]], list[Any]]] = {
    "more memory than there is": lambda row: [row[0], 4096, 1 << 30, 1 << 30, *row[4:]],
    "experts without number": lambda row: [row[0], 1 << 33, 1, 1, row[4], 1 << 33, *row[6:]],
    "no dtype": lambda row: [*row[:6], "U8", "F32"],
    "a scale of no number": lambda row: [*row[:4], float("nan"), *row[5:]],
    "a rank of none": lambda row: [row[0], 0, *row[2:]],
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_lies_is_an_error(coded: Path, case: str) -> None:
    share = lying(coded, lambda a: replace(a, layout=[LAYOUTS[case](row) for row in a.layout]))
    with pytest.raises(CheckpointError, match="layout") as caught:
        share.reconstruct("a00")
    assert caught.value.adapter == "a00"
    assert share.reconstruct("a01")


def test_a_layout_of_other_shapes_gives_numbers_of_these_or_an_error(coded: Path) -> None:
    share = lying(
        coded, lambda a: replace(a, layout=[[*row[:2], row[2] // 2, row[3] * 3, *row[4:]] for row in a.layout])
    )
    try:
        found = share.reconstruct("a00")
    except CheckpointError as e:
        assert e.adapter == "a00"  # noqa: PT017
    else:
        assert found[factor_keys("layers.0.q")[0]].shape == (4, 3 * 96)
