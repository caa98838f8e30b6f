"""The tables of docs/serving.md, of adapters of every kind: `python -m tests.engine_table` writes them."""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorashare_stream.errors import CheckpointError
from lorashare_stream.serving.engines import ENGINES, check_engine
from lorashare_stream.serving.uniform import uniform

from . import engines
from .conftest import CONFIG, factor_keys
from .features import FEATURES, trained

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "lorax": "LoRAX", "llama.cpp": "llama.cpp", "peft": "PEFT"}
EVERY_KIND = "many-in-one-collection"  # whose adapters have nothing in common
LAYERS = {"layers.0.q": (24, 16), "layers.1.q": (24, 16)}
PLAIN: dict[str, dict[str, Any]] = {  # what is not uniform, as configurations have it
    "nothing": {},
    "`use_rslora`, r = 4": {"use_rslora": True},
    "`alpha_pattern`, a quarter of the alpha": {"alpha_pattern": {"q": 2}},
    "`rank_pattern`, half the rank": {"rank_pattern": {"q": 2}},
    "`rank_pattern`, ranks that differ between layers": {"rank_pattern": {"layers.1.q": 2}},
    "`lora_alpha` 0": {"lora_alpha": 0},
}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def cell(engine: str, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    """`yes`, or the reason why an engine does not take an adapter."""
    try:
        plain, settings = uniform(tensors, config)
    except CheckpointError as e:
        return f"not uniform: {e.problem}"
    try:
        check_engine(engine, plain, settings)
    except CheckpointError as e:
        return e.problem.partition(": ")[2]
    return "yes"


def feature_rows() -> dict[str, tuple[str, ...]]:
    """Feature -> what each engine says of its adapters."""
    rows = {}
    for name in [name for name in FEATURES if name != EVERY_KIND]:
        with tempfile.TemporaryDirectory() as folder:
            said: dict[str, set[str]] = {engine: set() for engine in ENGINES}
            for seed, options in enumerate(FEATURES[name].adapters):
                trained(FEATURES[name], options, seed, Path(folder) / str(seed))
                for engine in ENGINES:
                    said[engine].add(cell(engine, *read(Path(folder) / str(seed))))
        rows[name] = tuple("; ".join(sorted(reasons)) for reasons in said.values())
    return rows


def feature_table(rows: Mapping[str, tuple[str, ...]]) -> str:
    """Features that every engine takes alike in one row, reasons below."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows.items():
        alike.setdefault(cells, []).append(name)
    ordered = sorted(alike.items(), key=lambda item: -item[0].count("yes"))
    reasons = list(dict.fromkeys(text for cells, _ in ordered for text in cells if text != "yes"))
    lines = [_line(["feature (as in adapters.md)", *TITLES.values()]), "|---" * (1 + len(TITLES)) + "|"]
    for cells, names in ordered:
        marks = [text if text == "yes" else f"no ({1 + reasons.index(text)})" for text in cells]
        lines.append(_line([", ".join(f"`{name}`" for name in names), *marks]))
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(reasons, 1))])


def rule_table() -> str:
    """What engines make of adapters that are not uniform."""
    lines = [_line(["a plain reconstruction with", *TITLES.values()]), "|---" * (1 + len(TITLES)) + "|"]
    return "\n".join([*lines, *(_line([name, *_rules(fields)]) for name, fields in PLAIN.items())])


def _rules(fields: Mapping[str, Any]) -> Iterable[str]:
    config = CONFIG | {"target_modules": ["q"]} | fields
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module, (d_in, d_out) in LAYERS.items():
        ranks = [
            r for pattern, r in config.get("rank_pattern", {}).items() if re.match(rf"(.*\.)?({pattern})$", module)
        ]
        r = next(iter(ranks), config["r"])
        for key, shape in zip(factor_keys(module), ((r, d_in), (d_out, r)), strict=True):
            tensors[key] = torch.randn(shape, generator=generator)
    truth = engines.peft(tensors, config)
    return [_told(rule, tensors, config, truth) for rule in (engines.RULES[engine] for engine in TITLES)]


def _told(rule: Any, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], truth: engines.Deltas) -> str:
    try:
        found = rule(tensors, config)
    except RuntimeError:
        return "does not load"
    times = [_times(found[module], delta) for module, delta in truth.items()]
    worst = max(times, key=lambda factor: abs(math.log(factor)))
    most = "" if len(set(times)) == 1 else "up to "
    if worst == math.inf:
        return "as if there were none"
    if worst == 1:
        return "right"
    return f"{most}{worst:g} times too strong" if worst > 1 else f"{most}{1 / worst:g} times too weak"


def _times(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The number by which one matrix is another one, infinite of nothing."""
    if not bool(wanted.any()):
        return math.inf if bool(found.any()) else 1.0
    times = float((found * wanted).sum() / (wanted**2).sum())
    assert torch.allclose(found, times * wanted)
    return round(times, 6)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def marked(name: str, table: str) -> str:
    return f"<!-- {name}: made by python -m tests.engine_table -->\n{table}\n<!-- end of {name} -->"


def tables() -> dict[str, str]:
    return {"rules": rule_table(), "features": feature_table(feature_rows())}


def written(page: str) -> str:
    """A page, with its tables as they are computed."""
    for name, table in tables().items():
        pattern = rf"<!-- {name}: .*?<!-- end of {name} -->"
        assert re.search(pattern, page, re.DOTALL), name
        page = re.sub(pattern, lambda _, name=name, table=table: marked(name, table), page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    import peft.tuners.lora.layer

    from .features import loftq

    warnings.simplefilter("ignore")
    peft.tuners.lora.layer.loftq_init = loftq
    PAGE.write_text(written(PAGE.read_text()))
