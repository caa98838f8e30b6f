"""Bad input: named at once by `plan`, before heavy work; what only values show, by ingest, before a moment."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lorashare_stream.adapters import config as peftconfig
from lorashare_stream.errors import AdapterError, BudgetError, CollectionError, MissingFileError, UsageError
from lorashare_stream.files import tree_bytes
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import CONFIG, factor_keys, load_tensors, make_collection, tree_digest

Compress = Callable[..., Path]
A, B = factor_keys("layers.0.q")
WEIGHTS = "adapter_model.safetensors"


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 10)


def lie(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[A]["shape"] = [8, 40]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def configured(**change: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(CONFIG | change)) and None


def tensor(key: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda t: t | {key: np.ones(shape, np.float32)})


def half_a_character(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].replace(b"layers.0.q", b"layers.\\ud800.q")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def pickled_without_data(folder: Path) -> None:
    tensors = {k: torch.from_numpy(v) for k, v in load_tensors(folder).items()}
    (folder / WEIGHTS).unlink()
    head = torch.ones(1).expand(3, 1 << 42)
    torch.save(tensors | {"base_model.model.head.weight": head}, folder / "adapter_model.bin")


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated file": (truncate, [WEIGHTS, "cut short", "found", "expected"]),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS, "cut short"]),
    "header that lies": (lie, [A, "disagree", "F32"]),
    "empty tensors": (tensor(A, 0, 40), [A, "ZeRO-3", "[0, 40]", "Gather"]),
    "empty tensors without a shape": (tensor(A, 0), ["empty tensor", "ZeRO-3", "[0]", "Gather"]),
    "flattened tensors": (tensor(A, 160), ["flattened", "FSDP", "[160]", "Gather"]),
    "kernels of a merged linear": (tensor(B, 24, 4, 1), ["MergedLinear", "[24, 4, 1]", "[4, 40]", "Convert it"]),
    "dimensions that differ": (tensor(A, 4, 5, 3), ["different numbers of dimensions", "[4, 5, 3]"]),
    "no tensor": (lambda f: save_file({}, f / WEIGHTS), ["no LoRA tensors", "no tensors", "ZeRO-3 or FSDP", "gather"]),
    "a key that JSON escapes to half a character": (half_a_character, ["unprintable"]),
    "a pickle whose shape is larger than its storage": (pickled_without_data, ["larger than its storage"]),
    "duplicate keys after normalising": (
        lambda f: rewritten(f, lambda t: t | {"module." + A: t[A]}),
        [A, "two keys mean the same tensor"],
    ),
    "several adapters in one file": (
        lambda f: rewritten(
            f, lambda t: {k.replace("_A.", f"_A.{n}.").replace("_B.", f"_B.{n}."): t[k] for k in t for n in "xy"}
        ),
        ["several adapters in one file", "x", "y", "Save each"],
    ),
    "shapes of another base model": (
        lambda f: rewritten(f, lambda t: {k: np.repeat(v, 2, 1) if "lora_A" in k else v for k, v in t.items()}),
        [A, "in 3 of 3 modules", "d_in = 80", "d_in = 40", "code each adapter alone"],
    ),
    "ranks that differ": (tensor(A, 5, 40), [B, "differ in rank", "[24, 4]", "rank 5"]),
    "rank unlike the configuration": (configured(r=8), [A, "disagree on the rank", "r = 8"]),
    "missing configuration": (lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json", WEIGHTS]),
    "configuration is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ["not valid JSON"]),
    "configuration is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), ["not an object", "list"]),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), ["no weights", "adapter_model.bin"]),
    "other base model": (configured(base_model_name_or_path="other"), ["base model", "other", "tiny-base"]),
    "no LoRA at all": (
        lambda f: rewritten(f, lambda t: {"base_model.model.head.weight": np.ones((2, 2), np.float32)}),
        ["no LoRA tensors"],
    ),
    "kohya keys": (
        lambda f: rewritten(f, lambda t: {"lora_unet_x.lora_up.weight": np.ones((2, 2), np.float32)}),
        ["kohya"],
    ),
    "a shard that is missing": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {A: "model-1-of-2.safetensors"}})
            ),
        ),
        ["shard is missing", "model-1-of-2.safetensors"],
    ),
    "a weight_map that leaves the folder": (
        lambda f: (
            (f / WEIGHTS).rename(f.parent / "secret.safetensors"),
            (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {A: "../secret.safetensors"}})),
        ),
        ["leaves the adapter's folder", "../secret.safetensors"],
    ),
    "a weight_map that is none": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [1]})),
        ),
        ["no usable weight_map"],
    ),
    **{
        f"{left} instead of weights": (
            lambda f, left=left: ((f / WEIGHTS).unlink(), (f / left).mkdir()), ["shards of ZeRO-3 or FSDP: gather"]
        )
        for left in ("zero_to_fp32.py", "global_step100", "pytorch_model_fsdp_0", "__0_0.distcp")
    },
    "the name of a copy": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model (1).safetensors"),
        ["adapter_model (1).safetensors", f"rename it to {WEIGHTS}"],
    ),
    "a merged linear": (
        configured(enable_lora=[True, False, True]), ["MergedLinear", "enable_lora", "PEFT release that made it"]
    ),
    **{
        f"{key} {str(value)[:12]}": (configured(**{key: value, **more}), [])  # numbers that no arithmetic survives
        for key, value, more in [
            ("lora_alpha", 10**400, {}), ("lora_alpha", 1e200, {}), ("lora_alpha", "8", {}), ("r", 4.0, {}),
            *[("alpha_pattern", {"q": value}, {}) for value in (10**400, float("nan"), float("inf"))],
            ("rank_pattern", {"q": float("nan")}, {}), ("rank_pattern", {"q": True}, {}),
            ("rank_pattern", {"q": 0}, {"target_parameters": ["x"]}), ("peft_type", ["\x1b[2J"] * 1000, {}),
        ]
    },
    **{
        f"method {kind.value}": (
            configured(peft_type=kind.value),
            [
                f"peft_type is '{kind.value}'",
                "save_as_lora" if kind.value in peftconfig._CONVERTIBLE else "PEFT cannot convert it",
            ],
        )
        for kind in sorted(set(peft.PeftType) - {peft.PeftType.LORA}, key=str)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a case -> the folder of an adapter that was good."""
    (good,) = make_collection(tmp_path_factory.mktemp("good"), 1)
    root, folders = tmp_path_factory.mktemp("bad"), {}
    for i, (name, (spoil, _)) in enumerate(BAD.items()):
        folders[name] = Path(shutil.copytree(good, root / f"bad{i}"))
        spoil(folders[name])
    return folders


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, bad: dict[str, Path]) -> dict[str, AdapterError]:
    """Name of a folder -> why it is refused, of a plan of all of them and of eight good ones."""
    good = make_collection(tmp_path_factory.mktemp("adapters"))
    return {str(e.adapter): e for e in plan_for(resolve([*good, *bad.values()]), Settings()).refused}


@pytest.mark.parametrize("name", BAD)
def test_what_headers_show_is_named_by_the_plan(
    bad: dict[str, Path], refused: dict[str, AdapterError], name: str
) -> None:
    text = str(refused[bad[name].name])
    assert f"'{bad[name].name}'" in text
    assert all(part in text for part in BAD[name][1]), text
    assert text.replace("\n", "").isprintable()
    assert len(text) < 3000


def test_everything_that_is_wrong_is_named_at_once_before_any_work(
    tmp_path: Path, collection: list[str], compressed: Compress, bad: dict[str, Path]
) -> None:
    with pytest.raises(CollectionError, match=f"{len(BAD)} of {len(BAD) + 8}") as caught:
        compressed([*bad.values(), *collection])
    assert sorted(str(p.adapter) for p in caught.value.problems) == sorted(f.name for f in bad.values())
    assert not (tmp_path / "out.workspace").exists()


def test_skipping_goes_on_without_them_and_lists_them(
    tmp_path: Path, collection: list[str], compressed: Compress, bad: dict[str, Path], refused: dict[str, AdapterError]
) -> None:
    out = compressed([*bad.values(), *collection], num_components=4, on_error="skip")
    assert SHAREModel.from_pretrained(out).adapter_names == [f"a{i:02}" for i in range(8)]
    for path in (out / "skipped.json", tmp_path / "out.workspace" / "skipped.json"):
        listed = {entry["adapter"]: entry["reason"] for entry in json.loads(path.read_text())}
        assert listed.keys() == {folder.name for folder in bad.values()}
        assert all(part in listed[bad[name].name] for name, (_, parts) in BAD.items() for part in parts)
    clean = tree_digest(compressed(collection, "clean", num_components=4))
    assert clean["shared_components.safetensors"] == tree_digest(out)["shared_components.safetensors"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [A, B])
def test_values_that_are_not_finite_never_touch_a_moment(
    tmp_path: Path, collection: list[str], compressed: Compress, key: str, value: float
) -> None:
    good = compressed([c for c in collection if not c.endswith("a05")], "good", num_components=4)

    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors[key][1, 2] = value
        return tensors

    rewritten(Path(collection[5]), spoil)
    with pytest.raises(CollectionError, match=r"'a05'.*not finite.*at \[1, 2\], 1 in all") as caught:
        compressed(collection, num_components=4)
    assert caught.value.problems[0].key == key
    journal = (tmp_path / "out.workspace" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 7  # nothing that was read is lost
    out = compressed(collection, num_components=4, on_error="skip", workspace=tmp_path / "out.workspace")
    assert tree_digest(out)["shared_components.safetensors"] == tree_digest(good)["shared_components.safetensors"]


def test_a_float64_beyond_float32_is_not_finite(tmp_path: Path, collection: list[str], compressed: Compress) -> None:
    rewritten(Path(collection[0]), lambda t: t | {A: t[A].astype(np.float64) * 1e200})
    with pytest.raises(CollectionError, match="not finite in float32"):
        compressed(collection)


def test_values_that_are_not_finite_in_what_is_verbatim_are_kept_and_noted(
    collection: list[str], compressed: Compress
) -> None:
    head = "base_model.model.head.weight"
    rewritten(Path(collection[0]), lambda t: t | {head: np.full((3, 5), -np.inf, np.float32)})
    share = SHAREModel.from_pretrained(compressed(collection, num_components=4))
    assert torch.isinf(share.reconstruct("a00")[head]).all()
    assert any("not finite" in note for note in share.certified("a00")["notes"])


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_adapters_are_an_error(collection: list[str], compressed: Compress, count: int) -> None:
    with pytest.raises(ValueError, match=r"no adapter|at least two"):
        compressed(collection[:count] or {})


def test_two_of_which_one_is_bad_are_an_error_even_when_skipping(collection: list[str], compressed: Compress) -> None:
    rewritten(Path(collection[0]), lambda t: t | {A: t[A] * np.float32("nan")})
    with pytest.raises(CollectionError, match="at least two"):
        compressed(collection[:2], on_error="skip")


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_components": 0}, "num_components"),
    ({"num_components": "many"}, "num_components"),
    ({"num_components": 2.5}, "num_components"),
    ({"num_components": True}, "num_components"),
    ({"variance_threshold": 0}, "variance_threshold"),
    ({"variance_threshold": 1.5}, "variance_threshold"),
    ({"variance_threshold": float("nan")}, "variance_threshold"),
    ({"variance_threshold": "most"}, "variance_threshold"),
    ({"objective": "best"}, "objective"),
    ({"objective": ["delta"]}, "objective"),
    ({"center": True}, "center belongs to objective 'factors'"),
    ({"center": "yes", "objective": "factors"}, "center"),
    ({"dtype": "int4"}, "dtype"),
    ({"moment_dtype": "float16"}, "moment_dtype"),
    ({"on_error": "ignore"}, "on_error"),
    ({"device": "tpu"}, "device"),
    ({"memory": "lots"}, "not a size"),
    ({"memory": -1}, "memory"),
    ({"workers": 0}, "workers"),
    ({"colour": "red"}, "unknown setting.*colour.*expected.*center"),
    ({"base_model": ""}, "base_model"),
    ({"base_model": 3}, "base_model"),
    ({"base_aliases": {"org/base": 1}}, "base_aliases cannot be .*a list"),
    ({"base_aliases": None}, "base_aliases cannot be .*a list"),
    ({"base_aliases": [None]}, "base_aliases"),
    ({"any_base": "yes"}, "any_base"),
    ({"share_initial": 1}, "share_initial"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_unknown_options_and_values_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings.from_mapping(options)


def test_settings_cannot_be_changed_and_numbers_of_numpy_become_pythons() -> None:
    settings = Settings.from_mapping({"ratio": np.float32(2.5), "memory": "4G", "base_aliases": ["a", "b"]})
    assert type(settings.ratio) is float
    assert (settings.ratio, settings.memory, settings.base_aliases) == (2.5, 4 << 30, ("a", "b"))
    assert type(Settings(ratio=20).ratio) is int  # as it was given: digests of plans have it so
    with pytest.raises(AttributeError):
        settings.ratio = 3.0  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"^workers cannot be 0 \(expected a whole number from 1\)"):
        dataclasses.replace(settings, workers=0)


def test_a_budget_that_cannot_hold_one_task_names_one_that_can(collection: list[str], compressed: Compress) -> None:
    with pytest.raises(BudgetError, match=r'found 10\.0 MiB; expected at least .*memory="\d+MiB"') as caught:
        compressed(collection, memory="10MiB")
    least = str(caught.value.remedy).split("--memory ")[1].split(" ")[0]
    compressed(collection, memory=least)


def test_a_disk_without_room_is_refused_before_work(
    collection: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lorashare_stream.stages.run.free_bytes", lambda path: (1, 1000))
    with pytest.raises(BudgetError, match=r"not enough disk.*1000 B free"):
        compressed(collection)
    assert not (tmp_path / "out.workspace").exists()


@pytest.mark.parametrize(
    ("step", "after"), [("ingest", 3), ("accumulate", 0), ("accumulate", 1), ("fit", 1), ("project", 5), ("", 0)]
)
def test_a_disk_with_room_for_a_whole_run_has_room_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    """As much as the plan asks for, nearly; at d = 512 moments are most of it."""
    modules = {f"m{i}": (512, 512) for i in range(3)}
    settings = Settings(num_components=8, device="cpu", workers=1)
    plan = partial(plan_for, resolve(make_collection(tmp_path / "in", 140, modules, r=8)), settings)
    disk, out = tmp_path / "disk", tmp_path / "disk" / "out"
    disk.mkdir()
    room = 100_000 + sum(plan(default_workspace(out)).sizes[part] for part in ("workspace", "checkpoint"))
    monkeypatch.setattr("lorashare_stream.stages.run.free_bytes", lambda path: (1, room - tree_bytes(disk)))
    seen = 0

    def stop(name: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        nonlocal seen
        for result in results:
            seen += name == step
            if seen > after:
                raise KeyboardInterrupt
            yield result

    if step:
        with pytest.raises(KeyboardInterrupt):
            compress(plan(default_workspace(out)), out, progress=stop)
    else:
        compress(plan(default_workspace(out)), out)
    assert compress(plan(default_workspace(out)), out).method == ("recompute" if step else "current")
    plan = partial(plan_for, resolve(make_collection(tmp_path / "in", 141, modules, r=8)), settings)
    with pytest.raises(BudgetError, match="not enough disk"):  # for moments beside those of before
        compress(plan(default_workspace(out)), out)


def test_an_adapter_that_vanishes_after_planning_is_named(tmp_path: Path, collection: list[str]) -> None:
    plan = plan_for(resolve(collection), Settings(device="cpu"))
    (Path(collection[4]) / WEIGHTS).unlink()
    with pytest.raises(CollectionError, match=r"'a04'.*is gone"):
        compress(plan, tmp_path / "out")


def test_an_adapter_cut_short_after_planning_is_named(tmp_path: Path, collection: list[str]) -> None:
    plan = plan_for(resolve(collection), Settings(device="cpu"))
    os.truncate(Path(collection[4]) / WEIGHTS, 3000)
    with pytest.raises(CollectionError, match=r"'a04'.*was changed"):
        compress(plan, tmp_path / "out")


def test_shards_are_read_and_one_file_is_written(tmp_path: Path, collection: list[str], compressed: Compress) -> None:
    folder, tensors = Path(collection[0]), load_tensors(collection[0])
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    shards = {"model-1-of-2.safetensors": keys[:3], "model-2-of-2.safetensors": keys[3:]}
    for name, part in shards.items():
        save_file({k: tensors[k] for k in part}, folder / name)
    index = {"weight_map": {k: name for name, part in shards.items() for k in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    share = SHAREModel.from_pretrained(compressed(collection, num_components=100))
    share.reconstruct("a00", output_dir=tmp_path / "rec")
    found = load_tensors(tmp_path / "rec")
    assert found.keys() == tensors.keys()
    assert all(np.allclose(found[k], tensors[k], atol=1e-5) for k in tensors)


def test_shards_that_disagree_with_their_index_are_named(collection: list[str], compressed: Compress) -> None:
    """A layer that the index places in one shard and lies in another would be gone without a word."""
    folder, tensors = Path(collection[0]), load_tensors(collection[0])
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({k: tensors[k] for k in keys[:3]}, folder / first)
    save_file({k: tensors[k] for k in keys[3:]}, folder / second)

    def refused(weight_map: dict[str, str]) -> str:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CollectionError) as caught:
            compressed(collection)
        return str(caught.value)

    text = refused(dict.fromkeys(keys, first))
    assert all(part in text for part in ("'a00'", "does not list", second, first))
    text = refused(dict.fromkeys(keys[:4], first) | dict.fromkeys(keys[4:], second))
    assert all(part in text for part in ("'a00'", keys[3], "disagree", f"found {second}", f"expected {first}"))


def test_keys_in_another_form_come_back_in_the_form_that_peft_loads(
    tmp_path: Path, collection: list[str], compressed: Compress
) -> None:
    forms = [
        lambda k: "module." + k,
        lambda k: k.replace("base_model.model.", ""),
        lambda k: k.replace("_A.", "_A.default."),
    ]
    for folder, form in zip(collection, forms, strict=False):
        rewritten(Path(folder), lambda t, form=form: {form(k): v for k, v in t.items()})
    share = SHAREModel.from_pretrained(compressed(collection, num_components=100))
    for name in share.adapter_names[:3]:
        assert share.reconstruct(name).keys() == load_tensors(collection[-1]).keys()


def test_errors_survive_pickling() -> None:
    error = CollectionError("bad", problems=[AdapterError("x", adapter="a", key="k", found=1)], remedy="Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert isinstance(pickle.loads(pickle.dumps(MissingFileError("x"))), FileNotFoundError)
