"""Tables from the JSON lines of one run: for scripts/evidence.py --render.

Text between `<!-- keep NAME -->` and `<!-- /keep -->` is written by hand and survives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_report
import evidence_chart
import numpy as np

Line = dict[str, Any]
KEPT = {"summary": "", "limits": ""}
METHOD = """\
- **Error**: ||dW - dW^|| / ||dW|| of an adapter over all its modules together, in float64, from what is on the disk
  (`scripts/evidence_measure.py`, which shares no code with the library); then mean, median, 95th percentile and largest
  over the adapters. Adapters with dW = 0 have no such error and are left out of these. Ours and lorashare are saved,
  opened, reconstructed into PEFT folders, and those are read.
- **LoRA bytes**: the numbers from which LoRA is rebuilt: A and B; or components, means and loadings. What we keep exact
  of LoRA is *verbatim*. **All bytes**: everything on the disk, heads and other extras, headers, configurations and
  certificates too. vlora keeps no heads: they are counted as they were. (x) is how many times
  fewer than the originals: in the tables of all rows with what is verbatim, before them and in the chart without.
- **Same k is the same LoRA bytes** for lorashare, `factors` and `delta`, except where lorashare stores components that
  its columns cannot span (k above n), which we leave out.
- **truncated SVD**: each adapter on its own, at the LoRA bytes of `delta` with that k. Singular triples are taken
  where they keep most of ||dW_i||^2 per byte, over all modules and adapters: the best that any choice of ranks can do.
- **originals, bfloat16 / int8**: A and B rounded; int8 is symmetric with a float32 scale for each of the r vectors.
  **delta, int8**: loadings and components of a float32 checkpoint, a scale for each column, computed here.
- **vlora** flattens a tensor to one vector, and its k is none of ours: compare it by bytes. It needs equal ranks.
- **trained**: MiniLM adapters of `scripts/train_adapters.py`, r = 8 on query and value, each on a task of its own:
  which of four packages is a paragraph of documentation from? Half share one initial A, half have a seed each.
  `trained-shared` and `trained-own` are the halves, each compressed as a collection of its own.
  Accuracy and agreement (same prediction as by the original adapter) are on held-out files."""
TARGETS = (("distilbert", 32, 0.36), ("gpt2", 16, 0.43), ("minilm", 32, 0.75))
AT_BYTES = ("lorashare", "factors", "delta", "truncated SVD")
SHARED_BASIS = ("lorashare", "factors", "delta", "delta, bfloat16", "delta, int8")


def render(lines: list[Line], path: Path) -> None:
    kept = {**KEPT, **dict(bench_report.KEEP.findall(path.read_text()))} if path.exists() else KEPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(lines, kept, path.with_suffix(".svg").name)).rstrip() + "\n")
    rows = [x for x in lines if x["kind"] == "row"]
    abouts = {name: _about(lines, name) for name in _names(rows)}
    path.with_suffix(".svg").write_text(evidence_chart.chart(rows, abouts))


def _page(lines: list[Line], kept: dict[str, str], chart: str) -> Iterator[str]:
    rows = [x for x in lines if x["kind"] == "row"]
    names = _names(rows)
    yield from (
        "# Evidence",
        "",
        "Written by `scripts/evidence.py --render`, except for the text between the marks.",
        "",
    )
    yield from (f"<!-- keep summary -->\n{kept['summary']}<!-- /keep -->", "")
    yield f"![Mean error of dW against how many times fewer LoRA bytes, both logarithmic]({chart})"
    yield ""
    yield from bench_report._machine(lines)
    yield from ("## How it is measured", METHOD, "")
    yield from _checks(rows, names)
    for name in names:
        yield from _at_bytes([x for x in rows if x["collection"] == name], _about(lines, name))
    yield from _int8(rows, names)
    yield from _tasks(lines, rows)
    for name in names:
        yield from _everything([x for x in rows if x["collection"] == name], _about(lines, name))
    yield from _left(lines)
    yield f"<!-- keep limits -->\n{kept['limits']}<!-- /keep -->"


def _names(rows: list[Line]) -> list[str]:
    return sorted({x["collection"] for x in rows}, key=lambda name: (name.startswith("trained"), name))


def _about(lines: list[Line], name: str) -> Line:
    return next(x for x in reversed(lines) if x["kind"] == "collection" and x["collection"] == name)


def lora(row: Line) -> int:
    """LoRA bytes, with what is kept verbatim."""
    return int(row["lora"] + row["verbatim"])


def everything(row: Line) -> int:
    return int(row["lora"] + row["verbatim"] + row["extras"] + row["other"])


def curve(rows: list[Line], system: str, size: Any = lora) -> list[tuple[int, float]]:
    """(bytes, mean error) of a system, where more bytes are less error."""
    points = sorted((size(x), x["mean"]) for x in rows if x["system"] == system)
    return [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]


def at(points: list[tuple[int, float]], size: int) -> float | None:
    """Error at a number of bytes, linear between measured ones, which for a convex curve is more than it would be."""
    if not points or size < points[0][0]:
        return None
    return float(np.interp(size, *zip(*points, strict=True)))


def _checks(rows: list[Line], names: list[str]) -> Iterator[str]:
    yield from ("## Checks", "| claim | measured | holds |", "|---|---|---|")
    for name in names:
        here = {(x["system"], x["k"]): x for x in rows if x["collection"] == name}
        ratios = {
            k: here["delta", k]["mean"] / x["mean"]
            for (system, k), x in here.items()
            if system == "lorashare" and ("delta", k) in here and x["mean"] > 1e-6
        }
        if ratios:
            worst, words = max(ratios, key=lambda k: ratios[k]), ", ".join(f"{k}: {r:.2f}" for k, r in ratios.items())
            yield _check(f"{name}: `delta` no worse than lorashare at the same k", words, ratios[worst] <= 1)
        for collection, k, most in TARGETS:
            if collection == name and k in ratios:
                yield _check(
                    f"{name}, k = {k}: at most {most} times lorashare's error", f"{ratios[k]:.3f}", ratios[k] <= most
                )
    for name in names:
        here_rows = [x for x in rows if x["collection"] == name]
        for what, size in (("LoRA bytes, verbatim ones too", lora), ("all bytes", everything)):
            delta = curve(here_rows, "delta", size)
            pairs = [(at(delta, size(x)), x) for x in here_rows if x["system"] == "lorashare"]
            found = {x["k"]: e / x["mean"] for e, x in pairs if e is not None and x["mean"] > 1e-6}
            outside = [str(x["k"]) for e, x in pairs if e is None]
            if found:
                words = ", ".join(f"{k}: {r:.2f}" for k, r in found.items())
                words += f" ({', '.join(outside)}: fewer than `delta` was given)" if outside else ""
                yield _check(
                    f"{name}: the same at lorashare's {what} (between measured k)", words, max(found.values()) <= 1
                )
    apart = [x["apart"] for x in rows if x.get("apart") is not None]
    if apart:
        yield _check(
            "certified errors are what is measured, to 1e-3", f"{max(apart):.0e} off at most", max(apart) <= 1e-3
        )
    for name in names:
        here = {(x["system"], x["k"]): x for x in rows if x["collection"] == name}
        ratios = {
            k: x["mean"] / here["truncated SVD", k]["mean"]
            for (system, k), x in here.items()
            if system == "delta" and ("truncated SVD", k) in here and here["truncated SVD", k]["mean"] > 1e-6
        }
        if ratios:
            words = ", ".join(f"{k}: {r:.2f}" for k, r in ratios.items())
            yield _check(
                f"{name}: `delta` no worse than truncated SVD at the same LoRA bytes (not claimed)", words,
                max(ratios.values()) <= 1,
            )  # fmt: skip
    yield ""


def _check(claim: str, measured: str, holds: bool) -> str:
    return f"| {claim} | {measured} | {'yes' if holds else '**no**'} |"


def _at_bytes(rows: list[Line], about: Line) -> Iterator[str]:
    """Mean error by k, all systems at the LoRA bytes of `delta` with it."""
    peer = {x["k"] for x in rows if x["system"] == "lorashare"}  # of `delta` there may be more
    delta = {x["k"]: x for x in rows if x["system"] == "delta" and x["k"] in peer}
    zero = f", of which {len(about['zero'])} with dW = 0" if about["zero"] else ""
    ranks = ", ".join(map(str, about["ranks"]))
    yield f"## {about['collection']}: mean error at the same bytes"
    yield f"{about['adapters']} adapters{zero}; ranks {ranks}; {about['modules']} modules;"
    yield f"LoRA {_mb(about['lora'])} MB, heads and other extras {_mb(about['extras'])} MB,"
    yield f"headers and configurations {_mb(about['other'])} MB."
    yield from ("", f"| | {' | '.join(f'k = {k}' for k in delta)} |", "|---" * (len(delta) + 1) + "|")
    yield _cells(
        "LoRA bytes of `delta`, MB (x)", [f"{_mb(x['lora'])} ({about['lora'] / x['lora']:.1f})" for x in delta.values()]
    )
    for system in AT_BYTES:
        known = {x["k"]: x["mean"] for x in rows if x["system"] == system}
        yield _cells(f"`{system}`" if system in ("factors", "delta") else system, [_error(known.get(k)) for k in delta])
    points = curve(rows, "vlora")
    if points:
        cells = [at(points, x["lora"]) if x["lora"] <= 1.05 * points[-1][0] else None for x in delta.values()]
        yield _cells("vlora, between measured k", [_error(e) for e in cells])
    for x in (x for x in rows if x["system"].startswith("originals")):
        size = f"{_mb(x['lora'])} MB ({about['lora'] / x['lora']:.1f})"
        yield from ("", f"{x['system'].capitalize()}: mean error {_error(x['mean'])} at {size}.")
    yield ""


def _int8(rows: list[Line], names: list[str]) -> Iterator[str]:
    """`delta` in int8 against `delta` in wider numbers with a smaller k, at the same LoRA bytes."""
    if not any(x["system"] == "delta, int8" for x in rows):
        return
    yield from ("## Is int8 worth a storage dtype?", "Mean error at the LoRA bytes of `delta, int8` with each k;")
    yield from ("bfloat16 and float32 then have room for a smaller k only (linear between measured k).", "")
    yield "| collection | k | MB | int8, its rounding | int8 | bfloat16 | float32 | truncated SVD, int8 |"
    yield "|---" * 8 + "|"
    for name in names:
        here = [x for x in rows if x["collection"] == name]
        wide = {x["k"]: x["mean"] for x in here if x["system"] == "delta"}
        svd = {x["k"]: x["mean"] for x in here if x["system"] == "truncated SVD, int8"}
        bf16, f32 = curve(here, "delta, bfloat16"), curve(here, "delta")
        for x in sorted((x for x in here if x["system"] == "delta, int8"), key=lambda x: x["k"]):
            rounding = np.sqrt(max(x["mean"] ** 2 - wide.get(x["k"], 0.0) ** 2, 0.0))
            cells = [at(bf16, x["lora"] + x["verbatim"]), at(f32, x["lora"] + x["verbatim"]), svd.get(x["k"])]
            told = " | ".join(_error(e) for e in (x["mean"], *cells))
            yield f"| {name} | {x['k']} | {_mb(x['lora'])} | {rounding:.4f} | {told} |"
    yield ""


def _tasks(lines: list[Line], rows: list[Line]) -> Iterator[str]:
    for original in (x for x in lines if x["kind"] == "originals"):
        name, half = original["collection"], original["half"]
        about = _about(lines, name)
        yield f"## {name}: what it does to the task"
        yield f"{original['texts']:,} held-out paragraphs, {original['classes']} classes. Halves: one initial A"
        yield "(shared) and a seed each (own). Error, accuracy and agreement are means over adapters."
        yield ""
        yield "| system | k | LoRA MB (x) | error, shared | own | accuracy, shared | own | agreement, shared | own |"
        yield "|---" * 9 + "|"
        scores = " | ".join(f"{_half(original['accuracy'], half, h):.3f}" for h in ("shared", "own"))
        yield f"| originals | | {_mb(about['lora'])} (1.0) | | | {scores} | | |"
        done = {(x["system"], x["k"]): x for x in lines if x["kind"] == "task" and x["collection"] == name}
        for row in sorted((x for x in rows if x["collection"] == name), key=_order):
            task = done.get((row["system"], row["k"]))
            if task:
                halves = [(row["errors"], 3), (task["accuracy"], 3), (task["agreement"], 3)]
                told = " | ".join(f"{_half(v, half, h):.{d}f}" for v, d in halves for h in ("shared", "own"))
                size = f"{_mb(row['lora'])} ({about['lora'] / row['lora']:.1f})"
                yield f"| {row['system']} | {row['k'] or ''} | {size} | {told} |"
        yield ""
        yield from _paired(done)


def _paired(done: dict[tuple[str, int | None], Line]) -> Iterator[str]:
    """Of `delta` less of a rival at the same k, adapter by adapter."""
    ks = sorted(k for system, k in done if system == "delta" and k is not None)
    rivals = [r for r in ("lorashare", "factors", "truncated SVD") if any((r, k) in done for k in ks)]
    if not rivals:
        return
    yield "`delta` less its rival at the same k, with the standard error over adapters, in points:"
    yield ""
    yield f"| | {' | '.join(f'{what}, k = {k}' for what in ('accuracy', 'agreement') for k in ks)} |"
    yield "|---" * (2 * len(ks) + 1) + "|"
    for rival in rivals:
        cells = []
        for key in ("accuracy", "agreement"):
            for k in ks:
                ours, other = done["delta", k][key], done.get((rival, k), {}).get(key)
                apart = 100 * np.array([ours[n] - other[n] for n in ours]) if other else np.zeros(0)
                error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else float("nan")
                cells.append(f"{apart.mean():+.1f} ± {error:.1f}" if len(apart) else "")
        yield _cells(rival, cells)
    yield ""


def _half(values: dict[str, float], half: dict[str, str], which: str) -> float:
    return float(np.mean([v for name, v in values.items() if half[name] == which]))


SYSTEMS = ("originals", "lorashare", "factors", "delta", "truncated", "vlora")


def _order(row: Line) -> tuple[Any, ...]:
    kind = next((i for i, s in enumerate(SYSTEMS) if row["system"].startswith(s)), len(SYSTEMS))
    return (kind == SYSTEMS.index("vlora"), row["k"] is None and kind > 0, row["k"] or 0, kind, row["system"])


def _everything(rows: list[Line], about: Line) -> Iterator[str]:
    whole = everything({**about, "verbatim": 0})
    yield f"## {about['collection']}: all rows"
    yield "| system | k | LoRA MB (x) | verbatim, MB | heads, MB | all MB (x) | mean | median | p95 | max |"
    yield "|---" * 10 + "|"
    for x in sorted(rows, key=_order):
        sizes = f"{_mb(x['lora'])} ({about['lora'] / lora(x):.1f}) | {_mb(x['verbatim'])} | {_mb(x['extras'])}"
        sizes += f" | {_mb(everything(x))} ({whole / everything(x):.1f})"
        errors = " | ".join(_error(x[key]) for key in ("mean", "median", "p95", "max"))
        yield f"| {x['system']} | {x['k'] or ''} | {sizes} | {errors} |"
    yield ""


def _left(lines: list[Line]) -> Iterator[str]:
    told: dict[tuple[str, str], list[str]] = {}
    done = {(x["collection"], x["system"], x["k"]) for x in lines if x["kind"] == "row"}
    for x in sorted(lines, key=lambda x: str(x.get("collection"))):
        if x["kind"] == "left" and (x["collection"], x["system"], x["k"]) not in done:
            told.setdefault((x["system"], x["why"]), []).append(x["collection"])
        if x["kind"] == "row" and "refuses" in x:
            why = f"refuses by itself ({x['refuses'].lower()}); run without its check of configurations"
            told.setdefault((x["system"], why), []).append(x["collection"])
    if told:
        yield "## Left out, or helped"
        yield from (f"- {system}, {', '.join(dict.fromkeys(names))}: {why}." for (system, why), names in told.items())
        yield ""


def _cells(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"
