"""Growing: adapters that the bases of a checkpoint hold well enough are projected on them, at the cost of one each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.keys import SIDES, group_id
from ..checkpoint.config import CheckpointRecord, SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ours_of
from ..checkpoint.records import check_components, has_files, metas_of, sizes_of
from ..checkpoint.staging import Staging
from ..checkpoint.summary import share_config, statistics_of
from ..errors import AdapterError, CollectionError, LockedError, WorkspaceError
from ..text import counted, digest_of, listed
from ..workspace.journal import Admission
from .job import Job
from .passes import checkpoint_key_of, project
from .run import Run

log = logging.getLogger(__name__)


def growable(job: Job, out: Path, own: Collection[str]) -> SHAREConfig | None:
    """The configuration of the checkpoint at `out`, if it is this workspace's, and only lacks adapters of the job.

    Args:
        job: of the run.
        out: the checkpoint's folder.
        own: digests of the bases that the workspace has published.
    """
    ours = ours_of(out) or {}
    if ours.get("choice") != job.settings_key or ours.get("basis_digest") not in own:
        return None
    config = read_share_config(out)
    held = [job.admission_of[name] for name in config.adapter_names if name in job.admission_of]
    same = checkpoint_key_of(job.settings_key, held) == ours["digest"]
    return config if same and has_files(out, config.adapter_names) else None


def grow(
    run: Run,
    job: Job,
    out: Path,
    config: SHAREConfig,
    left_out: list[dict[str, Any]],
    threshold: float,
    counts: Mapping[str, int] | None = None,
) -> tuple[bool, dict[str, float]]:
    """Project the adapters that a checkpoint lacks on its bases, and publish it with them if all are held well enough.

    Args:
        run, job: of the adapters that there will be.
        out, config: the checkpoint.
        left_out: adapters that were left out.
        threshold: share of its dW energy that the bases must keep of each.
        counts: group -> n of the adapters that there will be, if the job does not know them all.

    Returns:
        Whether they were published; and the share of its dW energy that each keeps.
    """
    record = record_of(config)
    named = set(config.adapter_names)
    fresh = [r for r in job.journal.admissions if r.name not in named]
    outside = [r.name for r in fresh if not _is_covered(record, job, r)]
    if outside:
        log.info("%s modules for which there is no basis: bases are fitted again", _have(outside))
        return False, dict.fromkeys(outside, 0.0)
    job = replace(job, basis_key=record.basis_digest, grows=True)
    with Staging.open(out, digest_of(["growing", job.checkpoint_key, record.basis_digest])) as staging:
        demand_unchanged(out, config)
        check_components(out, record.components)
        statistics = project(run, job, staging, fresh)
        kept = {name: 1 - f.relative_error**2 for name, f in statistics.items()}
        if not _enough(kept, threshold):
            return False, kept
        shared = [r.name for r in fresh if statistics[r.name].shared]
        grown = record.counting(counts or job.counts).model_copy(update={"projected": [*record.projected, *shared]})
        names = [r.name for r in job.journal.admissions]
        staging.link(out, config.adapter_names)
        new = changed(staging.root, grown, names, job.checkpoint_key, left_out)
        staging.commit(out, new, left_out)
    return True, kept


def demand_unchanged(out: Path, config: SHAREConfig) -> None:
    """Demand that a checkpoint is as it was when it was read, before there was a lock.

    Raises:
        LockedError: if another run has changed it since.
    """
    if read_share_config(out) != config:
        raise LockedError(
            "another run has changed the checkpoint meanwhile", found=out, remedy="Run the same command again."
        )


def _is_covered(record: CheckpointRecord, job: Job, admission: Admission) -> bool:
    """Whether there is a basis for every module of an adapter."""
    shapes = job.shapes[admission.shapes] if job.shares(admission) else {}
    return all(group_id(module, side) in record.groups for module in shapes for side in SIDES)


def _enough(kept: Mapping[str, float], threshold: float) -> bool:
    poor = {name: share for name, share in kept.items() if share < threshold}
    if poor:
        least = min(poor, key=lambda name: (poor[name], name))
        log.info(
            "the bases keep less than %.6g of the dW energy of %s (%.4f of %s): bases are fitted again",
            threshold, counted(len(poor), "new adapter"), poor[least], listed([least]),
        )  # fmt: skip
    elif kept:
        log.info(
            "%s projected on the bases that are there, which keep %.4f of the dW energy or more; fit the bases to "
            "all by lorashare-stream refit CHECKPOINT -o CHECKPOINT", _were([*kept]), min(kept.values()),
        )  # fmt: skip
    return not poor


def _were(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'adapter')} ({listed(names, 3)}) {'was' if len(names) == 1 else 'were'}"


def _have(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'new adapter')} ({listed(names, 3)}) {'has' if len(names) == 1 else 'have'}"


def changed(
    root: Path,
    record: CheckpointRecord,
    names: Sequence[str],
    digest: str,
    skipped: list[dict[str, Any]],
) -> dict[str, Any]:
    """The configuration of a staged checkpoint that has other adapters than the one that it takes its bases from."""
    statistics = [statistics_of(meta) for meta in metas_of(root, names)]
    return share_config(record, statistics, digest=digest, sizes=sizes_of(root, names), skipped=skipped)


def check_kept(job: Job, out: Path) -> None:
    """Demand that a run does not lose adapters of the checkpoint at `out`: a damaged journal may have lost them.

    Raises:
        WorkspaceError: naming those that the workspace neither has nor has taken out.
    """
    if "settings" not in (ours_of(out) or {}):
        return  # none, or not ours to lose
    known = {entry.name for entry in job.journal.entries}
    lost = [name for name in read_share_config(out).adapter_names if name not in known]
    if lost:
        raise WorkspaceError(
            "the checkpoint has adapters that the workspace has not, and the sources do not give",
            found=listed(lost),
            remedy="Name their sources too; or replace the checkpoint without them, by --overwrite.",
        )


def check_sources(job: Job, absent: Sequence[AdapterError], kept: Mapping[str, float], threshold: float) -> None:
    """Demand the sources of all adapters, which are projected anew when bases are fitted again.

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
    """What can be had of new adapters without fitting bases anew, and at what loss."""
    poor = {name: share for name, share in kept.items() if share < threshold}
    if not poor or min(poor.values()) <= 0:
        return ""
    least = min(poor.values())
    shares = listed(f"{name} {share:.4f}" for name, share in sorted(poor.items(), key=lambda item: item[1]))
    return (
        f" Or accept what the bases that are there keep of the dW energy ({shares}; a relative error of "
        f"{(1 - least) ** 0.5:.3f} at most), by --variance {max(least - 1e-4, 1e-6):.4g}."
    )
