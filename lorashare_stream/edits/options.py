"""Run options of edits: workspace, settings, executor."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.dtypes import DTYPES
from ..checkpoint.coded import metas_in
from ..checkpoint.config import SHAREConfig, read_share_config, record_of
from ..checkpoint.publish import demand_folder, output_folder
from ..checkpoint.staging import recover
from ..errors import WorkspaceError
from ..pipeline import Outcome, compress, default_workspace, session
from ..plan.plan import Plan
from ..runtime.progress import Progress, silent
from ..settings import Settings, overridden
from ..stages.adapt import demand_unchanged
from ..stages.run import Run
from ..text import listed
from ..workspace.workspace import Workspace

Session = AbstractContextManager[tuple[Run, Workspace | None]]


@dataclass(frozen=True)
class RunOptions:
    """Options of an edit.

    Attributes:
        workspace: of the checkpoint; the one beside it, if there is one, if None.
        changes: settings that are not those that the checkpoint records: memory, workers, device, ...
        accept: share of its dW energy that the bases that are there must keep of an adapter that is added; the
            checkpoint's `variance_threshold` if None.
        executor: does the tasks, see `pipeline.compress`.
        take_lock: take over the lock of another host that still seems to be alive.
        progress: passes the results of every step on as they come.
    """

    workspace: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    accept: float | None = None
    executor: Any = None
    take_lock: bool = False
    progress: Progress = silent

    def root_of(self, out: Path, config: SHAREConfig) -> Path | None:
        """The workspace of a checkpoint, if there is one.

        Raises:
            WorkspaceError: if the one that is named, or lies beside it, is not that of the checkpoint.
        """
        root = self.workspace or default_workspace(out)
        if not Workspace(root).exists():
            if self.workspace is not None:
                raise WorkspaceError("no workspace", found=root, remedy="Name the one of the checkpoint.")
            return None
        if record_of(config).basis_digest not in Workspace(root).published() and not _is_of(root, out, config):
            raise WorkspaceError(
                "the workspace is not the one that the checkpoint was made with",
                found=root,
                remedy="Name the right one by --workspace; without any, move this one away.",
            )
        return root

    def running(self, plan: Plan, out: Path, root: Path | None) -> Session:
        """Open a run: `pipeline.session`."""
        return session(plan, out, root, executor=self.executor, take_lock=self.take_lock, progress=self.progress)

    def settings(self, config: SHAREConfig) -> Settings:
        """Settings of a checkpoint, with the changes."""
        record, base = record_of(config), config.base_model_name_or_path or None
        dtype = "auto" if config.coded else DTYPES[record.dtype]  # a code has none
        made = {**record.settings.chosen(), "base_model": base, "dtype": dtype}
        return Settings.from_mapping(overridden(made, self.changes))

    def compress(self, plan: Plan, out: Path, root: Path, **options: Any) -> Outcome:
        """Run a plan: `pipeline.compress`."""
        return compress(
            plan,
            out,
            workspace=root,
            executor=self.executor,
            take_lock=self.take_lock,
            progress=self.progress,
            **options,
        )


def _is_of(workspace: Path, out: Path, config: SHAREConfig) -> bool:
    """Whether a coded checkpoint that was edited without a workspace belongs to this one, by the digests of adapters.

    The key of one in the SHARE form is that of its bases, which no such edit changes.
    """
    if not config.coded:
        return False
    work, record = Workspace(workspace), record_of(config)
    admitted = {r.name: r.digest for r in work.journal().admissions}
    both = [name for name in config.adapter_names if name in admitted]
    same = all(meta.ours.sha256 == admitted[meta.adapter_name] for meta in metas_in(out, config, both))
    return bool(both) and same and work.binding.model_dump(exclude={"format"}) == record.binding


def check_same(
    out: Path, config: SHAREConfig, workspace: Path, *, adding: Collection[str] = (), removing: Collection[str] = ()
) -> None:
    """Check that a checkpoint and its workspace have the same adapters, since bases are fitted to the workspace's.

    Args:
        out, config: the checkpoint.
        workspace: its folder.
        adding: source ids of adapters that are being added, and may have come into one of the two.
        removing: names of adapters that are being taken out.

    Raises:
        WorkspaceError: naming those that one has and the other has not.
    """
    admissions = Workspace(workspace).journal().admissions
    there, active = set(config.adapter_names) - set(removing), {r.name for r in admissions} - set(removing)
    waiting = [r.name for r in admissions if r.name in active - there and r.source_id not in adding]
    if waiting or there - active:
        demand_unchanged(out, config)  # else another run is between the two
    if waiting:
        raise WorkspaceError(
            "the workspace has adapters that the checkpoint has not",
            found=listed(waiting),
            remedy="They were added by a run that did not come to its end, or to another checkpoint of it, or taken "
            "out of this one without it: add them again by their sources, or take them out by lorashare-stream remove.",
        )
    if there - active:
        raise WorkspaceError(
            "the checkpoint has adapters that the workspace has not",
            found=listed(sorted(there - active)),
            remedy="Its journal was damaged, or they were added without it, or taken out of another checkpoint of it: "
            "compress the sources of all again, which mends it, or take them out by lorashare-stream remove.",
        )


def opened(folder: Path) -> tuple[Path, SHAREConfig]:
    """Open a checkpoint to edit it; recovers it if a run was killed while it was replaced.

    Raises:
        CheckpointError: if there is none in that folder.
    """
    demand_folder(folder)
    out = output_folder(Path(os.path.realpath(folder)))  # the workspace lies beside what a link leads to
    recover(out)
    return out, read_share_config(out)
