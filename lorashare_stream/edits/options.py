"""With what a checkpoint is changed: its workspace, its settings, its sources."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.dtypes import DTYPES
from ..checkpoint.config import SHAREConfig, read_share_config, record_of
from ..checkpoint.publish import demand_folder, output_folder
from ..checkpoint.staging import recover
from ..errors import WorkspaceError
from ..hub.lookup import fetching_for
from ..linalg.device import resolve_device
from ..pipeline import Outcome, compress, default_workspace
from ..plan.plan import Plan
from ..runtime.executors import executor_for, mapper_for
from ..runtime.progress import Progress, silent
from ..settings import Settings, overridden
from ..stages.grow import demand_unchanged
from ..stages.run import Run, places_of
from ..text import listed
from ..workspace.workspace import Workspace


@dataclass(frozen=True)
class RunOptions:
    """With what a checkpoint is changed.

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
        if record_of(config).basis_digest not in Workspace(root).published():
            raise WorkspaceError(
                "the workspace is not the one that the checkpoint was made with",
                found=root,
                remedy="Name the right one by --workspace; without any, move this one away.",
            )
        return root

    @contextmanager
    def running(self, plan: Plan, out: Path, root: Path | None) -> Iterator[tuple[Run, Workspace | None]]:
        """How the tasks of a plan are mapped, and the workspace at `root`, which is held; no workspace if None."""
        device = resolve_device(plan.settings.device)
        with (
            executor_for(self.executor, plan.processes, threads=device != "cpu") as workers,
            nullcontext() if root is None else Workspace.open(root, plan.binding, take_lock=self.take_lock) as work,
            fetching_for(plan.settings, root) as fetcher,
            mapper_for(workers, places_of(plan, root or out.parent, out, workspace=root is not None)) as mapper,
        ):
            yield Run(plan, mapper, self.progress, fetcher, work.check_held if work else lambda: None), work

    def settings(self, config: SHAREConfig) -> Settings:
        """Those with which a checkpoint was made, but for the changes."""
        record, base = record_of(config), config.base_model_name_or_path or None
        dtype = "auto" if config.coded else DTYPES[record.dtype]  # a code has none
        made = {**record.settings.chosen(), "base_model": base, "dtype": dtype}
        return Settings.from_mapping(overridden(made, self.changes))

    def compress(self, plan: Plan, out: Path, root: Path, **options: Any) -> Outcome:
        """Run a plan."""
        return compress(
            plan,
            out,
            workspace=root,
            executor=self.executor,
            take_lock=self.take_lock,
            progress=self.progress,
            **options,
        )


def check_same(
    out: Path, config: SHAREConfig, workspace: Path, *, adding: Collection[str] = (), removing: Collection[str] = ()
) -> None:
    """Demand that a checkpoint and its workspace have the same adapters, since bases are fitted to the workspace's.

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
    """A checkpoint that is to be changed, mended if a run was killed while it was replaced.

    Raises:
        CheckpointError: if there is none in that folder.
    """
    demand_folder(folder)
    out = output_folder(Path(os.path.realpath(folder)))  # the workspace lies beside what a link leads to
    recover(out)
    return out, read_share_config(out)
