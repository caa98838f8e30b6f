"""What the page of a checkpoint shows, gathered: certified errors, bases and their spectra, bytes, where it is from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import ITEMSIZE
from ..adapters.folder import open_tensors, tensor_records
from ..adapters.keys import SIDES, Side, split_group_id
from ..checkpoint.coded import meta_of
from ..checkpoint.config import Group, SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, CONFIG, INDEX, META, PARTS, SKIPPED, SPECTRUM, skipped_of, total_bytes
from ..checkpoint.index import index_of
from ..checkpoint.location import Folder, Place
from ..checkpoint.records import AdapterMeta, metas_of
from ..errors import AdapterError, CheckpointError
from ..hub.scrub import Scrubber
from ..text import is_component, listed

Array = NDArray[np.float64]
_AT_ONCE = 16  # requests
_POINTS = 200  # of a curve


@dataclass(frozen=True, slots=True)
class Basis:
    """One group.

    Attributes:
        kind, depth, side: what it is, where: the last name in the module's path, the first number in it if it has one.
        d, n, k: length of its vectors, how many there are, components.
        energy: trace of its moment.
        explained: share of it that the components hold.
        eigenvalues: (k,), descending.
    """

    kind: str
    depth: int | None
    side: Side
    d: int
    n: int
    k: int
    energy: float
    explained: float
    eigenvalues: Array


@dataclass(frozen=True)
class Origins:
    """Where the adapters came from: from folders, from how many repositories of the Hub, on which terms."""

    local: int
    hub: int
    repositories: int
    closed: int
    licenses: Counter[str]


@dataclass(frozen=True)
class Curve:
    """What each smaller k, the same in all groups, would take and lose; arrays are (points,), k ascending.

    Attributes:
        k: components at most.
        bytes: on disk, all parts together; the last are those of this checkpoint.
        low, high: bounds of the rms relative dW error; under another objective than `delta` the explained variance.
        bounds: whether they are bounds.
    """

    k: NDArray[np.int64]
    bytes: Array
    low: Array
    high: Array
    bounds: bool


@dataclass(frozen=True)
class PageData:
    """All that the page shows.

    Attributes:
        config: of the checkpoint.
        base_model: what its adapters are of; here, and in what follows, without local paths.
        ours: what this package recorded in it.
        sizes: bytes on disk by part, and of the originals.
        certified: the adapters that are compressed, the worst first.
        codes: bytes of their codes, by name, of a coded checkpoint.
        bases: of all groups; none of a coded checkpoint.
        skipped: adapters that were left out, with reasons.
        origins: where the adapters came from.
    """

    config: SHAREConfig
    base_model: str
    ours: Mapping[str, Any]
    sizes: Mapping[str, int]
    certified: tuple[AdapterMeta, ...]
    codes: Mapping[str, int]
    bases: tuple[Basis, ...]
    skipped: tuple[Mapping[str, Any], ...]
    origins: Origins

    @property
    def total(self) -> int:
        """Bytes of the checkpoint on disk."""
        return total_bytes(self.sizes)

    @property
    def coded(self) -> bool:
        """Whether each adapter is coded alone."""
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
    metas, codes = _coded_metas(place, config) if config.coded else _metas(place, config)
    spectra = {} if config.coded else _spectra(place)
    try:
        skipped = tuple(skipped_of(place.root))
        scrub = Scrubber(config.base_model_name_or_path)  # a page is sent to others
        told = scrub({"base_model": config.base_model_name_or_path, "settings": config.record.settings.chosen()})
        certified = [meta for meta in metas if meta.ours.worst_module is not None]  # else it is kept exact
        certified.sort(key=lambda meta: (-meta.ours.relative_error, meta.adapter_name))
        bases = tuple(_basis(group, facts, spectra) for group, facts in config.record.groups.items())
        parts = (*parts_of(config), "originals", "lora")
        sizes = dict.fromkeys(PARTS, 0) | {part: int(config.record.bytes[part]) for part in parts}
        ours = {**config.ours, "settings": told["settings"]}
        reasons, origins = tuple(scrub(item) for item in skipped), _origins(metas)
        return PageData(config, told["base_model"], ours, sizes, tuple(certified), codes, bases, reasons, origins)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise CheckpointError("the figures of the checkpoint cannot be read", found=f"{type(e).__name__}: {e}") from e


def parts_of(config: SHAREConfig) -> tuple[str, ...]:
    """The parts that a checkpoint has."""
    if not config.coded:
        return tuple(part for part in PARTS if part != "codes")
    directions = config.record is not None and "basis" in config.record.bytes
    return tuple(part for part in PARTS if part != "loadings" and (part != "basis" or directions))


def _metas(place: Place, config: SHAREConfig) -> tuple[list[AdapterMeta], dict[str, int]]:
    """What is recorded of each adapter of a SHARE checkpoint, and bytes of codes: of none."""
    _fetch(place, config.adapter_names)
    return list(metas_of(place.root, config.adapter_names)), {}


def _coded_metas(place: Place, config: SHAREConfig) -> tuple[list[AdapterMeta], dict[str, int]]:
    """What is recorded of each adapter of a coded checkpoint, and the bytes of its code."""
    for file in (INDEX, SKIPPED):
        with suppress(FileNotFoundError):  # it has none of these if none was left out; the index is asked for below
            place.file(file)
    adapters = index_of(place.root, config.coded).adapters
    missing = [name for name in config.adapter_names if name not in adapters]
    if missing:
        raise CheckpointError(f"{CONFIG} names what is not there", found=listed(missing))
    key = record_of(config).basis_digest
    metas = [meta_of(adapters[name], key) for name in config.adapter_names]
    return metas, {name: adapter.code.nbytes for name, adapter in adapters.items()}


def _fetch(place: Place, names: Iterable[str]) -> None:
    """Have the files that are read here, if the checkpoint lies on the Hub."""
    if isinstance(place, Folder):
        return
    with suppress(FileNotFoundError):  # it has none if none was left out
        place.file(SKIPPED)
    wanted = [SPECTRUM, *(f"{ADAPTERS}/{name}/{META}" for name in names)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            list(pool.map(place.file, wanted))
        except FileNotFoundError as e:
            pool.shutdown(cancel_futures=True)
            raise CheckpointError(f"{CONFIG} names what is not there", found=str(e)) from e


def _spectra(place: Place) -> dict[str, Array]:
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
    return Basis(kind, depth, side, f.d, f.n, f.k, f.energy, f.explained, eigenvalues)


def kind_and_depth(module: str) -> tuple[str, int | None]:
    """The kind of a module, the last name in its path, and the first number in that, if there is one.

    >>> kind_and_depth("model.layers.3.self_attn.q_proj"), kind_and_depth("blocks.0.to_out.1"), kind_and_depth("head")
    (('q_proj', 3), ('to_out.1', 0), ('head', None))
    """
    parts = module.split(".")
    numbers = [part.isascii() and part.isdecimal() and len(part) < 10 for part in parts]
    last = max((i for i, number in enumerate(numbers) if not number), default=0)
    depth = next((int(part) for part, number in zip(parts[:last], numbers[:last], strict=True) if number), None)
    return ".".join(parts[last:]), depth


def _origins(metas: Iterable[AdapterMeta]) -> Origins:
    told = [meta.ours.hub for meta in metas]
    hub = [facts for facts in told if facts is not None]
    closed = sum(bool(facts.gated or facts.private) for facts in hub)
    licenses = Counter(facts.license or "not stated" for facts in hub)
    return Origins(len(told) - len(hub), len(hub), len({facts.repo for facts in hub}), closed, licenses)


def curve_of(found: PageData) -> Curve:
    """What smaller k, cut from the bases that are there, would take and lose.

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
        whole = energy["A"] + energy["B"]
        explained = 1 - (left["A"] + left["B"]) / whole if whole else np.zeros(len(k))
        return Curve(k, size, explained, explained, bounds=False)
    a, b = (left[side] / (energy[side] or 1.0) for side in SIDES)
    low, high = np.sqrt(np.maximum(a, b)), np.sqrt(np.minimum(a + b, 1.0))
    return Curve(k, size, low, high, bounds=True)
