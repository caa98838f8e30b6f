"""The page of a checkpoint: one HTML file by jinja2, without scripts and without anything that is fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateRuntimeError
from markupsafe import Markup

from ..adapters.keys import SIDES, Side
from ..checkpoint.config import record_of
from ..checkpoint.format import PARTS
from ..errors import CheckpointError
from ..text import bytes_shown, counted, listed, printable
from ..version import __version__
from . import charts
from .statistics import Basis, PageData, curve_of, parts_of

_KINDS = 12  # of modules that are drawn
_DEPTHS = 96  # columns
_ROWS = 50  # of a table, by two sides


def page(found: PageData) -> str:
    """The whole page; its size does not depend on the number of adapters.

    Raises:
        CheckpointError: if what was recorded makes no sense.
    """
    loader = PackageLoader("lorashare_stream.report", "")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_clean, trim_blocks=True,
                       lstrip_blocks=True)  # fmt: skip
    made.filters |= {"bytes": bytes_shown, "printable": printable, "counted": counted, "listed": listed}
    try:
        return made.get_template("page.html.j2").render(_context(found))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateRuntimeError) as e:
        raise CheckpointError("the figures of the checkpoint cannot be drawn", found=f"{type(e).__name__}: {e}") from e


def _clean(value: object) -> object:
    """What the template shows of a value: no control character, and no mark that turns the order of text around."""
    return printable(value, 10_000) if isinstance(value, str) and not isinstance(value, Markup) else value


def _context(found: PageData) -> dict[str, Any]:
    errors, ours = found.errors, found.ours
    kinds = _kinds(found.bases)
    return {
        "found": found, "ours": ours, "sizes": found.sizes, "parts": parts_of(found.config), "version": __version__,
        "names": found.config.adapter_names, "asked": record_of(found.config).settings.asked if found.coded else (),
        "k": sorted({basis.k for basis in found.bases}), "each": sum(found.sizes[part] for part in PARTS[1:]),
        "errors": errors, "median": np.median(errors) if len(errors) else 0,
        "p95": np.quantile(errors, 0.95) if len(errors) else 0,
        "histogram": charts.histogram(errors) if len(errors) else "",
        "tradeoff": _cloud(found) if found.coded else _tradeoff(found),
        "num_kinds": len(kinds), "kinds": _table(kinds), "spectra": _spectra(kinds), "heat": _heatmaps(kinds),
        "num_skipped": max(ours["num_skipped"], len(found.skipped)),
        "reasons": _reasons(found.skipped),
        "licences": [f"{name} ({n})" for name, n in found.origins.licenses.most_common()],
    }  # fmt: skip


def _cloud(found: PageData) -> dict[str, Any] | None:
    """Error against bytes of a coded checkpoint."""
    coded = [(meta.ours, n) for meta in found.certified if (n := found.codes.get(meta.adapter_name))]
    if not coded:
        return None
    times, errors, worst = np.array([(o.lora_bytes / n, o.relative_error, o.worst_module_error) for o, n in coded]).T
    limit = found.ours["settings"].get("max_error")
    figure = charts.cloud(times, errors, worst, None if limit is None else float(limit))
    return {"figure": figure, "drawn": min(charts.DOTS, len(coded))}


def _tradeoff(found: PageData) -> dict[str, Any] | None:
    """Error against bytes of a SHARE checkpoint, for each smaller k."""
    if not found.bases:
        return None
    curve, errors = curve_of(found), found.errors
    measured = {"rms": float(np.sqrt((errors**2).mean())), "mean": float(errors.mean())} if len(errors) else {}
    measured = measured if curve.bounds else {}
    return {"figure": charts.tradeoff(curve, measured), "bounds": curve.bounds, "measured": measured}


def _kinds(bases: Sequence[Basis]) -> dict[str, list[Basis]]:
    """The groups by the kind of their module, that with most energy first."""
    found: dict[str, list[Basis]] = {}
    for basis in bases:
        found.setdefault(basis.kind, []).append(basis)
    return dict(sorted(found.items(), key=lambda item: (-sum(b.energy for b in item[1]), item[0])))


def _spectra(kinds: Mapping[str, Sequence[Basis]]) -> dict[str, Markup]:
    """A figure for each kind, all on the same axes: down to the power of ten below all shares, six decades at most."""
    drawn = dict(list(kinds.items())[:_KINDS])
    every = [b for bases in drawn.values() for b in bases]
    least = min((float(v) / b.energy for b in every if b.energy > 0 for v in b.eigenvalues[-1:] if v > 0), default=0.1)
    floor = 10.0 ** max(math.floor(math.log10(min(least, 0.1))), -6)
    most = max((b.k for b in every), default=0)
    return {kind: charts.spectrum(kind, bases, floor, most) for kind, bases in drawn.items()}


def _heatmaps(kinds: Mapping[str, Sequence[Basis]]) -> dict[str, Any]:
    """Mean k and explained variance of each kind and side by depth; NaN where there is nothing."""
    drawn = dict(list(kinds.items())[:_KINDS])
    depths = sorted({-1 if b.depth is None else b.depth for bases in drawn.values() for b in bases})
    step = max(1, math.ceil(len(depths) / _DEPTHS))
    column = {depth: i // step for i, depth in enumerate(depths)}
    sums = np.zeros((3, 2 * len(drawn), len(depths[::step])))
    for row, bases in enumerate(drawn.values()):
        for b in bases:
            at = (2 * row + SIDES.index(b.side), column[-1 if b.depth is None else b.depth])
            sums[(slice(None), *at)] += (b.k, b.explained, 1)
    with np.errstate(invalid="ignore"):
        cells = sums[:2] / sums[2]
    rows = [f"{printable(kind, 40)} {side}" for kind in drawn for side in SIDES]
    maps = [
        (name, np.nanmin(some), np.nanmax(some), list(zip(rows, some.tolist(), strict=True)))
        for name, some in zip(("k", "explained variance"), cells, strict=True)
        if some.size
    ]
    names = ["none" if depth < 0 else str(depth) for depth in depths[::step]]
    return {"maps": maps, "depths": names, "every": 1 if len(names) <= 12 else math.ceil(len(names) / 6)}


def _table(kinds: Mapping[str, Sequence[Basis]]) -> list[tuple[str, Side, dict[str, str]]]:
    """Kind, side, and what is known of these groups."""
    total = {side: sum(b.energy for bases in kinds.values() for b in bases if b.side == side) for side in SIDES}
    rows = []
    for kind, bases in list(kinds.items())[:_ROWS]:
        for side in SIDES:
            if some := [b for b in bases if b.side == side]:
                share = sum(b.energy for b in some) / total[side] if total[side] else 0.0
                least, mean = min(b.explained for b in some), np.mean([b.explained for b in some])
                facts = {"groups": str(len(some))} | {name: _range([getattr(b, name) for b in some]) for name in "dnk"}
                facts |= {"energy": f"{100 * share:.1f} %", "explained, mean": f"{mean:.4f}", "least": f"{least:.4f}"}
                rows.append((kind, side, facts))
    return rows


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}\u2013{max(values)}"


def _reasons(skipped: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Names of the adapters that were left out, by reason, the most frequent first."""
    found: dict[str, list[str]] = {}
    for item in skipped:
        reason = printable(item.get("problem") or item.get("reason") or "no reason is recorded", 200)
        found.setdefault(reason, []).append(str(item.get("adapter") or item.get("source") or "not named"))
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
