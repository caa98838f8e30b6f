"""Adapt a SHARE checkpoint to other adapters on the bases that it has: project new ones, take others out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.keys import SIDES, group_id
from ..adapters.safetensors import read_header
from ..checkpoint.config import CheckpointRecord, SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, LOADINGS, ours_of, skipped_of
from ..checkpoint.records import admission_in, check_components, has_files, metas_of, sizes_of
from ..checkpoint.staging import Staging
from ..checkpoint.summary import share_config, statistics_of
from ..errors import AdapterError, CollectionError, LockedError, StreamError, WorkspaceError
from ..text import counted, digest_of, listed
from ..workspace.journal import Admission
from .job import Job, checkpoint_key_of
from .project import project
from .run import Run

log = logging.getLogger(__name__)


def growable(job: Job, own: Collection[str]) -> SHAREConfig | None:
    """Configuration of the checkpoint at the job's output, if it can grow to the job's adapters; else None.

    Args:
        job: of the run.
        own: digests of the bases of checkpoints that may be changed.
    """
    out, ours = job.out, ours_of(job.out) or {}
    if ours.get("choice") != job.settings_key or ours.get("basis_digest") not in own:
        return None
    config = read_share_config(out)
    held = [job.admission_of[name] for name in config.adapter_names if name in job.admission_of]
    same = checkpoint_key_of(job.settings_key, held) == ours["digest"]
    return config if same and has_files(out, config.adapter_names) else None


def grow(
    run: Run,
    job: Job,
    config: SHAREConfig,
    left_out: list[dict[str, Any]],
    threshold: float,
    counts: Mapping[str, int] | None = None,
) -> tuple[bool, dict[str, float]]:
    """Project new adapters on the bases of a checkpoint, and publish it if the bases keep enough of each.

    Args:
        run, job: of the adapters that there will be.
        config: of the checkpoint.
        left_out: adapters that were left out.
        threshold: share of its dW energy that the bases must keep of each.
        counts: group -> n of the adapters that there will be, if the job does not know them all.

    Returns:
        Whether they were published; and the share of its dW energy that each keeps.
    """
    record, out, named = record_of(config), job.out, set(config.adapter_names)
    fresh = [r for r in job.journal.admissions if r.name not in named]
    outside = [r.name for r in fresh if not _is_covered(record, job, r)]
    if outside:
        log.info("%s modules for which there is no basis%s", _have(outside), _again(job))
        return False, dict.fromkeys(outside, 0.0)
    job = replace(job, basis_key=record.basis_digest, grows=True)
    with Staging.open(out, digest_of(["growing", job.checkpoint_key, record.basis_digest])) as staging:
        demand_unchanged(out, config)
        check_components(out, record.components)
        statistics = project(run, job, staging, fresh)
        kept = {name: 1 - f.relative_error**2 for name, f in statistics.items()}
        if not _enough(kept, threshold, job):
            return False, kept
        shared = [r.name for r in fresh if statistics[r.name].shared]
        grown = record.counting(counts or job.counts).model_copy(update={"projected": [*record.projected, *shared]})
        staging.link(out, config.adapter_names)
        _publish(staging, out, grown, [r.name for r in job.journal.admissions], job.checkpoint_key, left_out)
    return True, kept


def _publish(
    staging: Staging,
    out: Path,
    record: CheckpointRecord,
    names: Sequence[str],
    digest: str,
    left_out: list[dict[str, Any]],
) -> None:
    """Publish the staged checkpoint of some adapters on the bases of another one."""
    statistics = [statistics_of(meta) for meta in metas_of(staging.root, names)]
    sizes = sizes_of(staging.root, names)
    staging.commit(out, share_config(record, statistics, digest=digest, sizes=sizes, skipped=left_out), left_out)


def demand_unchanged(out: Path, config: SHAREConfig) -> None:
    """Check that a checkpoint has not changed since it was read without a lock.

    Raises:
        LockedError: if another run has changed it since.
    """
    if read_share_config(out) != config:
        raise LockedError(
            "another run has changed the checkpoint meanwhile", found=out, remedy="Run the same command again."
        )


def _is_covered(record: CheckpointRecord, job: Job, admission: Admission) -> bool:
    """Whether every module of an adapter has a basis."""
    shapes = job.shapes[admission.shapes] if job.shares(admission) else {}
    return all(group_id(module, side) in record.groups for module in shapes for side in SIDES)


def _enough(kept: Mapping[str, float], threshold: float, job: Job) -> bool:
    poor = {name: share for name, share in kept.items() if share < threshold}
    if poor:
        least = min(poor, key=lambda name: (poor[name], name))
        log.info(
            "the bases keep less than %.6g of the dW energy of %s (%.4f of %s)%s",
            threshold, counted(len(poor), "new adapter"), poor[least], listed([least]),
            _again(job),
        )  # fmt: skip
    elif kept:
        log.info(
            "%s projected on the bases that are there, which keep %.4f of the dW energy or more; %s",
            _were([*kept]), min(kept.values()), job.fit_to_all("bases"),
        )  # fmt: skip
    return not poor


def _again(job: Job) -> str:
    return "" if job.alone else ": bases are fitted again"


def _were(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'adapter')} ({listed(names, 3)}) {'was' if len(names) == 1 else 'were'}"


def _have(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'new adapter')} ({listed(names, 3)}) {'has' if len(names) == 1 else 'have'}"


def shrink(out: Path, config: SHAREConfig, names: Sequence[str]) -> None:
    """Take adapters out of a SHARE checkpoint; bases and the other adapters stay as they are.

    Args:
        out, config: the checkpoint.
        names: of adapters that it names, or did before this was interrupted.
    """
    record, gone = record_of(config), set(names)
    if gone.isdisjoint(config.adapter_names) and not any((out / ADAPTERS / name).exists() for name in gone):
        return
    counts = _counts_without(out, config, gone)
    outside = {*_outside(config), *record.projected}
    projected = [n for n in record.projected if n not in gone]
    removed = sorted({*record.removed, *(n for n in config.adapter_names if n in gone - outside)})
    less = record.counting(counts).model_copy(update={"projected": projected, "removed": removed})
    left_out = skipped_of(out)
    stay = [n for n in config.adapter_names if n not in gone]
    digest = checkpoint_key_of(record.choice, [admission_in(meta) for meta in metas_of(out, stay)])
    with Staging.open(out, digest_of(["shrinking", digest])) as staging:
        demand_unchanged(out, config)
        staging.link(out, stay)
        _publish(staging, out, less, stay, digest, left_out)


def _counts_without(out: Path, config: SHAREConfig, gone: Collection[str]) -> dict[str, int]:
    """Number of vectors of each group without some adapters: by subtraction, or by counting if one is damaged."""
    outside, groups = _outside(config), record_of(config).groups

    def vectors(names: Iterable[str]) -> Counter[str]:
        found: Counter[str] = Counter()
        for name in set(names) - outside:
            found.update({group: n for group, n in _vectors(out, name).items() if group in groups})
        return found

    try:
        less = vectors(name for name in config.adapter_names if name in gone)
    except (StreamError, OSError):
        return dict(vectors(name for name in config.adapter_names if name not in gone))
    return {group: basis.n - less[group] for group, basis in groups.items()}


def _outside(config: SHAREConfig) -> set[str]:
    """Adapters that no basis is fitted to; one whose dW is zero may still have loadings."""
    return set(record_of(config).verbatim_adapters)


def _vectors(out: Path, name: str) -> dict[str, int]:
    """Number of vectors of an adapter in each group."""
    return {r.name: r.shape[1] for r in read_header(out / ADAPTERS / name / LOADINGS)}  # of (k, r)


def check_kept(job: Job) -> None:
    """Check that a run keeps all adapters of the checkpoint: a damaged journal may have lost some.

    Raises:
        WorkspaceError: naming those that the workspace neither has nor has taken out.
    """
    if "settings" not in (ours_of(job.out) or {}):
        return  # none, or not ours to lose
    known = {entry.name for entry in job.journal.entries}
    lost = [name for name in read_share_config(job.out).adapter_names if name not in known]
    if lost:
        raise WorkspaceError(
            "the checkpoint has adapters that the workspace has not, and the sources do not give",
            found=listed(lost),
            remedy="Name their sources too; or replace the checkpoint without them, by --overwrite.",
        )


def check_sources(job: Job, absent: Sequence[AdapterError], kept: Mapping[str, float], threshold: float) -> None:
    """Check that all sources exist before bases are fitted again, since every adapter is then projected again.

    Raises:
        CollectionError: naming those that are gone, and what is possible without them.
    """
    gone = [e for e in absent if e.adapter in job.admission_of]
    if not gone:
        return
    raise CollectionError(
        "bases must be fitted again, and every adapter projected anew, but sources are gone; what is lossy already "
        "is not compressed a second time",
        problems=gone,
        remedy="Restore them, or take them out by lorashare-stream remove."
        + offer(kept, threshold)
        + (f" To give up, take out {listed(kept)}, which the workspace has by now (remove --refit)." if kept else ""),
    )


def offer(kept: Mapping[str, float], threshold: float) -> str:
    """Remedy of an error: the threshold at which the existing bases would be accepted."""
    poor = {name: share for name, share in kept.items() if share < threshold}
    if not poor or min(poor.values()) <= 0:
        return ""
    least = min(poor.values())
    shares = listed(f"{name} {share:.4f}" for name, share in sorted(poor.items(), key=lambda item: item[1]))
    return (
        f" Or accept what the bases that are there keep of the dW energy ({shares}; a relative error of "
        f"{(1 - least) ** 0.5:.3f} at most), by --variance {max(least - 1e-4, 1e-6):.4g}."
    )
