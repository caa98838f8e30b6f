"""What is computed together is what is computed alone, to the last bit; and nothing is read twice or left out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.adapters.dtypes import narrowed, stacked, widened
from lorashare_stream.adapters.folder import open_tensors, tensor_records
from lorashare_stream.adapters.keys import SIDES
from lorashare_stream.adapters.layout import STACK_BYTES, chunks, module_batches, read_layout
from lorashare_stream.adapters.safetensors import float32
from lorashare_stream.adapters.scaling import Scaling
from lorashare_stream.linalg.delta import delta_error, delta_errors, gram, projected_errors
from lorashare_stream.linalg.moments import Accumulator, HostSum, Lockstep, empty
from lorashare_stream.plan.memory import PORTION_BYTES, Group, held_bytes, modules_of, portions, steps_of
from lorashare_stream.settings import Settings
from lorashare_stream.stages.accumulate import weighted_rows

from .conftest import make_tensors, write_adapter

SHAPES = {"a.q": (40, 24), "a.v": (40, 12), "b.q": (40, 24), "c.q": (40, 24), "wide": (STACK_BYTES // 8, 8)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = make_tensors(rng, SHAPES, r=4) | {"base_model.model.head.weight": np.ones((3, 5), np.float32)}
    return write_adapter(tmp_path / "adapter", tensors) / "adapter_model.safetensors"


def test_bundles_hold_every_module_once_and_read_what_is_there(adapter: Path) -> None:
    layout = read_layout(tensor_records((adapter,)))
    assert sorted(n for b in layout.module_batches for n in b.names) == sorted(SHAPES)
    assert {b.names for b in layout.module_batches} == {("a.q", "b.q", "c.q"), ("a.v",), ("wide",)}
    with open_tensors((adapter,)) as tensors:
        for module_batch in layout.module_batches:
            found = module_batch.read(tensors)
            for i, module in enumerate(module_batch.modules):
                assert np.array_equal(found["A"][i], float32(tensors, module.a))
                assert np.array_equal(found["B"][i], float32(tensors, module.b))
    assert all(len(b.modules) == 1 for b in module_batches(layout.modules, alone=True))


def test_chunks_hold_every_tensor_once_in_the_order_of_the_file(adapter: Path) -> None:
    layout = read_layout(tensor_records((adapter,)))
    records = [r for chunk in layout.chunks for r in chunk.records]
    assert records == [r for r, _, _ in layout.in_file_order] == sorted(records, key=lambda r: r.offset)
    assert all(r.offset + r.nbytes == after.offset for c in layout.chunks for r, after in pairwise(c.records))
    assert sorted((s.side, m) for chunk in layout.chunks for s in chunk.stacks for m in s.modules) == sorted(
        (side, m) for side in "AB" for m in SHAPES
    )
    (extra,) = (chunk for chunk in layout.chunks if not chunk.stacks)
    assert [r.name for r in extra.records] == ["base_model.model.head.weight"]
    assert all(len(s.records) == 1 for c in chunks(layout.in_file_order, alone=True) for s in c.stacks)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_a_stack_is_what_each_tensor_is(dtype: str, even: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4, 5))
    raws = [(v if dtype == "F64" else narrowed(v, dtype)).reshape(-1).view(np.uint8) for v in values]
    each = [widened(raw, dtype, (4, 5)) for raw in raws]
    gaps = [np.zeros(size, np.uint8) for size in (5, 3, 3 if even else 9)]  # tensors need not be aligned
    block = np.concatenate([part for pair in zip(gaps, raws, strict=True) for part in pair])
    offsets = [5, 8 + len(raws[0]), 8 + len(gaps[2]) + 2 * len(raws[0])]
    assert np.array_equal(stacked(block, offsets, dtype, (4, 5)), np.stack(each))
    assert np.array_equal(stacked(block, offsets[::-1], dtype, (4, 5)), np.stack(each[::-1]))
    assert np.array_equal(stacked(block, offsets[1:2], dtype, (4, 5)), np.stack(each[1:2]))


@given(
    st.integers(0, 99), st.integers(1, 5), st.integers(1, 4), st.integers(1, 60), st.sampled_from([1e-30, 1.0, 1e20])
)
def test_bits_do_not_depend_on_what_is_computed_beside(seed: int, m: int, r: int, d: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    a, a_hat = (rng.standard_normal((m, r, d)).astype(np.float32) for _ in range(2))
    b, b_hat = (rng.standard_normal((m, d + 3, r)).astype(np.float32) for _ in range(2))
    b[0] *= size  # its root is out of the range of float32, and that of others is not
    scalings = [Scaling(1.0 + i) for i in range(m)]
    assert np.array_equal(gram(a), np.concatenate([gram(a[i : i + 1]) for i in range(m)]))
    together = delta_errors(a, b, a_hat, b_hat, scalings)
    assert together == [delta_error(a[i], b[i], a_hat[i], b_hat[i], scalings[i]) for i in range(m)]
    kept = {side: gram(0.1 * rng.standard_normal((m, 1, r, 4))) for side in SIDES}
    projected = projected_errors(a, b, kept, scalings)
    rows = weighted_rows(a, b, scalings, 2.0, "delta")
    for i in range(m):
        own = {side: grams[i : i + 1] for side, grams in kept.items()}
        assert projected[i : i + 1] == projected_errors(a[i : i + 1], b[i : i + 1], own, scalings[i : i + 1])
        alone = weighted_rows(a[i : i + 1], b[i : i + 1], scalings[i : i + 1], 2.0, "delta")
        for side in ("A", "B"):
            assert np.array_equal(rows[side][i].astype(alone[side].dtype), alone[side][0])


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12), st.integers(2, 4))
def test_in_lockstep_or_not_the_sums_are_the_same(steps: list[tuple[int, bool]], m: int) -> None:
    """Some vectors are added to all, some to the first alone, in any order; blocks fill at different times then."""
    rng = np.random.default_rng(0)
    starts = [(empty(6), empty(6)) for _ in range(m)]
    one, other = ([Accumulator(pair[i], HostSum(pair[i]), 8) for pair in starts] for i in (0, 1))
    lockstep, again = Lockstep(one), None
    for r, common in steps:
        rows = rng.standard_normal((m, r, 6)).astype(np.float32)
        if common:
            lockstep.add(rows)
            for accumulator, own in zip(other, rows, strict=True):
                accumulator.add(own)
        else:
            one[0].add(rows[0])
            other[0].add(rows[0])
        if again is None and r > 4:  # another kind of adapter brings some of them together anew
            again = Lockstep(one[1:])
            again.add(rows[1:])
            for accumulator, own in zip(other[1:], rows[1:], strict=True):
                accumulator.add(own)
    for a, b in zip(one, other, strict=True):
        left, right = a.finish(), b.finish()
        assert np.array_equal(left.second, right.second)
        assert (left.count, left.energy) == (right.count, right.energy)
        assert np.array_equal(left.sum, right.sum)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(18, 34), st.booleans())
def test_portions_hold_every_module_once_in_order_and_fit(n: int, workers: int, memory: int, discard: bool) -> None:
    settings = Settings(memory=(1 << memory) + (256 << 20), workers=workers, device="cpu", discard_moments=discard)
    groups = tuple(Group(f"m{i:02}", side, 64 + 64 * (i % 5), 400, 50) for i in range(n) for side in ("A", "B"))
    by_module = {f"m{i:02}": [g for g in groups if g.module == f"m{i:02}"] for i in range(n)}
    step = next(s for s in steps_of((), groups, settings, "F32", grows=False) if s.name == "accumulate")
    found = portions(sorted(by_module), by_module, settings, step, grows=False)
    assert [m for portion in found for m in portion] == sorted(by_module)
    assert all(found)
    assert len(found) >= min(n, step.concurrency) or n < step.concurrency
    assert discard <= all(len(p) == 1 for p in found)
    assert step.peak_bytes <= max(settings.memory, step.least_bytes)


@pytest.mark.parametrize("workers", [1, 8])
def test_sums_of_a_portion_are_bounded_however_many_workers_there_are(workers: int) -> None:
    settings = Settings(memory=64 << 30, workers=workers, device="cpu")
    groups = tuple(Group(f"m{i:03}", side, 1024, 5000, 500) for i in range(128) for side in ("A", "B"))
    by_module = modules_of(groups)
    step = next(s for s in steps_of((), groups, settings, "F32", grows=False) if s.name == "accumulate")
    for portion in portions([*by_module], by_module, settings, step, grows=False):
        assert sum(held_bytes(by_module[m], settings, grows=False) for m in portion) <= PORTION_BYTES
