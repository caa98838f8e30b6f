"""The page of a checkpoint: one HTML file by jinja2, without scripts and without anything that is fetched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateRuntimeError
from markupsafe import Markup
from numpy.typing import NDArray

from ..adapters.dtypes import ITEMSIZE
from ..adapters.folder import open_tensors, tensor_records
from ..adapters.keys import SIDES, Side, kind_and_depth, split_group_id
from ..checkpoint.coded import meta_of
from ..checkpoint.config import Group, SHAREConfig, read_share_config, record_of
from ..checkpoint.format import (
    ADAPTERS,
    CONFIG,
    INDEX,
    META,
    PARTS,
    SKIPPED,
    SPECTRUM,
    next_bytes,
    skipped_of,
    total_bytes,
)
from ..checkpoint.index import index_of
from ..checkpoint.location import Folder, Place
from ..checkpoint.records import AdapterMeta, metas_of
from ..errors import AdapterError, CheckpointError
from ..hub.scrub import Scrubber
from ..text import bytes_shown, counted, is_component, listed, printable
from ..version import __version__
from . import charts

Array = NDArray[np.float64]
_AT_ONCE = 16  # requests
_POINTS = 200  # of a curve
_KINDS = 12  # of modules that are drawn
_DEPTHS = 96  # columns
_ROWS = 50  # of a table, by two sides
_SENSELESS = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Basis:
    """One group.

    Attributes:
        kind, depth: of its module, see `kind_and_depth`; -1 for no depth.
        d, n, k: length of its vectors, how many there are, components.
        energy: trace of its moment. explained: share of it that the components hold.
        eigenvalues: (k,), descending.
    """

    kind: str
    depth: int
    side: Side
    d: int
    n: int
    k: int
    energy: float
    explained: float
    eigenvalues: Array


@dataclass(frozen=True)
class Curve:
    """Bytes and errors of each smaller k, the same in all groups; arrays are (points,), k ascending.

    Attributes:
        k: components at most.
        bytes: on disk, all parts together; the last are those of this checkpoint.
        low, high: bounds of the rms relative dW error; under another objective than `delta` the explained variance.
        bounds: True where low and high are bounds.
    """

    k: NDArray[np.int64]
    bytes: Array
    low: Array
    high: Array
    bounds: bool


@dataclass(frozen=True)
class PageData:
    """All that the page shows, without local paths.

    Attributes:
        config: of the checkpoint. ours: what this package recorded in it.
        sizes: bytes on disk by part, and of the originals.
        certified: the adapters that are compressed, the worst first.
        codes: bytes of their codes, by name, of a coded checkpoint.
        bases: of all groups; none of a coded checkpoint.
        skipped: adapters that were left out, with reasons.
        origins: numbers of local adapters, of those of the Hub, of closed ones, and of repositories; licenses.
    """

    config: SHAREConfig
    base_model: str
    ours: Mapping[str, Any]
    sizes: Mapping[str, int]
    certified: tuple[AdapterMeta, ...]
    codes: Mapping[str, int]
    bases: tuple[Basis, ...]
    skipped: tuple[Mapping[str, Any], ...]
    origins: Mapping[str, Any]

    @property
    def total(self) -> int:
        """Bytes of the checkpoint on disk."""
        return total_bytes(self.sizes)

    @property
    def coded(self) -> bool:
        """True of a coded checkpoint."""
        return bool(self.config.coded)

    @property
    def errors(self) -> Array:
        """Relative dW errors of the compressed adapters (n,), descending."""
        return np.array([meta.ours.relative_error for meta in self.certified])


def findings_of(place: Place) -> PageData:
    """Read what a checkpoint records of itself; of its tensors only the spectra.

    Raises:
        CheckpointError: if it is none of ours, or not what was written.
    """
    config = read_share_config(place.root)
    if config.record is None:
        raise CheckpointError(
            "this checkpoint has no certified errors, spectra and sizes to draw: lorashare wrote it",
            found=place,
            remedy="Compress its sources by lorashare-stream; lorashare-stream info tells what is known.",
        )
    unsafe = [name for name in config.adapter_names if not is_component(name)]
    if unsafe:
        raise CheckpointError("adapter names that are no path components", found=listed(unsafe))
    with suppress(FileNotFoundError):  # it has none if none was left out
        place.file(SKIPPED)
    metas, codes = _coded_metas(place, config) if config.coded else (_metas(place, config), {})
    spectra = {} if config.coded else _read_spectra(place)
    try:
        scrub = Scrubber(config.base_model_name_or_path)  # a page is sent to others
        told = scrub({"base_model": config.base_model_name_or_path, "settings": config.record.settings.chosen()})
        certified = [meta for meta in metas if meta.ours.worst_module is not None]  # else it is kept exact
        certified.sort(key=lambda meta: (-meta.ours.relative_error, meta.adapter_name))
        parts = (*_parts_of(config), "originals", "lora")
        return PageData(
            config,
            told["base_model"],
            {**config.ours, "settings": told["settings"]},
            dict.fromkeys(PARTS, 0) | {part: int(config.record.bytes[part]) for part in parts},
            tuple(certified),
            codes,
            tuple(_basis(group, facts, spectra) for group, facts in config.record.groups.items()),
            tuple(scrub(item) for item in skipped_of(place.root)),
            _origins(metas),
        )
    except _SENSELESS as e:
        raise CheckpointError("the figures of the checkpoint cannot be read", found=f"{type(e).__name__}: {e}") from e


def _parts_of(config: SHAREConfig) -> tuple[str, ...]:
    """The parts that a checkpoint has."""
    if not config.coded:
        return tuple(part for part in PARTS if part != "codes")
    directions = "basis" in record_of(config).bytes
    return tuple(part for part in PARTS if part != "loadings" and (part != "basis" or directions))


def _metas(place: Place, config: SHAREConfig) -> list[AdapterMeta]:
    """Metadata of each adapter of a SHARE checkpoint; of the Hub, fetched with the spectra."""
    if not isinstance(place, Folder):
        wanted = [SPECTRUM, *(f"{ADAPTERS}/{name}/{META}" for name in config.adapter_names)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                list(pool.map(place.file, wanted))
            except FileNotFoundError as e:
                pool.shutdown(cancel_futures=True)
                raise CheckpointError(f"{CONFIG} names what is not there", found=str(e)) from e
    return list(metas_of(place.root, config.adapter_names))


def _coded_metas(place: Place, config: SHAREConfig) -> tuple[list[AdapterMeta], dict[str, int]]:
    """Metadata of each adapter of a coded checkpoint, and the bytes of its code."""
    with suppress(FileNotFoundError):  # which is told when it is read
        place.file(INDEX)
    adapters = index_of(place.root, config.coded).adapters
    missing = [name for name in config.adapter_names if name not in adapters]
    if missing:
        raise CheckpointError(f"{CONFIG} names what is not there", found=listed(missing))
    key = record_of(config).basis_digest
    metas = [meta_of(adapters[name], key) for name in config.adapter_names]
    return metas, {name: adapter.code.nbytes for name, adapter in adapters.items()}


def _read_spectra(place: Place) -> dict[str, Array]:
    paths = (place.root / SPECTRUM,)
    try:
        with open_tensors(paths) as tensors:
            return {r.name: tensors.raw(r).copy().view("<f8") for r in tensor_records(paths)}
    except (FileNotFoundError, AdapterError, ValueError) as e:
        raise CheckpointError(
            f"{SPECTRUM} cannot be read", found=str(e), remedy="Compress its sources again, or fetch it again."
        ) from e


def _basis(group: str, f: Group, spectra: Mapping[str, Array]) -> Basis:
    module, side = split_group_id(group)
    eigenvalues = spectra[group]
    if len(eigenvalues) != f.k or not np.isfinite(eigenvalues).all():
        raise ValueError(f"{len(eigenvalues)} eigenvalues of {group}, where k is {f.k}")
    kind, depth = kind_and_depth(module)
    return Basis(kind, -1 if depth is None else depth, side, f.d, f.n, f.k, f.energy, f.explained, eigenvalues)


def _origins(metas: Sequence[AdapterMeta]) -> dict[str, Any]:
    hub = [meta.ours.hub for meta in metas if meta.ours.hub is not None]
    return {
        "local": len(metas) - len(hub),
        "hub": len(hub),
        "closed": sum(bool(facts.gated or facts.private) for facts in hub),
        "repositories": len({facts.repo for facts in hub}),
        "licenses": Counter(facts.license or "not stated" for facts in hub),
    }


def curve_of(found: PageData) -> Curve:
    """Bytes and errors of each smaller k, cut from the bases that are there.

    With t the share of a side's summed trace that its bases leave out, the mean square of the relative dW error over
    the adapters of the moments lies between max(t_A, t_B) and t_A + t_B. That holds under `delta`, where traces are
    of dW; otherwise the explained variance is all that the spectra tell.
    """
    most = max((basis.k for basis in found.bases), default=0)
    powers = 2 ** np.arange(most.bit_length())
    k = np.union1d(np.linspace(0, most, min(most + 1, _POINTS)).round().astype(np.int64), powers)
    dtype = found.ours["dtype"]
    left = {side: np.zeros(len(k)) for side in SIDES}
    energy = dict.fromkeys(SIDES, 0.0)
    basis_bytes, loadings = np.zeros(len(k)), np.zeros(len(k))
    for basis in found.bases:
        lost = np.append(np.cumsum(basis.eigenvalues[::-1])[::-1], 0.0)[np.minimum(k, basis.k)]  # by the cut
        left[basis.side] += np.clip(basis.energy * (1 - basis.explained) + lost, 0.0, basis.energy)
        energy[basis.side] += basis.energy
        basis_bytes += np.minimum(k, basis.k) * float(ITEMSIZE[dtype] * basis.d + 8)  # and an eigenvalue
        loadings += np.minimum(k, basis.k) * float(ITEMSIZE[dtype] * basis.n)
    if loadings[-1] > found.sizes["loadings"]:  # not all vectors have loadings on their basis
        loadings *= found.sizes["loadings"] / loadings[-1]
    size = basis_bytes + loadings
    size += found.total - size[-1]  # verbatim, metadata, headers: whatever does not grow with k
    if found.ours["objective"] != "delta":
        whole = sum(energy.values())
        explained = 1 - (left["A"] + left["B"]) / whole if whole else np.zeros(len(k))
        return Curve(k, size, explained, explained, bounds=False)
    a, b = (left[side] / (energy[side] or 1.0) for side in SIDES)
    low, high = np.sqrt(np.maximum(a, b)), np.sqrt(np.minimum(a + b, 1.0))
    return Curve(k, size, low, high, bounds=True)


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
    except (*_SENSELESS, TemplateRuntimeError) as e:
        raise CheckpointError("the figures of the checkpoint cannot be drawn", found=f"{type(e).__name__}: {e}") from e


def _clean(value: object) -> object:
    """A value without control characters, and without marks that turn the order of text around."""
    return printable(value, 10_000) if isinstance(value, str) and not isinstance(value, Markup) else value


def _context(found: PageData) -> dict[str, Any]:
    errors, ours, names = found.errors, found.ours, found.config.adapter_names
    kinds = _kinds(found.bases)
    drawn = dict(list(kinds.items())[:_KINDS])
    return {
        "found": found, "ours": ours, "sizes": found.sizes, "parts": _parts_of(found.config), "version": __version__,
        "names": names, "asked": record_of(found.config).settings.asked if found.coded else (),
        "k": sorted({basis.k for basis in found.bases}), "each": next_bytes(found.sizes, len(names)),
        "errors": errors, "median": np.median(errors) if len(errors) else 0,
        "p95": np.quantile(errors, 0.95) if len(errors) else 0,
        "histogram": charts.histogram(errors) if len(errors) else "",
        "tradeoff": _cloud(found) if found.coded else _tradeoff(found),
        "num_kinds": len(kinds), "kinds": _table(kinds), "spectra": _spectra(drawn), "heat": _heatmaps(drawn),
        "num_skipped": max(ours["num_skipped"], len(found.skipped)),
        "reasons": _reasons(found.skipped),
        "licences": [f"{name} ({n})" for name, n in found.origins["licenses"].most_common()],
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
    shown = curve.bounds and len(errors)
    measured = {"rms": float(np.sqrt((errors**2).mean())), "mean": float(errors.mean())} if shown else {}
    return {"figure": charts.tradeoff(curve, measured), "bounds": curve.bounds, "measured": measured}


def _kinds(bases: Sequence[Basis]) -> dict[str, list[Basis]]:
    """The groups by the kind of their module, that with most energy first."""
    found: dict[str, list[Basis]] = {}
    for basis in bases:
        found.setdefault(basis.kind, []).append(basis)
    return dict(sorted(found.items(), key=lambda item: (-sum(b.energy for b in item[1]), item[0])))


def _spectra(drawn: Mapping[str, Sequence[Basis]]) -> dict[str, Markup]:
    """A figure for each kind, all on the same axes: down to the power of ten below all shares, six decades at most."""
    every = [b for bases in drawn.values() for b in bases]
    least = min((float(v) / b.energy for b in every if b.energy > 0 for v in b.eigenvalues[-1:] if v > 0), default=0.1)
    floor = 10.0 ** max(math.floor(math.log10(min(least, 0.1))), -6)
    most = max((b.k for b in every), default=0)
    return {kind: charts.spectrum(kind, bases, floor, most) for kind, bases in drawn.items()}


def _heatmaps(drawn: Mapping[str, Sequence[Basis]]) -> dict[str, Any]:
    """Mean k and explained variance of each kind and side by depth; NaN where there is nothing."""
    depths = sorted({b.depth for bases in drawn.values() for b in bases})
    step = max(1, math.ceil(len(depths) / _DEPTHS))
    column = {depth: i // step for i, depth in enumerate(depths)}
    sums = np.zeros((3, 2 * len(drawn), len(depths[::step])))
    for row, bases in enumerate(drawn.values()):
        for b in bases:
            at = (2 * row + SIDES.index(b.side), column[b.depth])
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
