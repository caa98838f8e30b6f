"""The page of a checkpoint: one HTML file, without scripts and without anything that is fetched."""

from __future__ import annotations

import numpy as np

from ..checkpoint.format import PARTS
from ..errors import CheckpointError
from ..settings import asked
from ..text import bytes_shown, counted, printable
from ..version import __version__
from .charts import bytes_bars, histogram, tradeoff
from .markup import Html, element, joined
from .page_parts import bases_part, provenance_part, skipped_part, table
from .page_style import STYLE
from .statistics import PageData, curve_of, parts_of

WORST, SEEN = 20, 8  # adapters that are named, and those that are seen at once
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(found: PageData) -> str:
    """The whole page; its size does not depend on the number of adapters.

    Raises:
        CheckpointError: if what was recorded makes no sense.
    """
    try:
        return _page(found)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise CheckpointError("the figures of the checkpoint cannot be drawn", found=f"{type(e).__name__}: {e}") from e


def _page(found: PageData) -> str:
    count = _many(len(found.config.adapter_names), "LoRA adapter")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{count} of {_base(found)}"),
        element("style", Html(STYLE)),
    )
    main = element(
        "main",
        element("h1", f"{count} of ", element("bdi", _base(found))),
        element("p", _lead(found), class_="soft"),
        _tiles(found),
        _notes(found),
        _errors_part(found),
        _bytes_part(found),
        *([] if found.coded else [bases_part(found)]),
        skipped_part(found),
        provenance_part(found),
        element("footer", f"Made by lorashare-stream {__version__} from what the checkpoint records; nothing in this "
                "page is fetched, and no script runs."),
    )  # fmt: skip
    return f"<!doctype html>\n{element('html', head, element('body', main), lang='en')}\n"


def _many(count: int, thing: str) -> str:
    return counted(count, thing).replace(str(count), f"{count:,}", 1)


def _base(found: PageData) -> str:
    return printable(found.base_model or "a base model that is not named", 120)


def _lead(found: PageData) -> str:
    k = sorted(basis.k for basis in found.bases)
    kept = len(found.config.adapter_names) - len(found.certified)
    if found.coded:
        wanted = "; asked for: ".join(["", *asked(found.ours["settings"])])
        text = f"A coded checkpoint: each adapter is coded alone, and decodes without any other{wanted}"
        return text + (f"; {counted(kept, 'adapter')} kept exact." if kept else ".")
    text = f"A SHARE checkpoint: {len(k)} shared {'basis' if len(k) == 1 else 'bases'}"
    text += "" if not k else f" with k = {k[0]}" if k[0] == k[-1] else f" with k from {k[0]} to {k[-1]}"
    return text + (f"; {counted(kept, 'adapter')} kept exact." if kept else ".")


def _tiles(found: PageData) -> Html:
    originals, total = found.sizes["originals"], found.total
    each = sum(found.sizes[part] for part in PARTS[1:]) / max(len(found.config.adapter_names), 1)
    tiles = [
        ("on disk", bytes_shown(total), f"originals {bytes_shown(originals)}"),
        ("ratio", f"{originals / total:.2f}\u00d7" if total else "-", "originals over checkpoint, on disk"),
        ("next adapter costs", bytes_shown(each), f"mean {', '.join(parts_of(found.config)[-3:])}"),
    ]
    if found.certified:
        errors = found.errors
        tiles += [
            ("mean error", f"{errors.mean():.4f}", f"median {np.median(errors):.4f}"),
            ("p95 error", f"{np.quantile(errors, 0.95):.4f}", "of relative dW error"),
            ("worst error", f"{errors[0]:.4f}", printable(found.certified[0].name, 40)),
        ]
    cells = [
        element("div", element("dt", name), element("dd", value, element("small", element("bdi", more))))
        for name, value, more in tiles
    ]
    return element("dl", *cells, class_="tiles")


def _notes(found: PageData) -> Html:
    """What a reader should know before the figures are believed."""
    ours, notes = found.ours, []
    if ours.get("cut_from"):
        notes.append(f"Cut from k = {ours['cut_from']}: the errors follow from those there, and were not measured.")
    if projected := len(ours.get("projected", ())):
        notes.append(f"{counted(projected, 'adapter')} added since the bases were fitted, and not in them.")
    if removed := len(ours.get("removed", ())):
        notes.append(f"{counted(removed, 'adapter')} taken out since the bases were fitted, and still in them.")
    if found.certified and found.errors.mean() > 0.5 and not found.coded:
        notes.append("The mean error is large: these adapters share little at this k.")
    shared = found.sizes["basis"] + found.sizes["loadings"]
    if shared > found.sizes["lora"] > 0:
        notes.append(f"The shared form, {bytes_shown(shared)}, is larger than the LoRA tensors it stands for, "
                     f"{bytes_shown(found.sizes['lora'])}.")  # fmt: skip
    return element("ul", *[element("li", note) for note in notes], class_="notes") if notes else Html("")


def _errors_part(found: PageData) -> Html:
    title = element("h2", "Error over the adapters")
    if not found.certified:
        return joined(title, element("p", "No adapter is compressed: all are kept exact.", class_="soft"))
    text = (
        "The relative error of an adapter is the Frobenius norm of what its weight change dW lost, over that of dW, "
        "over all its compressed modules, of the values that are stored. Adapters kept exact are not counted."
    )
    figure = element("figure", histogram(found.errors), element("figcaption", text))
    left = element("div", element("h3", "Distribution"), figure)
    return joined(title, element("div", left, element("div", *_worst(found)), class_="two"))


def _worst(found: PageData) -> list[Html]:
    """The worst adapters: some to be seen, more on demand."""
    top = found.certified[0].error or 1.0
    rows = [
        (
            joined(
                element("bdi", printable(adapter.name, 90)),
                element(
                    "small", f"{adapter.worst_error:.4f} in ", element("bdi", printable(adapter.worst_module, 120))
                ),
            ),
            joined(_meter(adapter.error / top), f"{adapter.error:.4f}"),
        )
        for adapter in found.certified[:WORST]
    ]
    first, count = rows[:SEEN], len(found.certified)
    name = "The only one" if count == 1 else f"The worst {len(first)} of {count:,}"
    header = ("adapter, worst module", "error")
    listing = [element("h3", name), table(header, first, numbers=(1,))]
    if rows[SEEN:]:
        more = element("summary", f"The next {len(rows) - SEEN}")
        listing.append(element("details", more, table(header, rows[SEEN:], numbers=(1,))))
    return listing


def _meter(share: float) -> Html:
    return element("span", element("i", style=f"width:{100 * share:.0f}%"), class_="meter", aria_hidden="true")


def _bytes_part(found: PageData) -> Html:
    total = found.total
    rows: list[tuple[object, ...]] = [
        (
            element("span", element("i", class_=part), part, class_="whole"),
            bytes_shown(size),
            f"{100 * size / total:.1f} %" if total else "",
            what,
        )
        for part in parts_of(found.config)
        for size, what in ((found.sizes[part], _WHAT[part]),)
    ]
    rows.append(("checkpoint", bytes_shown(total), "100 %", "all of these"))
    size = found.sizes["originals"]
    rows.append(
        ("originals", bytes_shown(size), f"{100 * size / total:.0f} %" if total else "", "the files as they came")
    )
    left = element(
        "div",
        element("h3", "By part"),
        element("figure", bytes_bars(found.sizes)),
        table(("part", "bytes on disk", "share", "what it is"), rows, numbers=(1, 2)),
    )
    right = _times(found) if found.coded else _tradeoff(found)
    return joined(element("h2", "Bytes, and what they buy"), element("div", left, right, class_="two"))


_WHAT = {
    "basis": "components that all share",
    "loadings": "coordinates of each adapter",
    "codes": "each adapter on its own",
    "verbatim": "what is kept as it came",
    "metadata": "configurations, figures, and where things lie",
}


def _times(found: PageData) -> Html:
    """How much smaller each adapter is."""
    times = np.array([adapter.times for adapter in found.certified if adapter.times])
    title = element("h3", "Times smaller, adapter by adapter")
    if not len(times):
        return element("div", title, element("p", "No adapter has a code.", class_="soft"))
    text = (
        "The LoRA bytes of an adapter over the bytes of its code, of adapters whose weight change dW is not zero. A "
        "flat spectrum of dW needs the most bytes for an error, whatever the rank."
    )
    return element("div", title, element("figure", histogram(times, "times smaller"), element("figcaption", text)))


def _tradeoff(found: PageData) -> Html:
    if not found.bases:
        nothing = element("p", "Nothing is shared: there is no k to choose.", class_="soft")
        return element("div", element("h3", "Error against bytes"), nothing)
    curve, squares = curve_of(found), found.errors**2
    word = "estimated" if found.ours.get("cut_from") else "certified"
    measured: dict[str, float] = {}
    if curve.bounds:
        title, text, keys = "Error against bytes", _BOUNDS.format(word=word), [("c-curve", "bounds of the rms")]
        if len(squares):
            measured = {"rms": float(np.sqrt(squares.mean())), "mean": float(found.errors.mean())}
            keys += [(f"c-{name}", f"{word} {name} {value:.4f}") for name, value in measured.items()]
    else:
        title, text, keys = "Explained variance against bytes", _FACTORS, [("c-curve", "explained variance")]
    legend = element("div", *[element("span", element("i", class_=c), name) for c, name in keys], class_="key")
    figure = element("figure", tradeoff(curve, measured), legend, element("figcaption", text))
    return element("div", element("h3", title), figure)


_BOUNDS = (
    "The band is a prediction from the spectra for every smaller k, which then no group exceeds: the rms of the "
    "relative dW error over the adapters that the bases were fitted to lies between its edges, sqrt(max(t_A, t_B)) "
    "and sqrt(t_A + t_B), t being the share of a side's energy that is left out. The dots are no prediction: they are "
    "the {word} errors of this checkpoint, at its bytes on disk."
)
_FACTORS = (
    "Under the objective factors the spectra are those of A and B on their own, which bound no error of dW = s B A: "
    "so this is the share of their energy that is kept, for every smaller k, which then no group exceeds. The errors "
    "of dW are above, as certified."
)
