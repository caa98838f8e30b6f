"""docs/format.md is enough to read a coded checkpoint: a reader that shares no code with the package gets its bytes."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorashare_stream.adapters.pickles import raw_bytes
from lorashare_stream.codec import quantiser
from lorashare_stream.codec.code import decoded
from lorashare_stream.codec.directions import ALONE
from lorashare_stream.codec.entropy import Encoder
from lorashare_stream.codec.factors import CodedModule
from lorashare_stream.codec.stream import encode
from lorashare_stream.model import SHAREModel

from . import independent_reader, schema_table
from .mixed import EXPERTS, mixed_collection
from .test_codec import group, layout_of

Compress = Callable[..., Path]


@pytest.mark.parametrize("limit", [{"max_error": 0.3}, {"max_error": 4e-3}, {"ratio": 1.7}])
def test_a_reader_written_from_the_page_gets_the_same_bytes(
    tmp_path: Path, compressed: Compress, limit: dict[str, float]
) -> None:
    out = compressed(mixed_collection(tmp_path / "in"), **limit)
    model = SHAREModel.from_pretrained(out)
    read = {name: tensors for name, tensors, _ in independent_reader.read(out)}
    assert list(read) == model.adapter_names
    for name, tensors in read.items():
        expected = model.reconstruct(name)
        assert tensors.keys() == expected.keys()
        for key, (_, shape, raw) in tensors.items():
            assert (shape, raw) == (list(expected[key].shape), raw_bytes(expected[key]).tobytes()), (name, key)
    layouts = [adapter.layout for adapter in model._open_reader().index.adapters.values()]
    assert any(row[0] == EXPERTS and row[5] == 3 for layout in layouts for row in layout)
    assert "layers.0.v" not in {row[0] for row in model._open_reader().index.adapters["off"].layout}


def test_the_tables_of_the_page_are_those_of_the_package() -> None:
    for kind in range(quantiser.LOWEST, quantiser.HIGHEST + 1):
        assert independent_reader.table(kind) == pytest.approx(quantiser.table(kind), rel=1e-9, abs=1e-15)


def test_the_page_has_the_fields_of_every_file() -> None:
    page = schema_table.PAGE.read_text()
    assert schema_table.written(page) == page
    assert page.count("| field | type | meaning |") == len(schema_table.FILES)


def test_an_escape_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column with one number far beyond the table of its class, and low bits."""
    left = np.zeros((1, 1, 400), np.float32)
    left[0, 0, :200], left[0, 0, 7], left[0, 0, 9] = 1, -(2**20), 2**19 + 5
    right = np.ones((1, 1, 400), np.float32)
    escaped = []
    finish = Encoder.finish
    monkeypatch.setattr(Encoder, "finish", lambda self: escaped.extend(map(len, self._escaped)) or finish(self))
    given = group(left, right)
    code = encode([given], [layout_of(given)], 0.5)
    assert sum(escaped) > 0
    module = CodedModule("m", 1, 400, 400, 2.0, 1, "F32", "F32")
    ((_, a, b),) = decoded(code, [module], ALONE)
    tensors = independent_reader.factors(code, [list(module)])
    assert tensors["base_model.model.m.lora_A.weight"][2] == a.astype("<f4").tobytes()
    assert tensors["base_model.model.m.lora_B.weight"][2] == b.astype("<f4").tobytes()


def test_it_shares_no_code_with_the_package() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not any("lorashare" in name for name in names)
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree))
