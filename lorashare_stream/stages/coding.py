"""Coding: reconcile a folder with the coded checkpoint of some adapters.

Whoever changes a coded checkpoint says which adapters it is to have, and by which rule they are coded. What is there
already, coded by the same rule, stays as it is; the rest is encoded, and all is published by two renames.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_config, digest_files
from ..checkpoint.coded import meta_of, staged_adapters
from ..checkpoint.config import CheckpointRecord, SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, DIRECTIONS, INDEX, OURS, PACKS, SHARED, ours_of, skipped_of, total_bytes
from ..checkpoint.index import VERSION, WITH_DIRECTIONS, CodedAdapter, Index, Pack, index_of, read_index, write_index
from ..checkpoint.location import Folder
from ..checkpoint.packs import read_verbatim, remove_from_packs, write_packs
from ..checkpoint.publish import staging_folder
from ..checkpoint.records import REPAIR
from ..checkpoint.staging import Staging
from ..checkpoint.summary import share_config, statistics_of
from ..codec.code import COARSEST, FINEST
from ..codec.rate import Curve, curve_of, step_for
from ..errors import AdapterError, BudgetError, CheckpointError, GoneError, refusal
from ..files import atomic_file, link_or_copy, own_folder, remove_tree, sync
from ..plan.plan import Plan
from ..text import bytes_shown, counted, digest_of, listed
from ..workspace.journal import Admission
from ..workspace.workspace import Workspace
from .directions import fitted
from .encode import directions_at, encode_adapter, subject_of
from .job import Job, checkpoint_key_of, record_of_plan
from .project import write_adapters
from .run import Run, check_none_lost, sample_of

ENOUGH, LEAST = 0.97, 0.94  # of a limit on bytes: what is left then is not worth to encode all once more
_DEFLATED, _RECORDS, _RECORD = 0.84, 5000, 200  # of tensors that are no LoRA; bytes of records, and of each
_DRIFT = 0.1  # of codes that are wanted more or fewer than there are, how far off a prediction may be
NOTHING = 0.9  # a mean dW error that no limit on bytes is met by
_AIMS = (0.985, 0.995, 0.98, 0.95, 0.8)  # of a limit on bytes, one after the other
Skipped = list[dict[str, Any]]
Method = Literal["projection", "recompute"]
Publishing = Callable[[str], object]
Encode = Callable[[Staging, "Target", Sequence[Admission]], object]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Target state of a coded checkpoint.

    Attributes:
        out: its folder.
        record: what it is of; its `basis_digest` is what decides the codes.
        admissions: its adapters.
        digest: of all that decides it.
        left_out: adapters that were left out, with reasons.
        step: of its quantiser, where a limit on bytes decides; else 0.
        directions: on which it is coded, as they are stored; empty if there are none.
    """

    out: Path
    record: CheckpointRecord
    admissions: Sequence[Admission]
    digest: str
    left_out: Skipped
    step: float = 0.0
    directions: bytes = b""

    def at(self, step: float) -> Target:
        """Target with another step."""
        return self._with(step, self.directions)

    def on(self, directions: bytes) -> Target:
        """Target on other directions."""
        return self._with(self.step, directions)

    def growing(self, found: Reusable) -> Target:
        """Target on the directions of the existing checkpoint, which are not fitted to what is new."""
        there, names = found.record, [r.name for r in self.admissions]
        if there is None or not there.settings.directions:
            return self
        projected = [*(n for n in there.projected if n in names), *(n for n in names if n not in found.names)]
        removed = {*there.removed} | ({*found.index.adapters} - {*names, *there.projected})  # some may be back
        removed = removed if found.directions else set()
        facts = {"projected": projected, "removed": sorted(removed)}
        return replace(self, record=self.record.model_copy(update=facts)).on(found.directions)

    def _with(self, step: float, directions: bytes) -> Target:
        own = [hashlib.sha256(directions).hexdigest()] if directions else []
        rule = digest_of(["coded", VERSION, self.record.choice, step, *own])  # what decides the code of an adapter
        record = self.record.model_copy(update={"basis_digest": rule})
        return replace(self, step=step, directions=directions, record=record)


def staged_key(target: Target) -> str:
    """Digest under which a target is staged."""
    return digest_of([target.digest, target.record.basis_digest])


def target_of(plan: Plan, job: Job, left_out: Skipped) -> Target:
    """Target of a job."""
    record = record_of_plan(plan, basis_digest="")
    return Target(job.out, record, job.journal.admissions, job.checkpoint_key, left_out).at(0.0)


def target_there(out: Path, config: SHAREConfig, admissions: Sequence[Admission], left_out: Skipped) -> Target:
    """Target of an existing coded checkpoint with other adapters."""
    record = record_of(config)
    return Target(out, record, admissions, checkpoint_key_of(record.choice, admissions), left_out).at(0.0)


def is_current(target: Target) -> bool:
    """Whether the target is published and its files exist."""
    ours = ours_of(target.out) or {}
    if ours.get("digest") != target.digest or skipped_of(target.out) != target.left_out:
        return False
    try:
        index = index_of(target.out, read_share_config(target.out).coded)
    except (CheckpointError, OSError):
        return False
    return all(_is_there(target.out, pack) for pack in index.packs)


def _is_there(root: Path, pack: Pack) -> bool:
    try:
        return os.stat(root / pack.file).st_size == pack.nbytes
    except OSError:
        return False


@dataclass(frozen=True)
class Reusable:
    """Contents of an existing coded checkpoint that a target can reuse.

    Attributes:
        index: of it. gone: the adapters that cannot stay.
        record: what it says of itself.
        step: with which it was coded. directions: on which, as they are stored.
    """

    index: Index = field(default_factory=Index)
    gone: frozenset[str] = frozenset()
    record: CheckpointRecord | None = None
    step: float = 0.0
    directions: bytes = b""

    @property
    def names(self) -> list[str]:
        """Names of the adapters that can stay."""
        return [name for name in self.index.adapters if name not in self.gone]


def reusable(target: Target) -> Reusable:
    """Find the adapters of an existing coded checkpoint that a target keeps: those coded by the same rule."""
    try:
        config = read_share_config(target.out)
        if record_of(config).choice != target.record.choice or not config.coded:
            return Reusable()
        index, step = index_of(target.out, config.coded), float(config.coded["step"])
        directions = _directions_in(target.out, index)
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return Reusable()
    missing = {pack for pack in index.packs if not _is_there(target.out, pack)}
    known = {r.name: r for r in target.admissions}

    def stays(adapter: CodedAdapter) -> bool:
        r = known.get(adapter.name)
        packs = {adapter.code.pack, *(index.tensors[digest].at.pack for digest in adapter.verbatim.values())}
        if r is None or adapter.record.get("sha256") != r.digest or packs & missing:
            return False
        return digest_config(adapter.config) == r.config_digest

    gone = frozenset(name for name, adapter in index.adapters.items() if not stays(adapter))
    return Reusable(index, gone, record_of(config), step, directions)


def _directions_in(out: Path, index: Index) -> bytes:
    """Serialized directions of a coded checkpoint; empty if it has none."""
    adapter = next((a for a in index.adapters.values() if DIRECTIONS in a.verbatim), None)
    return b"" if adapter is None else read_verbatim(Folder(out).read, index, adapter, DIRECTIONS)


def code(
    run: Run, job: Job, work: Workspace | None, target: Target, publishing: Publishing, *, refit: bool = False
) -> Method:
    """Reconcile a coded checkpoint with its target: keep what can stay, encode the rest, publish.

    Args:
        run, job, work: of the adapters that it is to have.
        target: what it is to be.
        publishing: told the key of what is published, before it is.
        refit: fit directions to all, which codes all again, unless those that are there are so.

    Returns:
        `projection` if adapters that were there have stayed as they were, else `recompute`.

    Raises:
        BudgetError: if so few bytes cannot be had, with the fewest that can.
        CollectionError: naming adapters that must be coded, and whose sources are gone.
    """
    size, found = job.settings.byte_limit(sum(sum(r.sizes) for r in job.journal.admissions)), reusable(target)
    encode = partial(_encode, run, job)
    target = target.growing(found)
    if refit and (target.record.projected or target.record.removed):
        found = Reusable()
    if job.settings.directions and not found.names:
        target = _on_fitted(run, job, work, target)
    elif target.record.projected:
        count = counted(len(target.record.projected), "adapter")
        log.info("directions are not fitted to %s: %s", count, job.fit_to_all("directions"))
    if size is None or found.names:
        with _staged(target.at(found.step if size else 0.0), found, encode) as staged:
            if size is None or staged.total <= size:
                staged.publish(publishing)
                return "projection" if found.names else "recompute"
        _check_recodable(job, target, staged, size)
        log.info("%s with the step that is recorded: all adapters are coded again", bytes_shown(staged.total))
        if job.settings.directions:
            target = _on_fitted(run, job, work, target)
    _check_sources(run, job, target.admissions)
    try:
        _code_within(run, job, target, size, publishing)
    except BudgetError:  # nothing of it is of use
        _clear(target)
        raise
    return "recompute"


def _on_fitted(run: Run, job: Job, work: Workspace | None, target: Target) -> Target:
    """Target with directions fitted to exactly its adapters."""
    _check_sources(run, job, target.admissions)
    assert work is not None  # without one the sources of all are not known
    record = target.record.model_copy(update={"projected": [], "removed": []})
    return replace(target, record=record).on(fitted(run, job, work))


def _clear(target: Target) -> None:
    """Remove the staging folder of a target, whatever is staged there."""
    if staging_folder(target.out).is_dir():
        with Staging.open(target.out, staged_key(target)) as staging:
            staging.clear()


def _check_recodable(job: Job, target: Target, staged: _Staged, size: int) -> None:
    """Check that all sources exist before everything is coded again to meet a limit on bytes."""
    gone = [r.name for r in target.admissions if r.name not in job.adapters]
    if gone:
        staged.staging.clear()
        raise BudgetError(
            "the checkpoint would exceed its limit, and its adapters cannot be coded again, since no source is known "
            f"of {counted(len(gone), 'adapter')} ({listed(gone, 3)})",
            found=f"{bytes_shown(staged.total)} at the step that is recorded", expected=bytes_shown(size),
            remedy="Restore the sources, or name the workspace by --workspace; or compress all sources again, by "
            f"--max-bytes {staged.total} or more for the errors of now.",
        )  # fmt: skip


def _check_sources(run: Run, job: Job, admissions: Sequence[Admission]) -> None:
    """Check that the sources of adapters exist before they are encoded."""
    gone = [r for r in admissions if r.name not in job.adapters]
    if gone:
        why = {e.adapter: e for e in run.plan.absent}
        raise refusal(
            f"{counted(len(gone), 'adapter')} must be coded from their sources, which are gone",
            [why.get(r.name) or GoneError("its source is gone", adapter=r.name, found=r.source_id) for r in gone],
            "Restore them, or take the adapters out by lorashare-stream remove.",
        )


def keep(target: Target, publishing: Publishing) -> None:
    """Take adapters out of a coded checkpoint: rewrite the packs that hold them, link the others.

    Raises:
        CheckpointError: if one that is to stay is damaged.
    """
    if is_current(target):
        _clear(target)
        return
    found = reusable(target)
    lost = {r.name for r in target.admissions} - {*found.names}
    if lost:
        raise CheckpointError("adapters that are to stay are damaged", found=listed(sorted(lost)), remedy=REPAIR)
    with _staged(target.growing(found).at(found.step), found, lambda *_: None) as staged:
        staged.publish(publishing)


def _code_within(run: Run, job: Job, target: Target, size: int, publishing: Publishing) -> None:
    """Encode all adapters with the step that gives nearly `size` bytes, predicted by the rates of a sample."""
    adapters = [job.adapter(r.name) for r in target.admissions]
    alive = [adapter for adapter, r in zip(adapters, target.admissions, strict=True) if job.shares(r)]
    curves = rates(run, job, alive)
    part, whole = (sum(adapter.layout.lora_bytes for adapter in some) for some in (sample_of(alive), alive))

    def predicted(step: float) -> float:
        return sum(curve.bytes_at(step) for curve in curves.values()) * whole / max(1, part)

    extras = sum(a.layout.extra_bytes + a.layout.lora_bytes for a in adapters) - whole
    codes, factor, drift = 1, 1.0, 0.0
    beside = int(_DEFLATED * extras) + _RECORDS + _RECORD * len(target.admissions)
    for aim in _AIMS:
        wanted = max(1.0, aim * size - beside)
        step = step_for(predicted, wanted * (1 - drift * min(1.0, abs(1 - wanted / codes))) / factor)
        with _staged(target.at(step), Reusable(), partial(_encode, run, job)) as staged:
            error = staged.config["compression_stats"][OURS]["errors"]["mean"]
            enough = staged.total >= (LEAST if drift else ENOUGH) * size or step < 1.01 * FINEST or aim == _AIMS[-1]
            if staged.total <= size and error <= NOTHING and enough:
                staged.publish(publishing)
                return
            codes = staged.sizes["codes"]
            factor, drift = codes / max(1.0, predicted(step)) or 1.0, _DRIFT
            fine = not codes and step < COARSEST / 2  # so that all LoRA tensors have stayed as they are
            beside = staged.total - (whole if fine else codes)
            codes = max(1, codes)
        if error > NOTHING and staged.total >= ENOUGH * size:
            break
    least = int(beside + sum(curve.bytes_within(NOTHING) for curve in curves.values()) * whole / max(1, part))
    raise BudgetError(
        "so few bytes leave nothing of the adapters", found=f"{bytes_shown(size)} asked for",
        expected=f"about {bytes_shown(least)} for a dW error of {NOTHING:g}, {bytes_shown(beside)} of them no codes",
        remedy=f"Use --max-bytes {int(1.1 * least)} or more, or --max-error to ask for an error.",
    )  # fmt: skip


def rates(run: Run, job: Job, adapters: Sequence[Adapter]) -> dict[str, Curve]:
    """Rate curves of an evenly spaced sample of adapters, by name; adapters whose dW is zero have none."""
    some = sample_of(adapters)
    lost: list[AdapterError] = []
    task = partial(rate_adapter, job.bases / SHARED if job.settings.directions else None)
    found = run.map("rate", task, run.arriving(some, lost), len(some), run.release)
    curves = {name: curve for name, curve in found if curve is not None}
    check_none_lost(lost)
    return curves


def rate_adapter(directions: Path | None, adapter: Adapter) -> tuple[str, Curve | None]:
    """Rate curve of one adapter on the directions in a file, and its name; no curve if dW is zero."""
    with adapter.open() as tensors:
        return adapter.name, curve_of(subject_of(adapter, tensors, directions_at(directions)))


def _encode(run: Run, job: Job, staging: Staging, target: Target, admissions: Sequence[Admission]) -> None:
    _check_sources(run, job, admissions)
    file = staging.root / SHARED
    if target.directions:
        with atomic_file(file) as f:
            f.write(target.directions)
    directions = file if target.directions else None
    job = replace(job, basis_key=target.record.basis_digest, step=target.step, directions=directions)
    write_adapters(run, job, staging, admissions, "encode", encode_adapter)


@dataclass(frozen=True)
class _Staged:
    """Staged coded checkpoint, complete but for its configuration."""

    target: Target
    staging: Staging
    index: Index
    sizes: Mapping[str, int]
    config: Mapping[str, Any]

    @property
    def total(self) -> int:
        return total_bytes(self.config["compression_stats"][OURS]["bytes"])

    def publish(self, publishing: Publishing) -> None:
        publishing(self.config["compression_stats"][OURS]["basis_digest"])
        for name in (ADAPTERS, SHARED):
            remove_tree(self.staging.root / name)
        self.staging.commit(self.target.out, self.config, self.target.left_out)


@contextmanager
def _staged(target: Target, found: Reusable, encode: Encode) -> Iterator[_Staged]:
    """Stage a target: link what can stay, encode and pack the rest; resume the staging of a killed run."""
    with Staging.open(target.out, staged_key(target)) as staging:
        root = staging.root
        if not (root / INDEX).exists():
            remove_tree(root / PACKS)
            index = _linked(target.out, root, found)
            fresh = [r for r in target.admissions if r.name not in index.adapters]
            encode(staging, target, fresh)
            write_index(root / INDEX, write_packs(root, staged_adapters(root, [r.name for r in fresh]), index))
        index = read_index(root / INDEX)
        codes = sum(adapter.code.nbytes for adapter in index.adapters.values())
        common = {digest for a in index.adapters.values() if (digest := a.verbatim.get(DIRECTIONS))}
        basis = sum(index.tensors[digest].at.nbytes for digest in common)
        verbatim = sum(tensor.at.nbytes for tensor in index.tensors.values()) - basis
        files = (root / INDEX).stat().st_size + sum(pack.nbytes for pack in index.packs)
        sizes = {"codes": codes, "verbatim": verbatim, "metadata": files - codes - basis - verbatim}
        sizes |= {"basis": basis} if basis else {}
        yield _Staged(target, staging, index, sizes, _config(target, digest_files([root / INDEX]), index, sizes))


def _linked(out: Path, root: Path, found: Reusable) -> Index:
    """Stage the packs that can stay: hard links, or rewritten without removed adapters."""
    own_folder(root / PACKS)
    index = found.index
    if found.gone:
        index = remove_from_packs(root, index, found.gone, Folder(out).read)
    for pack in index.packs:
        if not (root / pack.file).exists():
            link_or_copy(out / pack.file, root / pack.file)
    sync(root / PACKS)
    return index


def _config(target: Target, digest: str, index: Index, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Content of share_config.json; `digest` is that of the index."""
    key = digest_of([target.record.basis_digest, target.digest])
    statistics = [statistics_of(meta_of(index.adapters[r.name], key)) for r in target.admissions]
    return share_config(
        target.record.model_copy(update={"basis_digest": key}),
        statistics,
        digest=target.digest,
        sizes=sizes,
        skipped=target.left_out,
        coded={"version": WITH_DIRECTIONS if "basis" in sizes else VERSION, "step": target.step, "index": digest},
        modules={row[0] for adapter in index.adapters.values() for row in adapter.layout},
    )
