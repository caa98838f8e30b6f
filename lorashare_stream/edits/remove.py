"""Shrinking: adapters are taken out of a checkpoint, of the moments, and, as far as can be, of the bases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.safetensors import read_header
from ..checkpoint.coded import metas_in
from ..checkpoint.config import SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, LOADINGS, skipped_of
from ..checkpoint.records import admission_in, metas_of
from ..checkpoint.staging import Staging
from ..errors import AdapterError, StreamError, UsageError, WorkspaceError, unknown_adapter
from ..files import read_sealed, remove_tree, write_sealed
from ..hub.lookup import recalled
from ..linalg.device import resolve_device
from ..pipeline import encode, plan_for, recompute
from ..plan.file import plan_as_json
from ..plan.plan import Plan
from ..stages import coding
from ..stages.grow import changed, demand_unchanged
from ..stages.job import Job
from ..stages.passes import checkpoint_key_of, journal_of_plan, make_job
from ..stages.project import check_unchanged
from ..stages.update import catch_up, forget_unused
from ..text import digest_of, is_component
from ..workspace.journal import Journal, Removal
from ..workspace.workspace import Workspace
from .options import RunOptions, check_same, opened


@dataclass(frozen=True)
class Removed:
    """What is left of adapters that were taken out.

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
    """Take adapters out of a checkpoint: their files and their stacked columns go.

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
            remedy="Name it by --workspace; or leave --refit off, and compress the sources of the others again.",
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
        if config.coded:
            plan = _take_out_coded(work, plan, out, config, names)
            if refit and record_of(read_share_config(out)).removed and not plan.absent:
                job = make_job(plan, work, out, resolve_device(plan.settings.device))
                encode(replace(run, plan=plan), job, work, out, skipped_of(out), refit=True)
            absent = tuple(str(e.adapter) for e in plan.absent)
            return Removed(tuple(names), tuple(record_of(read_share_config(out)).removed), {}, absent, coded=True)
        for _ in metas_of(out, [name for name in config.adapter_names if name not in names]):
            pass  # one that is damaged is told before the workspace takes anything out
        take_out(work, journal_of_plan(plan, work), names)
        plan = _of_unchanged(plan, work.journal())
        write_sealed(work.root / "plan.json", plan_as_json(plan))
        run, job = replace(run, plan=plan), make_job(plan, work, out, resolve_device(plan.settings.device))
        shrink(out, config, names)
        catch_up(run, job)
        forget_unused(job)
        if refit:
            forget_removed(job)
            config = read_share_config(out)
            if record_of(config).removed and not plan.absent:
                recompute(run, job, work, out, skipped_of(out))
        absent = tuple(str(e.adapter) for e in plan.absent)
        return Removed(tuple(names), tuple(record_of(read_share_config(out)).removed), traces(job), absent)


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
    """The plan, in which adapters whose sources have changed count as absent."""
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


def _take_out_coded(work: Workspace, plan: Plan, out: Path, config: SHAREConfig, names: Sequence[str]) -> Plan:
    """Take adapters out of a coded checkpoint and its workspace, which may have moments and bases too.

    Returns:
        The plan of the others, in which those whose sources have changed are absent.
    """
    journal = journal_of_plan(plan, work)

    def publishing(key: str) -> None:  # only now: until then it may be found that another one is damaged
        take_out(work, journal, names)
        work.publishing(out, key, record_of(config).basis_digest)

    _keep_others(out, config, names, publishing)
    take_out(work, work.journal(), names)  # those that the checkpoint did not have
    plan = _of_unchanged(plan, work.journal())
    write_sealed(work.root / "plan.json", plan_as_json(plan))
    for module in work.modules():
        work.forget(module)
    for bases in work.bases.iterdir():
        remove_tree(bases)
    return plan


def _keep_others(out: Path, config: SHAREConfig, names: Collection[str], publishing: coding.Publishing) -> None:
    """Take adapters out of a coded checkpoint: packs that hold them are written without them."""
    stay = metas_in(out, config, [name for name in config.adapter_names if name not in names])
    coding.keep(coding.target_there(out, config, [admission_in(meta) for meta in stay], skipped_of(out)), publishing)


def shrink(out: Path, config: SHAREConfig, names: Sequence[str]) -> None:
    """Take adapters out of a checkpoint: the one that takes its place has the others, and the same bases.

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
        staging.commit(out, changed(staging.root, less, stay, digest, left_out), left_out)


def _counts_without(out: Path, config: SHAREConfig, gone: Collection[str]) -> dict[str, int]:
    """Group -> n of the adapters that stay: less those that go, or, if one of these is damaged, counted anew."""
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
    """Adapters that bases are not fitted to; they may have loadings, if their dW is zero."""
    return set(record_of(config).verbatim_adapters)


def _vectors(out: Path, name: str) -> dict[str, int]:
    """Group -> the vectors that an adapter has brought into it."""
    return {r.name: r.shape[1] for r in read_header(out / ADAPTERS / name / LOADINGS)}  # of (k, r)


def take_out(work: Workspace, journal: Journal, names: Sequence[str]) -> None:
    """Note in the journal that adapters are taken out, unless they are."""
    work.take_out([Removal(r.name, i) for i, r in journal.active.items() if r.name in names])


def traces(job: Job) -> dict[str, int]:
    """Adapters that were taken out -> in how many modules moments still hold their vectors."""
    work = Workspace(job.workspace)
    found: dict[str, int] = {}
    for module in work.modules():
        marker = work.marker(module)
        for name in job.removed_in(marker) if marker is not None else ():
            found[name] = found.get(name, 0) + 1
    return found


def forget_removed(job: Job) -> None:
    """Drop moments that hold vectors of removed adapters: of the sources of the others they are summed again.

    Where a source of these is gone, they stay as they are.
    """
    work = Workspace(job.workspace)
    for module in sorted({*work.modules(), *job.modules}):
        marker = work.marker(module)
        holds = read_sealed(job.facts_file(module)).get("removed") if marker is None else job.removed_in(marker)
        others = job.holders(module, len(job.journal.entries)).values()
        if holds and (marker is None or all(r.name in job.adapters for r in others)):
            work.forget(module)
