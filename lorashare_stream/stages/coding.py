"""Coding: make a folder the coded checkpoint of some adapters.

Whoever changes a coded checkpoint says which adapters it is to have, and by which rule they are coded. What is there
already, coded by the same rule, stays as it is; the rest is encoded, and all is published by one rename.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_config, digest_files
from ..checkpoint.coded import VERSION, index_of, meta_of, staged_adapters
from ..checkpoint.config import read_share_config
from ..checkpoint.format import ADAPTERS, INDEX, OURS, PACKS, ours_of, skipped_of, total_bytes
from ..checkpoint.index import Index, Pack, read_index, write_index
from ..checkpoint.packs import Read, check_pack, opened, remove_from_packs, write_packs
from ..checkpoint.staging import Staging
from ..checkpoint.summary import CheckpointRecord, share_config, statistics_of
from ..codec.rate import Curve, curve_of, step_for
from ..errors import BudgetError, CheckpointError
from ..files import own_folder, remove_tree, sync
from ..plan.plan import Plan
from ..text import bytes_shown, digest_of
from ..workspace.journal import Admission
from .encode import encode_adapter, subject_of
from .job import Job
from .passes import stored
from .run import Run

SAMPLE = 64  # adapters whose rates tell the step for a limit on bytes
ENOUGH = 0.97  # of a limit on bytes: what is left then is not worth to encode all once more
_AIMS = (1.0, 0.998, 0.99, 0.95, 0.8)  # of a limit on bytes, one after the other
Method = Literal["current", "projection", "recompute"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a coded checkpoint is to be.

    Attributes:
        out: its folder.
        record: what it is of; its `basis_key` is what decides the codes.
        admissions: its adapters.
        digest: of all that decides it.
        left_out: adapters that were left out, with reasons.
        step: of its quantiser, where a limit on bytes decides; else 0.
    """

    out: Path
    record: CheckpointRecord
    admissions: Sequence[Admission]
    digest: str
    left_out: list[dict[str, Any]]
    step: float = 0.0

    def at(self, step: float) -> Target:
        """The same with another step."""
        return replace(self, step=step, record=replace(self.record, basis_key=_rule(self.record.settings_key, step)))


def _rule(settings_key: str, step: float) -> str:
    """Digest of what decides the code of an adapter."""
    return digest_of(["coded", VERSION, settings_key, step])


def target_of(plan: Plan, job: Job, left_out: list[dict[str, Any]]) -> Target:
    """What the coded checkpoint of a job is to be."""
    record = CheckpointRecord(
        plan.base_model, plan.settings.chosen(), plan.storage, plan.settings_key, plan.binding, "", "", {}
    )
    return Target(job.out, record, job.journal.admissions, job.checkpoint_key, left_out).at(0.0)


def is_current(target: Target) -> bool:
    """Whether the target is published, and its files are there."""
    ours = ours_of(target.out) or {}
    if ours.get("digest") != target.digest or skipped_of(target.out) != target.left_out:
        return False
    try:
        index = index_of(target.out, read_share_config(target.out).coded)
    except (CheckpointError, OSError):
        return False
    return all(_is_there(target.out, pack) for pack in index.packs)


def _is_there(root: Path, pack: Pack) -> bool:
    try:
        return os.stat(root / pack.file).st_size == pack.nbytes
    except OSError:
        return False


def code(run: Run, job: Job, target: Target, publishing: Callable[[str, object], object]) -> Method:
    """Make a folder the coded checkpoint of a job.

    Args:
        run, job: of the adapters that it is to have.
        target: what it is to be.
        publishing: told, before it happens, the key of what is published, and that of what is there.

    Returns:
        `projection` if adapters that were there have stayed as they were, else `recompute`.

    Raises:
        BudgetError: if so few bytes cannot be had, with the fewest that can.
    """
    size = job.settings.byte_limit(sum(sum(r.sizes) for r in job.journal.admissions))
    there, step = reusable(target)
    if size is None:
        there, target = (there if step == 0 else Index()), target.at(0.0)
        _published(_staged(run, job, target, there), size, publishing)
        return "projection" if there.adapters else "recompute"
    if there.adapters and _published(_staged(run, job, target.at(step), there), size, publishing):
        return "projection"
    _code_within(run, job, target, size, publishing)
    return "recompute"
