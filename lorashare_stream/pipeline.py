"""The main job, top to bottom: adapters in, a SHARE checkpoint out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .adapters.shapes import ModuleShape, Shapes
from .adapters.source import Source
from .checkpoint.config import SHAREConfig
from .checkpoint.format import ours_of, skipped_of
from .checkpoint.publish import check_output, output_folder
from .checkpoint.records import has_files, sizes_of
from .checkpoint.staging import Staging, recover
from .checkpoint.summary import share_config
from .errors import AdapterError, WorkspaceError, skipped_as_json
from .files import own_path, write_sealed
from .hub.lookup import bytes_to_fetch, fetching_for, resolve_on_hub
from .linalg.device import resolve_device
from .plan.catalog import catalog
from .plan.file import plan_as_json
from .plan.plan import Plan, make_plan
from .runtime.executors import executor_for, mapper_for
from .runtime.progress import Progress, silent
from .settings import Settings
from .stages.bases import Bases, write_bases
from .stages.grow import check_kept, check_sources, demand_unchanged, grow, growable
from .stages.ingest import pickles_kept
from .stages.job import Job
from .stages.passes import check_disk, ingest, make_job, project, record_of_job
from .stages.run import Run, places_of
from .stages.update import catch_up, sum_and_fit
from .text import digest_of
from .workspace.journal import Admission, Journal
from .workspace.workspace import Workspace

Method = Literal["current", "projection", "recompute"]


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        skipped: the adapters that were left out, with reasons; none unless `on_error` is `"skip"`.
        method: `current` if there was nothing to do, `projection` if new adapters were projected on the bases that
            were there, `recompute` if bases were fitted and all adapters projected.
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
    recalled: Iterable[str] = (),
    runs: bool = True,
    progress: Progress = silent,
) -> Plan:
    """The plan for some sources; revisions on the Hub are pinned by it, and stay so.

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
        return make_plan(catalog(sources, settings, surveyed=surveyed), settings)
    work = Workspace(workspace)
    journal, base = work.journal(), work.base_model()
    sources, surveyed = resolve_on_hub(
        sources, settings, workspace, configs=runs, writes=runs or work.exists(), progress=progress
    )
    held = _held(work, journal)
    found = catalog(
        sources,
        settings,
        admissions=journal.admissions,
        held=held,
        known=_known(held) if settings.fits else {},
        bound_base=base,
        surveyed=surveyed,
    )
    made = make_plan(found, settings, base, grows=bool(journal.entries), recalled=recalled)
    return replace(made, journal=journal.digest(len(journal.entries)))


def _held(work: Workspace, journal: Journal) -> dict[str, Shapes]:
    """The shapes of the modules that each adapter of a workspace shares, by its name."""
    try:
        found = work.shapes_of(journal, {})
    except WorkspaceError:  # damaged: the sources tell, and the run mends it
        return {}
    return {admission.name: found[admission.shapes] for admission in journal.admissions}


def _known(held: Mapping[str, Shapes]) -> dict[str, ModuleShape]:
    """The shapes of the modules of a workspace.

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
    """The workspace of an output when none is named: beside it."""
    return out.parent / f"{out.name}.workspace"


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
        there: configuration of the checkpoint at `out` as it was when the plan was made.
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
    device = resolve_device(plan.settings.device)
    root = (workspace or own_path(default_workspace(out))).absolute()
    known = {r.name for r in Workspace(root).journal().admissions}
    check_disk(plan, root, out, adds=out.exists(), fetch=bytes_to_fetch(plan.adapters, plan.settings, known))
    check_output(out, own=Workspace(root).published(), overwrite=overwrite)  # before a workspace is made for it
    with (
        executor_for(executor, plan.processes, threads=device != "cpu") as workers,
        Workspace.open(root, plan.binding, take_lock=take_lock) as work,
        mapper_for(workers, places_of(plan, root, out)) as mapper,
        fetching_for(plan.settings, root) as fetcher,
        pickles_kept(plan, root) as plan,
    ):
        run = Run(plan, mapper, progress, fetcher, work.check_held)
        recover(out)
        check_output(out, own=work.published(), overwrite=overwrite)
        if there is not None:
            demand_unchanged(out, there)
        write_sealed(work.root / "plan.json", plan_as_json(plan))

        skipped = [*plan.refused, *ingest(run, work, out, device)]
        left_out = [*also_left_out, *skipped_as_json(skipped)]
        work.skip(left_out)
        job = make_job(plan, work, out, device)
        if not overwrite:
            check_kept(job, out)
        kept: dict[str, float] = {}
        method: Method
        if plan.settings.limit:
            method = encode(run, job, work, out, left_out, overwrite=overwrite, refit=refit)
        else:
            enough = None if refit else plan.settings.variance_threshold if accept is None else accept
            method, kept = share(run, job, work, out, left_out, enough, overwrite=overwrite)
    return Outcome(skipped, method, kept, job.journal.admissions)


def share(
    run: Run,
    job: Job,
    work: Workspace,
    out: Path,
    left_out: list[dict[str, Any]],
    enough: float | None,
    *,
    overwrite: bool = False,
) -> tuple[Method, dict[str, float]]:
    """Make `out` the SHARE checkpoint of a job: project what it lacks on its bases, or fit bases to all.

    `enough` is the share of its dW energy that bases must keep of each new adapter; None if they are fitted anyway.

    Returns:
        What was done, and what share the bases that were there keep of each adapter that was tried on them.
    """
    kept: dict[str, float] = {}
    if enough is not None and is_current(job, out, left_out):
        catch_up(run, job)
        return "current", kept
    held = None if enough is None else growable(job, out, work.published())
    if held is not None and enough is not None:
        catch_up(run, job)
        published, kept = grow(run, job, out, held, left_out, enough)
        if published:
            return "projection", kept
    check_sources(job, run.plan.absent, kept, enough or 0.0)
    return recompute(run, job, work, out, left_out, overwrite=overwrite), kept


def encode(
    run: Run,
    job: Job,
    work: Workspace,
    out: Path,
    left_out: list[dict[str, Any]],
    *,
    overwrite: bool = False,
    refit: bool = False,
) -> Method:
    """Code the adapters that the checkpoint at `out` lacks, and publish; or see that all is so.

    With `refit` directions that are not fitted to all of its adapters are fitted again, and all are coded again.
    """
    from .stages import coding  # what shares need not wait for the codec's imports

    target = coding.target_of(run.plan, job, left_out)
    ours = ours_of(out) or {}
    if coding.is_current(target) and not (refit and (ours.get("projected") or ours.get("removed"))):
        return "current"
    check_output(out, own=work.published(), overwrite=overwrite)
    publishing = partial(work.publishing, out, there=ours.get("basis_digest"))
    return coding.code(run, job, target, publishing, refit=refit)


def recompute(
    run: Run,
    job: Job,
    work: Workspace,
    out: Path,
    left_out: list[dict[str, Any]],
    *,
    overwrite: bool = False,
) -> Literal["current", "recompute"]:
    """Bring the moments up to the journal, fit all bases, project all adapters, and publish; or see that all is so."""
    check_disk(run.plan, work.root, out)
    bases = sum_and_fit(run, job)
    job = replace(job, basis_key=_basis_key_of(bases))
    ours = ours_of(out) or {}
    if ours.get("basis_digest") == job.basis_key and not ours.get("projected") and is_current(job, out, left_out):
        return "current"
    admissions = job.journal.admissions
    with Staging.open(out, job.checkpoint_key) as staging:
        check_output(out, own=work.published(), overwrite=overwrite)  # now that nobody else can publish there
        write_bases(staging, job, bases)
        statistics = project(run, job, staging, admissions)
        names = [r.name for r in admissions]
        config = share_config(
            record_of_job(run.plan, job, bases, staging),
            [statistics[name] for name in names],
            digest=job.checkpoint_key,
            sizes=sizes_of(staging.root, names),
            skipped=left_out,
        )
        work.publishing(out, job.basis_key, ours.get("basis_digest"))
        staging.commit(out, config, left_out)
    return "recompute"


def _basis_key_of(bases: Bases) -> str:
    return digest_of([[m, facts["digest"]] for m, facts in bases.items()])


def is_current(job: Job, out: Path, left_out: list[dict[str, Any]]) -> bool:
    """Whether the checkpoint at `out` is what this job would write, and no adapter of it is gone."""
    same = (ours_of(out) or {}).get("digest") == job.checkpoint_key and skipped_of(out) == left_out
    return same and has_files(out, [r.name for r in job.journal.admissions])
