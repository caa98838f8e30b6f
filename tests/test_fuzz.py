"""Whatever lies in an adapter's folder, a run ends in a result or in an error of ours.

Never in a traceback from below, never in a hang, never in memory that grows with a number in a header. The corpus
(tests/make_corpus.py says what is in it) runs in processes of their own, with limits; hypothesis mutates and makes up.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.adapters.foreign import foreign_kind
from lorashare_stream.adapters.keys import adapter_names, parse_key
from lorashare_stream.errors import AdapterError, StreamError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings

from .make_corpus import CONFIG, CORPUS, DATA, GOOD, A, B, packed, saved
from .tiers import COMMIT

WEIGHTS, PICKLE, SHARD = "adapter_model.safetensors", "adapter_model.bin", "adapter_model-00001-of-00001.safetensors"
PLACES = {"header": WEIGHTS, "pickle": PICKLE, "config": "adapter_config.json", "index": f"{WEIGHTS}.index.json"}
# What is odd, but not wrong: it is taken, and comes back.
TAKEN = {
    "header/good", "header/key-with-a-path", "header/key-with-a-colon", "header/key-very-long", "header/key-empty",
    "header/key-a-marker-alone", "header/key-of-markers",
    "header/integers", "header/booleans-that-are-none", "header/sides-of-two-dtypes",
    "pickle/good", "pickle/good-old", "pickle/archive-behind-a-pickle", "pickle/transposed",
    "config/good", "config/alpha-zero", "config/base-a-number", "config/init-a-list", "config/byte-order-mark",
    "config/pattern-of-counts", "config/pattern-of-wildcards", "config/parameters-empty-text",
    "config/tied-without-an-embedding", "config/parameters-of-everything", "config/pattern-of-many",
    "config/pattern-exponential", "config/pattern-of-choices", "config/pattern-of-optionals",
    "config/pattern-very-long",
    "index/good", "index/map-lists-too-little",
}  # fmt: skip


def adapter(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    for name, raw in (files or {WEIGHTS: packed(GOOD)}).items():
        (folder / name).write_bytes(raw)
    return folder


def swallow(root: Path, bad: Path) -> list[AdapterError]:
    """Compress two good adapters and one that may not be; read everything back; give what was refused."""
    folders = {"one": adapter(root / "one"), "two": adapter(root / "two"), "bad": bad}
    plan = plan_for(resolve(folders), Settings(on_error="skip", device="cpu", num_components=2))
    refused = compress(plan, root / "out", executor=SerialExecutor()).skipped
    share = SHAREModel.from_pretrained(root / "out")
    for name in share.adapter_names:
        assert share.reconstruct(name, output_dir=root / "rec" / name)
    assert set(share.adapter_names) == {"one", "two", "bad"} - {str(e.adapter) for e in refused}
    for error in refused:
        assert error.adapter == "bad"
        assert error.remedy
        text = str(error)
        assert text.isprintable()
        assert len(text) < 2000
    return refused


def files_of(case: Path) -> dict[str, bytes]:
    """A file of the corpus, and what belongs beside it."""
    kind = case.parent.name
    good = {"config": {WEIGHTS: packed(GOOD)}, "index": {SHARD: packed(GOOD)}}.get(kind, {})
    return {PLACES[kind]: case.read_bytes()} | good


def run_corpus(kind: str) -> None:
    """In a process of its own: every file of one kind, under limits; results on stdout."""
    import resource

    with tempfile.TemporaryDirectory() as root:  # what is imported on first use does not count
        pickled = saved({A: torch.ones(2, 8), B: torch.ones(6, 2)})
        swallow(Path(root), adapter(Path(root) / "a", **{PICKLE: pickled}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (2 << 30),) * 2)
    results = {}
    for case in sorted((CORPUS / kind).iterdir()):
        with tempfile.TemporaryDirectory() as root:
            refused = swallow(Path(root), adapter(Path(root) / "bad", **files_of(case)))
            results[f"{kind}/{case.stem}"] = [str(e) for e in refused]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10  # MiB
    print(json.dumps({"results": results, "grown": grown}))


EVERY_7TH = sorted(CORPUS.glob("*/*"))[COMMIT % 7 :: 7]


@pytest.mark.filterwarnings("ignore")  # torch warns of what it unpickles
@pytest.mark.parametrize("case", EVERY_7TH, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_of_the_corpus(tmp_path: Path, case: Path) -> None:
    kind = case.parent.name
    refused = swallow(tmp_path, adapter(tmp_path / "bad", **files_of(case)))
    assert bool(refused) == (f"{kind}/{case.stem}" not in TAKEN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_the_corpus(kind: str) -> None:
    code = f"from tests.test_fuzz import run_corpus; run_corpus({kind!r})"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a pickle was run" not in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert {case for case, refused in found["results"].items() if not refused} == {
        t for t in TAKEN if t.startswith(kind)
    }
    assert found["grown"] < 100


# -- mutated, and made up -------------------------------------------------------------------------------------------

GOOD_PICKLE = saved({A: torch.ones(2, 8), B: torch.ones(6, 2)})
OLD_PICKLE = saved({A: torch.ones(2, 8), B: torch.ones(6, 2)}, _use_new_zipfile_serialization=False)
GOOD_CONFIG = json.dumps(CONFIG).encode()


@st.composite
def mutations(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes of a good file, some of which are changed, repeated, or gone."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        to = draw(st.integers(at, min(at + 40, len(changed))))
        kind = draw(st.sampled_from(["change", "cut", "repeat", "end"]))
        if kind == "change":
            changed[at : at + 1] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "end":
            del changed[at:]
        else:
            changed[at:to] = changed[at:to] * (2 if kind == "repeat" else 0)
    return bytes(changed)


def survives(**files: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        swallow(Path(root), adapter(Path(root) / "bad", **files))


@given(mutations(packed(GOOD)))
def test_a_safetensors_file_that_was_damaged(raw: bytes) -> None:
    survives(**{WEIGHTS: raw})


@given(st.one_of(mutations(GOOD_PICKLE), mutations(OLD_PICKLE)))
@pytest.mark.filterwarnings("ignore")  # torch warns of what it unpickles
def test_a_pickle_that_was_damaged(raw: bytes) -> None:
    survives(**{PICKLE: raw})


@given(mutations(GOOD_CONFIG))
def test_a_configuration_that_was_damaged(raw: bytes) -> None:
    survives(**{WEIGHTS: packed(GOOD), "adapter_config.json": raw})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters", "use_dora",
    "init_lora_weights", "base_model_name_or_path", "target_modules", "kasa_config", "use_bdlora", "enable_lora",
    "ensure_weight_tying",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_a_configuration_of_any_values(values: dict[str, Any]) -> None:
    survives(**{WEIGHTS: packed(GOOD), "adapter_config.json": json.dumps(CONFIG | values).encode()})


PARTS = [
    "q", "lora_A", "lora_B", "weight", "bias", "default", "mine", "lora_embedding_A", "lora_embedding_B", "lora_diag",
    "lora_magnitude_vector", "modules_to_save", "original_module", "base_layer", "token_adapter",
    "trainable_tokens_delta", "module", "_orig_mod", "base_model", "model", "", "0", ":", "A",
]  # fmt: skip
KEYS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join) | st.text(max_size=12)
FACTORS = st.sampled_from([A, B, "h.lora_A.mine.weight", "h.lora_B.mine.weight", "h.lora_B.mine.bias", "module." + A])
DTYPES = [("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("I64", 8), ("F8_E4M3", 1)]
SHAPES = st.sampled_from([[2, 8], [6, 2], [2, 8, 1], [6, 2, 1]]) | st.lists(st.integers(0, 5), max_size=4)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file that is well formed, of tensors that may be anything."""
    header: dict[str, Any] = {}
    end = 0
    for key in draw(st.lists(KEYS | FACTORS, min_size=1, max_size=6, unique=True)):
        dtype, size = draw(st.sampled_from(DTYPES))
        shape = draw(SHAPES)
        start, end = end, end + size * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return packed(header, draw(st.sampled_from([bytes(end), (DATA * (end // len(DATA) + 1))[:end]])))


@given(headers())
def test_tensors_of_any_name_and_shape(raw: bytes) -> None:
    survives(**{WEIGHTS: raw})


@given(st.lists(KEYS | FACTORS, max_size=8))
def test_keys_are_understood_or_left_as_they_are(keys: list[str]) -> None:
    foreign_kind(keys)
    for key in keys:
        for name in [None, *adapter_names(keys)]:
            parsed = parse_key(key, name)
            assert parsed.canonical.startswith("base_model.model.")
            assert (parsed.module is None) == (parsed.side is None)
            if parsed.module is not None:
                assert parsed.canonical == f"base_model.model.{parsed.module}.lora_{parsed.side}.weight"


@given(st.data())
def test_a_checkpoint_that_was_damaged(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        swallow(Path(root), adapter(Path(root) / "bad"))
        out = Path(root) / "out"
        path = data.draw(st.sampled_from(sorted(p for p in out.rglob("*") if p.is_file())))
        path.write_bytes(data.draw(mutations(path.read_bytes())))
        with contextlib.suppress(StreamError):
            share = SHAREModel.from_pretrained(out)
            share.summary()
            for name in share.adapter_names:
                share.reconstruct(name)
                share.certified(name)
