"""Refit: another k from stored moments or components, or another limit from the sources."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..checkpoint.config import SHAREConfig, record_of
from ..checkpoint.format import CONFIG, ours_of
from ..checkpoint.publish import check_output, output_folder
from ..checkpoint.staging import recover
from ..errors import WorkspaceError
from ..hub.lookup import recalled
from ..machine import usable_cores
from ..pipeline import plan_for
from ..plan.file import PlanFile
from ..runtime.executors import Places, executor_for, mapper_for
from ..settings import Settings, overridden
from ..stages.slice import cut_of, slice_checkpoint
from ..text import listed
from ..workspace.records import read_record
from ..workspace.workspace import Workspace
from .options import RunOptions, check_same, opened


def refit(place: Path, asked: Mapping[str, Any], out: Path, options: RunOptions, *, overwrite: bool = False) -> str:
    """Fit a checkpoint again: another k from the same moments, or the same k after adapters were added or removed.

    A smaller k than the checkpoint has is cut from what it stores, without sources or workspace. Else bases are fitted
    to the moments, and all adapters are projected from their sources, which are read once. Another limit, and k instead
    of one, or one instead of k, is another checkpoint of the same sources, which the workspace knows.

    Args:
        place: a checkpoint of ours, or a workspace.
        asked: k or a limit; what is not named stays as it is.
        out: the new checkpoint's folder; it may be `place`.
        options: with what.
        overwrite: replace a checkpoint of another run at `out`.

    Returns:
        `sliced`, `recompute`, `projection` (of a coded one, some of whose adapters have stayed) or `current`.
    """
    changes, there = {**options.changes, **asked}, None
    if Workspace(place).exists():
        root, settings = place, Settings.from_mapping(overridden(_last_settings(place), changes))
    else:
        place, config = opened(place)
        settings = Settings.from_mapping(overridden(options.settings(config).as_dict(), asked))
        in_place, same = place == output_folder(out), _is_so(config, settings)
        there = config if in_place else None
        if in_place and (same or (bool(asked) and _is_cut_to(config, settings))):
            return "current"
        k = settings.num_components
        if isinstance(k, int) and _can_cut(config, settings) and (k < config.num_components or (same and not in_place)):
            return _slice(place, config, k, out, options, overwrite)
        found = options.root_of(place, config)
        if found is None:
            raise _no_sources(config, settings)
        check_same(place, config, found)
        root = found
    held = recalled(root)
    plan = plan_for(held, settings, root, recalled=[str(s.name) for s in held], progress=options.progress)
    return options.compress(plan, out, root, there=there, refit=True, overwrite=overwrite).method


def _no_sources(config: SHAREConfig, settings: Settings) -> WorkspaceError:
    remedy = "Name the workspace by --workspace, or compress the sources again."
    if settings.limit or config.coded:
        return WorkspaceError(
            "the adapters must be read again from their sources, which only the workspace knows",
            found=listed([*record_of(config).settings.asked, f"k = {config.num_components}"][:1]),
            expected=listed([*settings.asked, f"k = {settings.num_components}"][:1]),
            remedy=remedy,
        )
    return WorkspaceError(
        "only a smaller k can be cut from a checkpoint without its workspace",
        found=f"k = {config.num_components}",
        remedy=remedy,
    )


def _last_settings(workspace: Path) -> dict[str, Any]:
    plan = read_record(PlanFile, workspace / "plan.json")
    if plan is None:
        raise WorkspaceError(
            "the workspace's plan is damaged, or not there",
            found=workspace,
            remedy="Name the checkpoint instead of the workspace.",
        )
    return plan.settings


def _is_so(config: SHAREConfig, settings: Settings) -> bool:
    """Whether a checkpoint has these settings, and bases fitted to exactly its adapters."""
    record, k = record_of(config), settings.num_components
    made = record.settings
    same = made.bought == settings.bought and (k == made.num_components or bool(settings.limit))
    same = same and (k != "auto" or settings.variance_threshold == made.variance_threshold)
    return same and not record.projected and not record.removed


def _can_cut(config: SHAREConfig, settings: Settings) -> bool:
    """Whether only another k is asked for; a coded checkpoint is made from the sources."""
    return settings.limit is None and record_of(config).settings.bought == settings.bought


def _is_cut_to(config: SHAREConfig, settings: Settings) -> bool:
    """Whether a checkpoint was sliced to this k, by the same command before."""
    record = record_of(config)
    same = record.settings.num_components == settings.num_components
    return record.cut_from is not None and same and record.settings.bought == settings.bought


def _slice(place: Path, config: SHAREConfig, k: int, out: Path, options: RunOptions, overwrite: bool) -> str:
    out = output_folder(out)
    recover(out)
    cut = cut_of(place, config, k, out)
    ours = ours_of(out) or {}
    if (ours.get("digest"), ours.get("basis_digest")) == (cut.digest, cut.record.basis_digest):
        return "current"
    root = options.root_of(place, config)
    own = {cut.source_digest} if out == place else set() if root is None else Workspace(root).published()
    check_output(out, own=own, overwrite=overwrite)
    at_once = options.settings(config).workers or usable_cores()
    where, folder = (place / CONFIG).absolute(), out.parent.absolute()
    places = Places(folder, (folder,), ((where, where.stat().st_size),))
    with (
        executor_for(options.executor, at_once) as workers,
        nullcontext() if root is None else Workspace.open(root, None, take_lock=options.take_lock) as work,
        mapper_for(workers, places) as mapper,
    ):
        if work is not None:
            work.publishing(out, cut.record.basis_digest, ours.get("basis_digest"))
        slice_checkpoint(cut, mapper, at_once, options.progress)
    return "sliced"
