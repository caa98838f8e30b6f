"""Tables from the JSON lines of one run: for scripts/bench.py --render.

Text between `<!-- keep NAME -->` and `<!-- /keep -->` is written by hand and survives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

Line = dict[str, Any]
BASELINE = "ours-factors"
KEEP = re.compile(r"<!-- keep (\w+) -->\n(.*?)<!-- /keep -->", re.DOTALL)
METHOD = """\
Every run is a process of its own, and **wall time is that of the whole process**, imports and the checkpoint on disk
included. Of the peers' a second or two is the import of torch, so their time without imports stands beside it; ours is
given whole only. Systems are interleaved, forwards and backwards in turn; "times ours" is the median over repetitions
of the ratio to `ours-factors` within one repetition, the other numbers are medians. Absolute times on shared machines
move by more than a factor of two between runs. Before every run the collection is read once, so that everybody finds
it in the page cache, and `sync` waits for what was written before; what was written is removed at the end of all runs.
Packages are compiled to byte code beforehand, as installing them does.

- **Peak**: the largest resident size of the process: `ru_maxrss`, read by a parent of 10 MB, since a larger parent's
  own size would show in it; of ours, which has several processes, the sum of their proportional sizes (`Pss`, in which
  a page that several have counts once), looked at five times a second. **Read, written**: bytes of system calls,
  `rchar` and `wchar` of `/proc/PID/io` at the end; what is mapped is not in it, and peers map what they read. **To
  disk**: `write_bytes`. Ours includes its workspace, from which a run resumes.
- **Captured**: what the stored bases keep of the energy of all columns, as a share of the most that k components can
  keep, both in float64 (`scripts/bench_oracle.py`): columns of A and B as they are for `factors` and lorashare, the
  weighted ones that it fits for `delta`. vlora flattens each tensor of an adapter to one vector, and has no such bases.
- **dW error**: mean over 20 adapters of ||dW - dW^|| / ||dW||, from what the checkpoint gives back. **Kept**: share of
  the energy of A and B in the same adapters. A vector of vlora is a whole tensor, so that its k is no k of the others:
  compare its error at its checkpoint's size. At N <= k it keeps everything, and compresses nothing.
- A peer that takes over ten minutes or 20 GiB is killed and run on N/2, N/4, ...; ours then runs on as many too.
  lorashare is given names and paths, in chunks of 20 for `lorashare-chunked`; adapters in bfloat16 are turned into
  float32 for vlora, whose SVD has no other.
- `ours-coded` is `--max-error 0.25`, whatever k; its A and B come back in another gauge, so only its dW error counts.
- `ours-factors-f32` stores float32 whatever the sources have, as lorashare does. Our runs have `ulimit -n 256`."""
KEPT = {"summary": "", "profile": ""}  # blocks, in the order of the page


def render(lines: list[Line], path: Path) -> None:
    kept = {**KEPT, **dict(KEEP.findall(path.read_text()))} if path.exists() else KEPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(lines, kept)).rstrip() + "\n")


def _page(lines: list[Line], kept: dict[str, str]) -> Iterator[str]:
    runs = [x for x in lines if x["kind"] == "run"]
    yield from (
        "# Benchmarks",
        "",
        "Written by `scripts/bench.py --render`, except for the text between the marks.",
        "",
    )
    yield from (f"<!-- keep summary -->\n{kept['summary']}<!-- /keep -->", "")
    yield from _machine(lines)
    yield from ("## How it is measured", METHOD, "")
    yield from _targets(lines, runs)
    yield from _overview(runs)
    yield from _compared(lines, runs)
    for collection, k in _unique((x["collection"], x["k"]) for x in runs):
        yield from _collection([x for x in runs if x["collection"] == collection], collection, k)
    yield from _scaling(runs)
    yield from _efficiency(lines, runs)
    yield from _opening(lines)
    yield f"<!-- keep profile -->\n{kept['profile']}<!-- /keep -->"


def _machine(lines: list[Line]) -> Iterator[str]:
    found = [x for x in lines if x["kind"] == "machine"]
    if not found:
        return
    m, dates = found[-1], sorted({x["at"][:10] for x in lines})
    yield f"{m['cpu']}, {m['cores']} cores, {m['ram_bytes'] / 2**30:.0f} GiB; Linux {m['kernel']},"
    yield f"Python {m['python']}, {' and '.join(m['blas'])};"
    yield ", ".join(f"{name} {version}" for name, version in m["versions"].items()) + "."
    yield f"Run `{m['run']}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    yield ""


FASTER = (
    ("roberta-1000", "lorashare", 2.0), ("roberta-1000", "lorashare-chunked", 10.0), ("roberta-1000", "vlora", 10.0),
    ("mistral-300", "lorashare", 5.0),
)  # fmt: skip


def _targets(lines: list[Line], runs: list[Line]) -> Iterator[str]:
    yield from ("## Targets", "| target | measured | met |", "|---|---|---|")
    ours = [x for x in runs if x["system"].startswith("ours")]
    good = [x for x in ours if x["status"] == "ok"]

    def row(target: str, values: list[float], limit: float, show: Callable[[float], str], note: str = "") -> str:
        if not values:
            return f"| {target} | | not measured |"
        worst = max(values)
        return f"| {target} | {show(worst)}{note} | {'yes' if worst <= limit else '**no**'} |"

    for collection, peer, wanted in FASTER:
        group = [x for x in runs if x["collection"] == collection and x["k"] == 32]
        found = [_ratio(group, peer, max((x["adapters"] for x in group), default=0), "wall_s")] if group else []
        times = [-t for t in found if t is not None]
        yield row(f"{collection}: {wanted:g} times faster than {peer}", times, -wanted, lambda v: f"{-v:.2f} times")
    for collection, peer, what, most in (
        ("roberta-1000", "lorashare", "peak_bytes", 3), ("roberta-1000", "ours-delta", "wall_s", 1.6),
        ("mistral-300", "ours-delta", "wall_s", 1.6),
    ):  # fmt: skip
        group = [x for x in runs if x["collection"] == collection and x["k"] == 32]
        ratio = _ratio(group, peer, max((x["adapters"] for x in group), default=0), what) if group else None
        if peer == "lorashare":
            less = [] if ratio is None else [-ratio]
            yield row(f"{collection}: a third of lorashare's memory", less, -most, lambda v: f"1 / {-v:.1f}")
        else:
            same = [] if ratio is None else [ratio]
            yield row(
                f"{collection}: `delta` at {most:g} times the time of `factors`", same, most, lambda v: f"{v:.2f}"
            )
    group = [x for x in runs if x["collection"] == "roberta-1000" and x["k"] == 32]
    coded = _ratio(group, "ours-coded", max((x["adapters"] for x in group), default=0), "wall_s", over="ours-delta")
    yield row(
        "roberta-1000: `--max-error 0.25` at 3 times the time of `delta`", [] if coded is None else [coded], 3,
        lambda v: f"{v:.2f}",
    )  # fmt: skip
    single = [1 - x["captured"] for x in good if x["captured"] is not None and not _rounded(x)]
    stored = [1 - x["captured"] for x in good if x["captured"] is not None and _rounded(x)]
    worst_stored = f"; {max(stored):.0e} after rounding to bfloat16" if stored else ""
    yield row("energy lacking, 1e-6", single, 1e-6, lambda v: f"{max(v, 0.0):.0e}", worst_stored)
    yield row("peak over `--memory`, 1", [x["peak_bytes"] / _bytes(x["memory"]) for x in good], 1, lambda v: f"{v:.2f}")
    growth = list(_growth(runs))
    yield row("peak at N = 10,000 over N = 1,000, 1.10", [g["peak"] for g in growth], 1.10, lambda v: f"{v:.2f}")
    yield row("time an adapter, the same, 1.15", [g["time"] for g in growth], 1.15, lambda v: f"{v:.2f}")
    largest, failed = max((x["adapters"] for x in ours), default=0), [x for x in ours if x["status"] != "ok"]
    yield row(
        f"our runs that fail with `ulimit -n 256`, N up to {largest:,}",
        [len(failed)] if ours else [], 0, lambda v: f"{v:.0f} of {len(ours)}",
    )  # fmt: skip
    opens = [x for x in lines if x["kind"] == "open"][-1:]
    large = [x for x in opens if x["adapters"] >= 10_000]
    yield row("open 10,000 adapters, 2 s", [x["open_s"] for x in large], 2, lambda v: f"{v:.2f} s")
    yield row(
        "the same, 300 MB above imports", [x["open_peak_bytes"] / 1e6 for x in large], 300, lambda v: f"{v:.0f} MB"
    )
    yield row("reconstruct one, 100 ms", [x["reconstruct_ms"] for x in large], 100, lambda v: f"{v:.0f} ms")
    yield row("`--help`, 0.5 s", [x["help_s"] for x in opens], 0.5, lambda v: f"{v:.2f} s")
    yield ""


def _overview(runs: list[Line]) -> Iterator[str]:
    peers = _unique(x["system"] for x in runs if not x["system"].startswith(("ours", "before")))
    if not peers:
        return
    yield f"## Wall time, times that of `{BASELINE}`"
    yield from (f"| collection | k | {' | '.join(peers)} |", "|---" * (2 + len(peers)) + "|")
    for collection, k in _unique((x["collection"], x["k"]) for x in runs):
        group = [x for x in runs if x["collection"] == collection and x["k"] == k]
        full = max(x["adapters"] for x in group)
        cells = []
        for peer in peers:
            count = max((x["adapters"] for x in group if x["system"] == peer and x["status"] == "ok"), default=0)
            found = _ratio(group, peer, count, "wall_s")
            at = "" if count == full else f" (N = {count})"
            cells.append(f"{found:.1f}{at}" if found is not None else "none")
        yield f"| {collection} | {k} | {' | '.join(cells)} |"
    yield ""


def _compared(lines: list[Line], runs: list[Line]) -> Iterator[str]:
    """Another commit against this one, in the same rounds."""
    before = [x for x in runs if x["system"].startswith("before-") and x["status"] == "ok"]
    commits = _unique(x["before"] for x in lines if x["kind"] == "machine" and "before" in x)
    if not before:
        return
    yield f"## Before ({', '.join(commits)}) and after"
    yield 'Medians; "times" is lorashare\'s wall time over ours, the median over rounds.'
    told = ("wall before, s", "after", "CPU before, s", "after", "peak before, MiB", "after", "times before", "after")
    yield from ("", f"| collection | k | system | {' | '.join(told)} |", "|---" * (3 + len(told)) + "|")
    for collection, k, system, count in _unique((x["collection"], x["k"], x["system"], x["adapters"]) for x in before):
        group = [x for x in runs if x["collection"] == collection and x["k"] == k and x["adapters"] == count]
        ours = system.replace("before-", "ours-")
        cells = []
        for key, unit, digits in (("wall_s", 1, 2), ("cpu_s", 1, 1), ("peak_bytes", 2**20, 0)):
            for each in (system, ours):
                values = [x[key] / unit for x in group if x["system"] == each and x["status"] == "ok"]
                cells.append(_number(median(values) if values else None, digits))
        cells += [_number(_ratio(group, "lorashare", count, "wall_s", over=each), 2) for each in (system, ours)]
        yield f"| {collection} | {k} | {ours} | {' | '.join(cells)} |"
    yield ""


COLUMNS = (
    "system", "N", "runs", "wall, s", "times ours", "without imports, s", "CPU, s", "peak, MiB", "times ours",
    "read, MiB", "written, MiB", "to disk, MiB", "captured", "dW error", "kept", "checkpoint, MiB",
)  # fmt: skip


def _collection(runs: list[Line], collection: str, k: int) -> Iterator[str]:
    group = [x for x in runs if x["k"] == k]
    memory = " and ".join(_unique(x["memory"] for x in group if x["memory"]))
    size = max(x["source_bytes"] for x in group) / 1e6
    yield f"## {collection}, k = {k}"
    yield f"{size:,.0f} MB of adapters. Ours with `--memory {memory}`."
    yield from ("", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|")
    good = [x for x in group if x["status"] == "ok"]
    for count in sorted({x["adapters"] for x in good}, reverse=True):
        for system in _unique(x["system"] for x in good if x["adapters"] == count):
            rows = [x for x in good if x["adapters"] == count and x["system"] == system]
            yield f"| {' | '.join(_cells(group, rows, system, count))} |"
    yield ""
    for x in {(x["system"], x["adapters"], x["k"]): x for x in runs if x["status"] != "ok" and x["k"] <= k}.values():
        if x["k"] == k or x["status"] != "failed":
            yield f"- {x['system']}, N = {x['adapters']}, k = {x['k']}: {_why(x)}."
    full = max(x["adapters"] for x in runs)
    for system in _unique(x["system"] for x in group):
        tried = max(x["adapters"] for x in runs if x["system"] == system and x["k"] <= k)
        if tried < full:
            yield f"- {system}: not tried above N = {tried}."
    yield ""


def _why(line: Line) -> str:
    if line["status"] == "time":
        return f"killed after {line['wall_s']:.0f} s"
    if line["status"] == "memory":
        return f"out of memory at {line['peak_bytes'] / 2**30:.1f} GiB"
    return "failed: " + re.sub(r"[`|<>]", "", line["reason"])


def _cells(group: list[Line], rows: list[Line], system: str, count: int) -> Iterator[str]:
    def middle(key: str, unit: float = 1.0) -> float | None:
        values = [x[key] / unit for x in rows if x.get(key) is not None]
        return median(values) if values else None

    mib, wall, peak = 2**20, _ratio(group, system, count, "wall_s"), _ratio(group, system, count, "peak_bytes")
    yield from (system, str(count), str(len(rows)), _number(middle("wall_s"), 2), _number(wall, 2))
    yield from (_number(middle("work_s"), 2), _number(middle("cpu_s"), 2))
    yield from (_number(middle("peak_bytes", mib)), _number(peak, 2))
    yield from (_number(middle(key, mib)) for key in ("rchar", "wchar", "write_bytes"))
    captured = [x["captured"] for x in rows if x["captured"] is not None]
    yield _share(min(captured)) if captured else ""
    yield from (_number(middle("dw_error"), 4), _number(middle("kept"), 4), _number(middle("checkpoint_bytes", mib), 1))


def _growth(runs: list[Line]) -> Iterator[Line]:
    """Of ours, N = 10,000 against N = 1,000: peak, and time an adapter."""
    good = [x for x in runs if x["status"] == "ok" and x["collection"].startswith("roberta")]
    for system, k in _unique((x["system"], x["k"]) for x in good if x["system"].startswith("ours")):
        few, many = (
            [x for x in good if (x["system"], x["k"], x["adapters"]) == (system, k, n)] for n in (1_000, 10_000)
        )
        if few and many:
            peak, wall = (
                median(x[key] for x in many) / median(x[key] for x in few) for key in ("peak_bytes", "wall_s")
            )
            yield {"system": system, "k": k, "peak": peak, "time": wall / 10}


def _scaling(runs: list[Line]) -> Iterator[str]:
    growth = list(_growth(runs))
    if growth:
        yield "## N = 10,000 against N = 1,000"
        yield from ("| system | k | peak, times | time an adapter, times |", "|---|---|---|---|")
        yield from (f"| {g['system']} | {g['k']} | {g['peak']:.3f} | {g['time']:.3f} |" for g in growth)
        yield ""


FLOORS = (
    "collection", "k", "bandwidth, GB/s", "reading, s", "syrk, s", "solver, s", "floor, s", "system", "wall, s",
    "times floor",
)  # fmt: skip


def _efficiency(lines: list[Line], runs: list[Line]) -> Iterator[str]:
    floors = {(x["collection"], x["adapters"]): x for x in lines if x["kind"] == "floor"}
    if not floors:
        return
    yield "## Efficiency"
    yield "Floor: all bytes three times at the measured bandwidth of the page cache, syrk at its measured rate for the"
    yield "groups whose moments are summed, and the solver's seconds over the cores (`scripts/bench_floor.py`)."
    yield from ("", f"| {' | '.join(FLOORS)} |", "|---" * len(FLOORS) + "|")
    for (collection, count), x in floors.items():
        here = [r for r in runs if r["collection"] == collection and r["adapters"] == count and r["status"] == "ok"]
        for k, least in x["floor_s"].items():
            for system in ("ours-factors", "ours-delta"):
                walls = [r["wall_s"] for r in here if r["system"] == system and r["k"] == int(k)]
                if walls:
                    parts = (x["bandwidth"] / 1e9, x["reading_s"], x["syrk_s"], x["solver_s"][k], least)
                    told = " | ".join(f"{v:.2f}" for v in parts)
                    wall = median(walls)
                    yield f"| {collection} | {k} | {told} | {system} | {wall:.2f} | {wall / least:.1f} |"
    yield ""


def _opening(lines: list[Line]) -> Iterator[str]:
    opens = {x["checkpoint"]: x for x in lines if x["kind"] == "open"}
    if not opens:
        return
    yield from ("## Opening a checkpoint", "Medians over processes of their own. Memory is what the process")
    yield from ("has above its imports: at most until it is open, and until it has reconstructed twenty adapters.", "")
    yield "| checkpoint | adapters | open, s | peak, MB | later, MB | the first, ms | an adapter, ms | `--help`, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for x in opens.values():
        yield (
            f"| {x['checkpoint']} | {x['adapters']:.0f} | {x['open_s']:.2f} | {x['open_peak_bytes'] / 1e6:.0f} | "
            f"{x['used_peak_bytes'] / 1e6:.0f} | {x['first_ms']:.0f} | {x['reconstruct_ms']:.1f} | {x['help_s']:.2f} |"
        )
    yield ""


def _ratio(group: list[Line], system: str, count: int, key: str, over: str = BASELINE) -> float | None:
    """Median over repetitions of this system over another, on the same adapters."""
    good = [x for x in group if x["status"] == "ok" and x["adapters"] == count]
    ours = {x["repeat"]: x[key] for x in good if x["system"] == over}
    ratios = [x[key] / ours[x["repeat"]] for x in good if x["system"] == system and x["repeat"] in ours]
    return median(ratios) if ratios else None


def _rounded(line: Line) -> bool:
    """Whether the stored components are rounded to bfloat16."""
    return line["dtype"] == "BF16" and not line["system"].endswith("f32")


def _bytes(size: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)\s*(\w*)", size).groups()  # type: ignore[union-attr]
    return int(float(number) * {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9, "": 1}[unit])


def _share(captured: float) -> str:
    lacking = 1 - captured
    return f"1 - {max(lacking, 0.0):.0e}" if lacking < 1e-3 else f"{captured:.4f}"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
