"""Remove adapters from a checkpoint, from moments and, with refit, from bases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.coded import metas_in
from ..checkpoint.config import SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, skipped_of
from ..checkpoint.records import admission_in, metas_of
from ..errors import AdapterError, UsageError, WorkspaceError, unknown_adapter
from ..files import remove_tree, write_sealed
from ..hub.lookup import recalled
from ..pipeline import Wanted, plan_for, reconcile
from ..plan.file import plan_as_json
from ..plan.plan import Plan
from ..stages import coding
from ..stages.adapt import demand_unchanged, shrink
from ..stages.ingest import journal_of_plan
from ..stages.job import Job, make_job
from ..stages.project import check_unchanged
from ..stages.run import Run
from ..stages.status import removed_in
from ..stages.update import catch_up, forget_removed, forget_unused
from ..text import is_component
from ..workspace.journal import Journal, Removal
from ..workspace.workspace import Workspace
from .options import RunOptions, check_same, opened


@dataclass(frozen=True)
class Removed:
    """Traces of removed adapters.

    Attributes:
        names: the adapters that were taken out now.
        before: those that were named, and had been taken out before.
        coded: whether the checkpoint is: then nothing of them is left in it, unless it has directions.
        in_bases: all that were ever taken out whose vectors its bases, or directions, were fitted to.
        in_moments: name -> in how many modules sums still hold its vectors; None if there is no workspace.
        absent: adapters that stay, without whose sources, which are gone, bases cannot be fitted anew.
    """

    names: tuple[str, ...]
    in_bases: tuple[str, ...]
    in_moments: Mapping[str, int] | None = None
    absent: tuple[str, ...] = ()
    coded: bool = False
    before: tuple[str, ...] = ()


def remove(checkpoint: Path, names: Sequence[str], options: RunOptions, *, refit: bool = False) -> Removed:
    """Remove adapters from a checkpoint: their files, and their columns in moments.

    Sums and bases still contain what they added, unless they are computed anew. A coded checkpoint without directions
    has neither: it is then what it would be without them. Its directions still contain what they added; sums of its
    workspace are dropped.

    Args:
        checkpoint: one of ours.
        names: of the adapters.
        options: with what.
        refit: free the moments of them, fit the bases anew and project the others anew, where their sources allow it.

    Raises:
        UnknownAdapterError: if there is, and was, no such adapter.
        UsageError: if no adapter would stay.
    """
    out, config = opened(checkpoint)
    root = options.root_of(out, config)
    journal = Journal() if root is None else Workspace(root).journal()
    _check_names(out, config, journal, names, refit)
    there = {*config.adapter_names, *(r.name for r in journal.admissions)}
    before = tuple(name for name in names if name not in there and not (out / ADAPTERS / name).is_dir())
    done = _removed(out, config, root, names, options, refit=refit)
    return replace(done, names=tuple(name for name in names if name not in before), before=before)


def _removed(
    out: Path, config: SHAREConfig, root: Path | None, names: Sequence[str], options: RunOptions, *, refit: bool
) -> Removed:
    if root is None and refit and (not config.coded or record_of(config).settings.directions):
        raise WorkspaceError(
            "no workspace to compute anything anew from",
            remedy="Name it by --workspace; or compress the sources of the others into a new checkpoint.",
        )
    if root is None and config.coded:
        _keep_others(out, config, names, lambda _: demand_unchanged(out, config))
        return Removed(tuple(names), tuple(record_of(read_share_config(out)).removed), coded=True)
    if root is None:
        shrink(out, config, names)
        return Removed(tuple(names), tuple(record_of(read_share_config(out)).removed))
    if refit and not config.coded:
        check_same(out, config, root, removing=names)
    held = [s for s in recalled(root) if s.name not in names]
    names_held = [str(s.name) for s in held]
    plan = plan_for(held, options.settings(config), root, recalled=names_held, progress=options.progress)
    with options.running(plan, out, root) as (run, work):
        assert work is not None
        demand_unchanged(out, config)
        plan = (_take_out_coded if config.coded else _take_out)(work, plan, out, config, names)
        run = replace(run, plan=plan)
        in_moments = {} if config.coded else _without_removed(run, make_job(plan, work, out), work, sum_again=refit)
        if refit and record_of(read_share_config(out)).removed and not plan.absent:
            own = {record_of(config).basis_digest, record_of(read_share_config(out)).basis_digest}
            reconcile(run, make_job(plan, work, out), work, Wanted(skipped_of(out), None, own))
        absent = tuple(str(e.adapter) for e in plan.absent)
        in_bases = tuple(record_of(read_share_config(out)).removed)
        return Removed(tuple(names), in_bases, in_moments, absent, coded=bool(config.coded))


def _check_names(out: Path, config: SHAREConfig, journal: Journal, names: Sequence[str], refit: bool) -> None:
    if not names and not refit:
        raise UsageError("no adapter is named", remedy="Name those to take out, or give --refit.")
    active = {*config.adapter_names, *(r.name for r in journal.admissions)}
    before = {e.name for e in journal.entries if isinstance(e, Removal)} | {*record_of(config).removed}
    for name in names:
        if name not in active | before and not (is_component(name) and (out / ADAPTERS / name).is_dir()):
            raise unknown_adapter(name, sorted(active))
    if not set(config.adapter_names) - set(names):
        raise UsageError("no adapter would stay", remedy="To remove the whole checkpoint, delete its folder.")


def _of_unchanged(plan: Plan, journal: Journal) -> Plan:
    """Plan in which adapters whose sources have changed count as absent."""
    admissions = {r.name: r for r in journal.admissions}
    changed: list[AdapterError] = []
    for adapter in plan.adapters:
        try:
            check_unchanged(adapter, admissions[adapter.name])
        except AdapterError as e:
            changed.append(e)
    names = {e.adapter for e in changed}
    adapters = tuple(e for e in plan.adapters if e.name not in names)
    return replace(plan, adapters=adapters, absent=(*plan.absent, *changed))


def _take_out(work: Workspace, plan: Plan, out: Path, config: SHAREConfig, names: Sequence[str]) -> Plan:
    """Remove adapters from a SHARE checkpoint and its workspace; returns the plan of the others."""
    for _ in metas_of(out, [name for name in config.adapter_names if name not in names]):
        pass  # one that is damaged is told before the workspace takes anything out
    take_out(work, journal_of_plan(plan, work), names)
    plan = _of_unchanged(plan, work.journal())
    write_sealed(work.root / "plan.json", plan_as_json(plan))
    shrink(out, config, names)
    return plan


def _take_out_coded(work: Workspace, plan: Plan, out: Path, config: SHAREConfig, names: Sequence[str]) -> Plan:
    """Remove adapters from a coded checkpoint and its workspace, and all moments; returns the plan of the others."""
    journal = journal_of_plan(plan, work)

    def publishing(key: str) -> None:  # only now: until then it may be found that another one is damaged
        take_out(work, journal, names)
        work.publishing(out, key, record_of(config).basis_digest)

    _keep_others(out, config, names, publishing)
    take_out(work, work.journal(), names)  # those that the checkpoint did not have
    plan = _of_unchanged(plan, work.journal())
    write_sealed(work.root / "plan.json", plan_as_json(plan))
    for module in list(work.markers):
        work.forget(module)
    for bases in work.bases.iterdir():
        remove_tree(bases)
    return plan


def _keep_others(out: Path, config: SHAREConfig, names: Collection[str], publishing: coding.Publishing) -> None:
    """Remove adapters from a coded checkpoint."""
    stay = metas_in(out, config, [name for name in config.adapter_names if name not in names])
    coding.keep(coding.target_there(out, config, [admission_in(meta) for meta in stay], skipped_of(out)), publishing)


def take_out(work: Workspace, journal: Journal, names: Sequence[str]) -> None:
    """Append removals to the journal, of adapters that are in it."""
    work.take_out([Removal(r.name, i) for i, r in journal.active.items() if r.name in names])


def _without_removed(run: Run, job: Job, work: Workspace, *, sum_again: bool) -> dict[str, int]:
    """Bring moments up to the removals in the journal.

    Returns:
        Adapters that were taken out -> in how many modules moments still hold their vectors; none with `sum_again`.
    """
    catch_up(run, job, work)
    forget_unused(job, work)
    if sum_again:
        forget_removed(job, work)
    return dict(Counter(name for marker in work.markers.values() for name in removed_in(job, marker)))
