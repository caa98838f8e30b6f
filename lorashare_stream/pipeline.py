"""The main job, top to bottom: adapters in, a SHARE checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from .catalog import catalog
from .checkpoint import Staging
from .devices import resolve_device
from .errors import AdapterError, BudgetError, WorkspaceError, refusal
from .executors import Executor, Threads
from .files import free_bytes, own_path, read_json, write_json
from .keys import SIDES, group_id
from .names import bytes_shown, listed
from .planning import Plan, check_enough, make_plan, plan_as_json
from .publishing import check_output, mend_output, output_folder
from .settings import Settings
from .shareformat import ADAPTERS, COMPONENTS, LOADINGS, META, VERBATIM, ours_of, skipped_of
from .sources import Source
from .summary import figures_of, share_config
from .tasks import Job, accumulate_module, check_unchanged, fit_module, ingest_adapter, project_adapter
from .workspace import Receipt, Workspace, digest_of, skipped_as_json

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, Iterator[Any]], Iterator[Any]]  # (step, tasks, results) -> the same results
SYNC_EVERY = 64  # admissions made durable at once


def silent(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """Progress that shows nothing."""
    return results


@dataclass(frozen=True)
class Run:
    """How the tasks of a plan are mapped."""

    plan: Plan
    executor: Executor
    progress: Progress

    def map(self, step: str, fn: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """Results in the order of the tasks, as many at a time as the plan allows for this step."""
        results = self.executor.map(fn, tasks, self.plan.step(step).concurrency)
        yield from self.progress(step, len(tasks), results)

    def all(self, step: str, fn: Callable[[T], Any], tasks: Sequence[T]) -> None:
        """Do all tasks, for what they leave on disk."""
        for _ in self.map(step, fn, tasks):
            pass


def plan_for(sources: Sequence[Source], settings: Settings, workspace: Path | None = None) -> Plan:
    """The plan for some sources; adapters that a workspace already holds keep their names, and it its base model."""
    work = None if workspace is None else Workspace(workspace)
    receipts, base = ([], None) if work is None else (work.admissions(), work.base_model())
    return make_plan(catalog(sources, settings, receipts=receipts, bound_base=base), settings, base)


def default_workspace(out: Path) -> Path:
    """The workspace of an output when none is named: beside it."""
    return out.parent / f"{out.name}.workspace"


def compress(
    plan: Plan,
    out: Path,
    *,
    workspace: Path | None = None,
    executor: Executor | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[AdapterError]:
    """Run a plan: ingest, accumulate, fit, project, commit. Run again, it goes on where it was.

    Args:
        plan: what to do.
        out: the checkpoint's folder.
        workspace: the folder of resumable state; beside `out` if None.
        executor: maps the tasks; threads if None.
        overwrite: replace a checkpoint of another run at `out`.
        progress: passes the results of every step on as they come.

    Returns:
        The adapters that were left out, with reasons; none unless `on_error` is `"skip"`.

    Raises:
        CollectionError: naming the adapters that cannot be compressed.
        BudgetError: if memory or disk will not do.
        WorkspaceError, UsageError: if the folders hold something else.
    """
    plan.validate()
    out = output_folder(out)
    run = Run(plan, executor or Threads(), progress)
    device = resolve_device(plan.settings.device)
    root = workspace or own_path(default_workspace(out))
    check_disk(plan, root, out)
    check_output(out, own=Workspace(root).published(out), overwrite=overwrite)  # before a workspace is made for it
    with threadpool_limits(1, user_api="blas"), Workspace.open(root, plan.binding) as work:
        mend_output(out)
        check_output(out, own=work.published(out), overwrite=overwrite)
        write_json(work.root / "plan.json", plan_as_json(plan))

        skipped = [*plan.refused, *ingest(run, work)]
        left_out = skipped_as_json(skipped)
        work.skip(left_out)
        job = make_job(plan, work, out, device)
        if is_current(job, out, left_out):
            return skipped

        run.all("accumulate", partial(accumulate_module, job), unaccumulated(job))
        run.all("fit", partial(fit_module, job), unfitted(job))
        bases = {m: read_json(job.facts_file(m)) for m in modules_of(job)}
        job = replace(job, basis_digest=digest_of([[m, facts["digest"]] for m, facts in bases.items()]))

        names = [receipt.name for receipt in job.receipts]
        with Staging.open(out, job.digest) as staging:
            write_components(staging, job, bases)
            run.all("project", partial(project_adapter, job), [n for n in names if not staging.done(n)])

            figures = [figures_of(meta) for meta in staging.metas(names)]
            config = share_config(plan, figures, bases, job=job, sizes=sizes_of(staging.root), skipped=len(skipped))
            work.publishing(out, job.basis_digest)
            staging.commit(out, config, left_out)
    return skipped


def check_disk(plan: Plan, workspace: Path, out: Path) -> None:
    """Refuse a run for which the disk has no room.

    Raises:
        BudgetError: with what is free and what is needed.
    """
    needed = plan.sizes["moments"] + 2 * plan.sizes["basis"] + plan.sizes["checkpoint"]
    free = min(free_bytes(workspace), free_bytes(out))
    if needed > free + _bytes_there(workspace):
        raise BudgetError(
            "not enough disk for the workspace and the checkpoint",
            found=f"{bytes_shown(free)} free",
            expected=f"about {bytes_shown(needed)}",
            remedy="Free some, or put --workspace on another disk.",
        )


def _bytes_there(workspace: Path) -> int:
    return Workspace(workspace).bytes() if workspace.exists() else 0


def ingest(run: Run, work: Workspace) -> list[AdapterError]:
    """Admit every adapter of the plan that is not yet in the journal, in the order of the plan.

    Returns:
        Those whose values show that they must not touch a moment.
    """
    entries = {e.name: e for e in run.plan.entries}
    admitted = work.receipts()
    gone = [r.name for r in admitted if r.name not in entries]
    if gone:
        raise _gone(gone, run.plan.refused)
    for receipt in admitted:
        check_unchanged(entries[receipt.name], receipt)
    known = {r.name for r in admitted}
    fresh = [e for e in run.plan.entries if e.name not in known]
    refused: list[AdapterError] = []
    for count, result in enumerate(run.map("ingest", ingest_adapter, fresh), 1):
        if isinstance(result, Receipt):
            work.admit(result, durable=count % SYNC_EVERY == 0 or count == len(fresh))
        else:
            refused.append(result)
    work.sync_journal()
    if refused and run.plan.settings.on_error == "raise":
        raise refusal(
            f"{len(refused)} of {len(entries)} adapters cannot be compressed; the others are ingested",
            refused,
            "Leave them out, or go on without them by --on-error skip.",
        )
    check_enough(len(entries) - len(refused), refused)
    return refused


def _gone(names: Sequence[str], refused: Sequence[AdapterError]) -> WorkspaceError:
    now = [error for error in refused if error.adapter in names]
    return WorkspaceError(
        "the workspace holds adapters that the sources no longer give, and its moments contain them",
        found=listed(names),
        remedy=f"One of them is refused now: {now[0]}"
        if now
        else "Name them again, or compress into another --workspace.",
    )


def make_job(plan: Plan, work: Workspace, out: Path, device: str) -> Job:
    """What the tasks need to know, after ingest."""
    s = plan.settings
    receipts = tuple(work.receipts())
    adapters = [[r.name, r.digest, r.config_digest] for r in receipts]
    digest = digest_of([plan.binding, plan.base_model, s.num_components, s.variance_threshold, plan.storage, adapters])
    return Job(
        settings=s,
        storage=plan.storage,
        entries={e.name: e for e in plan.entries},
        receipts=receipts,
        workspace=work.root.absolute(),
        bases=work.bases_for(digest).absolute(),
        out=out.absolute(),
        device=device,
        digest=digest,
    )


def is_current(job: Job, out: Path, left_out: list[dict[str, Any]]) -> bool:
    """Whether the checkpoint at `out` is what this job would write, and no adapter of it is gone."""
    same = (ours_of(out) or {}).get("digest") == job.digest and skipped_of(out) == left_out
    return same and all((out / ADAPTERS / receipt.name / META).is_file() for receipt in job.receipts)


def modules_of(job: Job) -> list[str]:
    """Modules of the admitted adapters, sorted."""
    layouts = {e.layout.digest: e.layout for e in (job.entries[r.name] for r in job.receipts)}
    return sorted({m.name for layout in layouts.values() for m in layout.modules})


def unaccumulated(job: Job) -> list[str]:
    """Modules whose moments lack admissions."""
    work = Workspace(job.workspace)
    return [m for m in modules_of(job) if not job.holds_all(work.marker(m))]


def unfitted(job: Job) -> list[str]:
    """Modules without a whole basis."""
    return [m for m in modules_of(job) if not job.has_basis(m)]


def write_components(staging: Staging, job: Job, bases: Mapping[str, Mapping[str, Any]]) -> None:
    """Stream the bases into the staged checkpoint."""
    shapes = {
        group_id(m, side): (facts[side]["d"], facts[side]["k"])
        for m, facts in bases.items()
        for side in SIDES
        if side in facts
    }
    staging.write_components([job.basis_file(m) for m in bases], shapes, job.storage, job.basis_digest)


def sizes_of(root: Path) -> dict[str, int]:
    """Bytes on disk of a checkpoint, by part."""
    adapters = list((root / ADAPTERS).iterdir())

    def total(name: str) -> int:
        return sum((a / name).stat().st_size for a in adapters if (a / name).exists())

    parts = {"loadings": total(LOADINGS), "verbatim": total(VERBATIM), "metadata": total(META)}
    return {"basis": (root / COMPONENTS).stat().st_size, **parts}
