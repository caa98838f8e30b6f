"""Parts of the page below its head: bases by kind and depth, adapters that were left out, provenance."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..adapters.keys import SIDES
from ..text import counted, listed, printable
from .charts import heatmap, spectrum
from .markup import Html, element, joined
from .statistics import Basis, PageData

KINDS = 12  # of modules that are drawn
_DEPTHS = 96  # columns
_REASONS = 12
_ROWS = 50


def table(header: Sequence[str], rows: Sequence[Sequence[object]], numbers: Collection[int] = ()) -> Html:
    """A table that scrolls where it is too wide; `numbers` are the columns that are set to the right."""
    kinds = ["n" if i in numbers else None for i in range(len(header))]
    head = [element("th", name, class_=kind, scope="col") for name, kind in zip(header, kinds, strict=True)]
    body = [
        element("tr", *[element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)])
        for row in rows
    ]
    inner = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex="0")


def facts_list(pairs: Sequence[tuple[str, object]]) -> Html:
    """Names and values, below each other."""
    return element("dl", *[joined(element("dt", name), element("dd", value)) for name, value in pairs], class_="facts")


def bases_part(found: PageData) -> Html:
    """Spectra by kind, k and explained variance by kind and depth, and a table of the same."""
    title = element("h2", "Bases by kind of module and depth")
    if not found.bases:
        return joined(title, element("p", "There are none: nothing is shared.", class_="soft"))
    kinds = _kinds(found.bases)
    drawn = dict(list(kinds.items())[:KINDS])
    most = max(b.k for bases in drawn.values() for b in bases)
    floor = _floor([b for bases in drawn.values() for b in bases])
    spectra = [
        element(
            "figure",
            element("h3", element("bdi", printable(kind, 40))),
            spectrum(printable(kind, 40), bases, floor, most),
        )
        for kind, bases in drawn.items()
    ]
    more = f" {counted(len(kinds) - KINDS, 'kind')} more, with less energy, not drawn." if len(kinds) > KINDS else ""
    text = (
        "Eigenvalues as a share of their group's energy: the mean over depths as a line, the range over depths as a "
        f"band. A spectrum that is still high where it ends would gain by a larger k.{more} "
        "Below, a cell that stands for several groups has their mean."
    )
    key = element("div", *[element("span", element("i", class_=s), f"side {s}") for s in SIDES], class_="key")
    return joined(
        title, element("p", text, class_="soft"), key, element("div", *spectra, class_="three"),
        element("div", *_heatmaps(drawn), class_="two"), _kinds_table(kinds),
    )  # fmt: skip


def _kinds(bases: Sequence[Basis]) -> dict[str, list[Basis]]:
    """The groups by the kind of their module, that with most energy first."""
    found: dict[str, list[Basis]] = {}
    for basis in bases:
        found.setdefault(basis.kind, []).append(basis)
    return dict(sorted(found.items(), key=lambda item: (-sum(b.energy for b in item[1]), item[0])))


def _floor(bases: Sequence[Basis]) -> float:
    """The power of ten below all shares that are drawn, six decades at most."""
    least = min((float(v) / b.energy for b in bases if b.energy > 0 for v in b.eigenvalues[-1:] if v > 0), default=0.1)
    return 10.0 ** max(math.floor(math.log10(min(least, 0.1))), -6)


def _heatmaps(kinds: Mapping[str, Sequence[Basis]]) -> list[Html]:
    depths = sorted({-1 if b.depth is None else b.depth for bases in kinds.values() for b in bases})
    step = math.ceil(len(depths) / _DEPTHS)
    columns = [depths[i] for i in range(0, len(depths), step)]
    column = {depth: i // step for i, depth in enumerate(depths)}
    sums = np.zeros((3, 2 * len(kinds), len(columns)))
    for row, bases in enumerate(kinds.values()):
        for b in bases:
            at = (2 * row + SIDES.index(b.side), column[-1 if b.depth is None else b.depth])
            sums[(slice(None), *at)] += (b.k, b.explained, 1)
    with np.errstate(invalid="ignore"):
        k, explained = sums[0] / sums[2], sums[1] / sums[2]
    rows = [f"{printable(kind, 40)} {side}" for kind in kinds for side in SIDES]
    names = ["none" if depth < 0 else str(depth) for depth in columns]
    statistics = [
        heatmap("k", rows, names, k, whole=True),
        heatmap("explained variance", rows, names, explained, whole=False),
    ]
    return [element("figure", figure) for figure in statistics]


def _kinds_table(kinds: Mapping[str, Sequence[Basis]]) -> Html:
    total = {side: sum(b.energy for bases in kinds.values() for b in bases if b.side == side) for side in SIDES}
    rows = []
    for kind, bases in list(kinds.items())[:_ROWS]:
        for side in SIDES:
            some = [b for b in bases if b.side == side]
            if some:
                values = [b.explained for b in some]
                share = sum(b.energy for b in some) / total[side] if total[side] else 0.0
                rows.append((
                    element("bdi", printable(kind, 60)), side, len(some), _range([b.d for b in some]),
                    _range([b.n for b in some]), _range([b.k for b in some]), f"{100 * share:.1f} %",
                    f"{np.mean(values):.4f}", f"{min(values):.4f}",
                ))  # fmt: skip
    header = ("kind", "side", "groups", "d", "n", "k", "energy", "explained, mean", "least")
    inner = table(header, rows, numbers=range(2, len(header)))
    return element("details", element("summary", "The same as a table"), inner)


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}\u2013{max(values)}"


def skipped_part(found: PageData) -> Html:
    """Adapters that were left out, by reason; and those that are kept exact."""
    title, count = element("h2", "Adapters that were left out"), max(int(found.ours["num_skipped"]), len(found.skipped))
    if not count:
        return joined(title, element("p", "None.", class_="soft"))
    by_reason: dict[str, list[str]] = {}
    for item in found.skipped:
        reason = printable(item.get("problem") or item.get("reason") or "no reason is recorded", 200)
        by_reason.setdefault(reason, []).append(str(item.get("adapter") or item.get("source") or "not named"))
    some = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [(element("bdi", reason), len(names), element("bdi", listed(names, 3))) for reason, names in some[:_REASONS]]
    more = f" {counted(len(some) - _REASONS, 'reason')} more in skipped.json." if len(some) > _REASONS else ""
    each = [
        (element("bdi", printable(item.get("adapter") or item.get("source") or "not named", 90)),
         element("bdi", printable(item.get("reason") or "no reason is recorded", 400)))
        for item in found.skipped[:_ROWS]
    ]  # fmt: skip
    name = f"The first {_ROWS} of {count}, in full" if count > _ROWS else "Each, in full"
    return joined(
        title, element("p", f"{counted(count, 'adapter')}, by reason.{more}", class_="soft"),
        table(("reason", "adapters", "among them"), rows, numbers=(1,)),
        element("details", element("summary", name), table(("adapter", "why"), each)),
    )  # fmt: skip


def provenance_part(found: PageData) -> Html:
    """What the checkpoint was made of, and how."""
    ours, origins = found.ours, found.origins
    centred = ", centred" if ours.get("center") else ""
    pairs: list[tuple[str, object]] = [
        ("base model", element("bdi", printable(found.base_model or "not named", 120))),
        ("written by", f"lorashare-stream {printable(ours.get('version', 'of unknown version'), 40)}"),
        *([] if found.coded else [("objective", f"{printable(ours['objective'], 40)}{centred}")]),
        *([] if found.coded else [("stored as", printable(ours["dtype"], 20))]),
        ("adapters", _sources(found)),
    ]
    if origins.hub:
        pairs.append(("licences", listed((f"{name} ({n})" for name, n in origins.licenses.most_common()), 12)))
        closed = f"{origins.closed} gated or private" if origins.closed else "none gated or private"
        pairs.append(("access", f"{closed}, as the Hub said when they were read"))
    fit = [("added since the fit", "projected"), ("taken out since the fit", "removed")]
    for name, key in (("kept exact", "verbatim_adapters"), *([] if found.coded else fit)):
        names = ours.get(key) or ()
        pairs.append((name, element("bdi", f"{len(names)}: {listed(names, 5)}") if names else "none"))
    if ours.get("cut_from"):
        pairs.append(("cut from", f"k = {printable(ours['cut_from'], 20)}"))
    digests = [("digest", ours.get("digest"))]
    if found.coded:
        digests.append(("SHA-256 of the index", found.config.coded.get("index")))
        pairs += [("step", f"{step:.4g} of ||dW||")] if (step := float(found.config.coded.get("step", 0))) else []
    else:
        bases = (("digest of the bases", "basis_digest"), ("SHA-256 of the components", "components"))
        digests += [(name, ours.get(key)) for name, key in bases]
    pairs += [(name, element("code", printable(value or "not recorded", 80))) for name, value in digests]
    settings = [
        (printable(k, 60), element("code", printable(v, 120))) for k, v in list(ours["settings"].items())[:_ROWS]
    ]
    asked = element("details", element("summary", "Settings, as they were asked for"), facts_list(settings))
    return joined(element("h2", "Provenance"), facts_list(pairs), asked)


def _sources(found: PageData) -> str:
    origins = found.origins
    parts = [f"{origins.local} from local folders"] if origins.local else []
    if origins.hub:
        where = f"{origins.repositories} {'repository' if origins.repositories == 1 else 'repositories'}"
        parts.append(f"{origins.hub} from {where} of the Hub, each at its commit")
    return " and ".join(parts) or "none"
