"""Pipeline: the main job on one page, from a plan to a published checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .adapters.scaling import ModuleShape, Shapes
from .adapters.source import Source
from .checkpoint.config import SHAREConfig, record_of
from .checkpoint.format import ours_of, skipped_of
from .checkpoint.publish import check_output, output_folder
from .checkpoint.records import has_files, sizes_of
from .checkpoint.staging import Staging, recover
from .checkpoint.summary import share_config
from .errors import AdapterError, WorkspaceError, skipped_as_json
from .files import own_path, write_sealed
from .hub.fetch import bytes_to_fetch, fetching_for
from .hub.lookup import resolve_on_hub
from .linalg.device import resolve_device
from .plan.catalog import make_plan
from .plan.file import plan_as_json
from .plan.plan import Plan
from .runtime.executors import executor_for, mapper_for
from .runtime.progress import Progress, silent
from .settings import Settings
from .stages.adapt import check_kept, check_sources, demand_unchanged, grow, growable
from .stages.fit import basis_key_of, record_of_bases, write_bases
from .stages.ingest import ingest, pickles_kept
from .stages.job import Job, make_job
from .stages.project import project
from .stages.run import Run, check_disk, places_of
from .stages.update import catch_up, sum_and_fit
from .workspace.journal import Admission, Journal
from .workspace.workspace import Workspace

Method = Literal["current", "projection", "recompute"]


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        skipped: the adapters that were left out, with reasons; none unless `on_error` is `"skip"`.
        method: `current` if there was nothing to do; `projection` if adapters that were there stayed as they were, and
            new ones were projected on the bases, or coded; `recompute` if all were projected on new bases, or coded.
        kept: share of the dW energy that the bases that were there keep, of each new adapter that was tried on them.
        admissions: of all adapters that are not taken out.
    """

    skipped: list[AdapterError]
    method: Method
    kept: dict[str, float] = field(default_factory=dict)
    admissions: Sequence[Admission] = ()


def plan_for(
    sources: Sequence[Source],
    settings: Settings,
    workspace: Path | None = None,
    *,
    recalled: Collection[str] = (),
    runs: bool = True,
    progress: Progress = silent,
) -> Plan:
    """Plan a run over some sources; revisions on the Hub are pinned by it, and stay so.

    Args:
        sources: of the adapters.
        settings: of the run.
        workspace: adapters that it holds keep their names and revisions, and it its base model and the shapes of its
            modules; what is read on the Hub is kept in it.
        recalled: names of its adapters whose sources nobody has named: what needs no values of theirs is done
            without them if they are gone.
        runs: whether the plan is to be run; else configurations on the Hub are not read, and nothing is written.
        progress: passes what is read on the Hub on as it comes.

    Raises:
        UnreachableError: if the Hub does not answer.
    """
    if workspace is None:
        sources, surveyed = resolve_on_hub(sources, settings, configs=runs, progress=progress)
        return make_plan(sources, settings, surveyed=surveyed)
    work = Workspace(workspace)
    journal, base = work.journal(), work.base_model()
    sources, surveyed = resolve_on_hub(
        sources, settings, workspace, configs=runs, writes=runs or work.exists(), progress=progress
    )
    held = _held(work, journal)
    return make_plan(
        sources,
        settings,
        surveyed=surveyed,
        journal=journal,
        held=held,
        known=_known(held) if settings.fits else {},
        bound_base=base,
        recalled=recalled,
    )


def _held(work: Workspace, journal: Journal) -> dict[str, Shapes]:
    """Shapes of the shared modules of each adapter of a workspace, by name."""
    try:
        found = work.shapes_of(journal, {})
    except WorkspaceError:  # damaged: the sources tell, and the run mends it
        return {}
    return {admission.name: found[admission.shapes] for admission in journal.admissions}


def _known(held: Mapping[str, Shapes]) -> dict[str, ModuleShape]:
    """Shapes of the modules of a workspace.

    Raises:
        WorkspaceError: if one has several: such adapters can only be coded alone.
    """
    known: dict[str, ModuleShape] = {}
    for shapes in {id(shapes): shapes for shapes in held.values()}.values():
        for module, shape in shapes.items():
            first = known.setdefault(module, shape)
            if first[1:] != shape[1:]:
                raise WorkspaceError(
                    "adapters of the workspace, coded alone until now, have a module that is not the same in all",
                    key=module,
                    found=f"d_in, d_out, experts, parameters {list(shape[1:])}",
                    expected=f"{list(first[1:])}",
                    remedy="Compress their sources into another --workspace.",
                )
    return known


def default_workspace(out: Path) -> Path:
    """Default workspace of an output: beside it."""
    return out.parent / f"{out.name}.workspace"


@contextmanager
def session(
    plan: Plan,
    out: Path,
    root: Path | None,
    *,
    executor: Any = None,
    take_lock: bool = False,
    progress: Progress = silent,
) -> Iterator[tuple[Run, Workspace | None]]:
    """Open executor, workspace, mapper and fetcher of a run; no workspace if `root` is None."""
    folder, threads = root or out.parent, resolve_device(plan.settings.device) != "cpu"
    with (
        executor_for(executor, plan.processes, threads=threads) as workers,
        nullcontext() if root is None else Workspace.open(root, plan.binding, take_lock=take_lock) as work,
        mapper_for(workers, places_of(plan, folder, out, workspace=root is not None)) as mapper,
        fetching_for(plan.settings, root) as fetcher,
    ):
        yield Run(plan, mapper, progress, fetcher, work.check_held if work else lambda: None), work


def compress(
    plan: Plan,
    out: Path,
    *,
    workspace: Path | None = None,
    executor: Any = None,
    overwrite: bool = False,
    refit: bool = False,
    accept: float | None = None,
    there: SHAREConfig | None = None,
    also_left_out: Sequence[dict[str, Any]] = (),
    take_lock: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Run a plan: ingest, accumulate, fit, project, commit. Run again, it goes on where it was.

    Args:
        plan: what to do.
        out: the checkpoint's folder.
        workspace: the folder of resumable state; beside `out` if None.
        executor: does the tasks: a `concurrent.futures.Executor` or a `distributed.Client`; processes of this machine
            if None.
        overwrite: replace a checkpoint of another run at `out`.
        refit: fit the bases to all adapters, even if those that are there hold new ones well enough.
        accept: share of its dW energy that the bases that are there must keep of each new adapter, else all bases are
            fitted again; the settings' `variance_threshold` if None.
        there: configuration of the checkpoint at `out`, which is to be changed, as it was when the plan was made.
        also_left_out: adapters that were left out of the checkpoint before, and are not in the plan.
        take_lock: take over the lock of another host that still seems to be alive.
        progress: passes the results of every step on as they come.

    Raises:
        CollectionError: naming the adapters that cannot be compressed.
        BudgetError: if memory or disk will not do.
        ClusterError: if a cluster cannot do it.
        Stopped: if a process was killed, naming what it did.
        LockedError: if another run holds the workspace or the output.
        WorkspaceError, UsageError: if the folders hold something else.
    """
    plan.validate()
    out = output_folder(out)
    root = (workspace or own_path(default_workspace(out))).absolute()
    known = {r.name for r in Workspace(root).journal().admissions}
    check_disk(plan, root, out, adds=out.exists(), fetch=bytes_to_fetch(plan.adapters, known))
    own = {record_of(there).basis_digest} if there is not None else set()
    check_output(out, own=own | Workspace(root).published(), overwrite=overwrite)  # before a workspace is made for it
    with (
        session(plan, out, root, executor=executor, take_lock=take_lock, progress=progress) as (run, work),
        pickles_kept(plan, root) as plan,
    ):
        assert work is not None
        run, own = replace(run, plan=plan), own | work.published()
        recover(out)
        check_output(out, own=own, overwrite=overwrite)
        if there is not None:
            demand_unchanged(out, there)
        write_sealed(work.root / "plan.json", plan_as_json(plan))

        skipped = [*plan.refused, *ingest(run, work, out)]
        left_out = [*also_left_out, *skipped_as_json(skipped)]
        work.skip(left_out)
        job = make_job(plan, work, out)
        if not overwrite:
            check_kept(job)
        enough = None if refit else plan.settings.variance_threshold if accept is None else accept
        method, kept = reconcile(run, job, work, Wanted(left_out, enough, own, overwrite))
    return Outcome(skipped, method, kept, job.journal.admissions)


@dataclass(frozen=True)
class Wanted:
    """Wanted state of a checkpoint, beside its adapters and settings, which the job has.

    Attributes:
        left_out: adapters that were left out of it, with reasons.
        enough: share of its dW energy that the bases that are there must keep of each new adapter; None if bases, or
            directions, are to be fitted to all adapters.
        own: digests of the bases of checkpoints that may be replaced.
        overwrite: whether another one may be replaced.
    """

    left_out: list[dict[str, Any]]
    enough: float | None
    own: Collection[str]
    overwrite: bool = False


def reconcile(run: Run, job: Job, work: Workspace, wanted: Wanted) -> tuple[Method, dict[str, float]]:
    """Reconcile the output of a job with its adapters: keep what can stay, compute the rest, publish.

    Returns:
        What was done, and what share the bases that were there keep of each adapter that was tried on them.
    """
    kept: dict[str, float] = {}
    if job.settings.limit:
        return _code(run, job, work, wanted), kept
    enough = wanted.enough
    if enough is not None and is_current(job, wanted.left_out):
        catch_up(run, job, work)
        return "current", kept
    there = None if enough is None else growable(job, wanted.own)
    if enough is not None and there is not None:
        catch_up(run, job, work)
        published, kept = grow(run, job, there, wanted.left_out, enough)
        if published:
            return "projection", kept
    check_sources(job, run.plan.absent, kept, enough or 0.0)
    return _fit_and_project(run, job, work, wanted), kept


def _code(run: Run, job: Job, work: Workspace, wanted: Wanted) -> Method:
    """Encode the adapters that a coded checkpoint lacks; or all, if directions are to be fitted to all."""
    from .stages import coding  # what shares need not wait for the codec's imports

    target = coding.target_of(run.plan, job, wanted.left_out)
    ours, refit = ours_of(job.out) or {}, wanted.enough is None
    if coding.is_current(target) and not (refit and (ours.get("projected") or ours.get("removed"))):
        return "current"
    check_output(job.out, own=wanted.own, overwrite=wanted.overwrite)
    publishing = partial(work.publishing, job.out, there=ours.get("basis_digest"))
    return coding.code(run, job, work, target, publishing, refit=refit)


def _fit_and_project(run: Run, job: Job, work: Workspace, wanted: Wanted) -> Method:
    """Bring the moments up to the journal, fit all bases, project all adapters."""
    check_disk(run.plan, work.root, job.out)
    bases = sum_and_fit(run, job, work)
    job = replace(job, basis_key=basis_key_of(bases))
    ours = ours_of(job.out) or {}
    if ours.get("basis_digest") == job.basis_key and not ours.get("projected") and is_current(job, wanted.left_out):
        return "current"
    names = [r.name for r in job.journal.admissions]
    with Staging.open(job.out, job.checkpoint_key) as staging:
        check_output(job.out, own=wanted.own, overwrite=wanted.overwrite)  # now that nobody else can publish there
        write_bases(staging, job, bases)
        statistics = project(run, job, staging, job.journal.admissions)
        config = share_config(
            record_of_bases(run.plan, job, bases, staging),
            [statistics[name] for name in names],
            digest=job.checkpoint_key,
            sizes=sizes_of(staging.root, names),
            skipped=wanted.left_out,
        )
        work.publishing(job.out, job.basis_key, ours.get("basis_digest"))
        staging.commit(job.out, config, wanted.left_out)
    return "recompute"


def is_current(job: Job, left_out: list[dict[str, Any]]) -> bool:
    """Whether the existing checkpoint is the one that the job would write, and its files exist."""
    same = (ours_of(job.out) or {}).get("digest") == job.checkpoint_key and skipped_of(job.out) == left_out
    return same and has_files(job.out, [r.name for r in job.journal.admissions])
