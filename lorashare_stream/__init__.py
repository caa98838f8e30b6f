"""Compress thousands of LoRA adapters of one base model into a SHARE checkpoint, streaming and resumable.

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterError,
    BudgetError,
    CheckpointError,
    CollectionError,
    Stopped,
    StreamError,
    UsageError,
    WorkspaceError,
)
from .settings import Settings
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.config import SHAREConfig
    from .model import SHAREModel
    from .pipeline import compress, plan_for
    from .plan.sources import resolve
    from .stages.verify import verify

_LAZY = {
    "SHAREConfig": "checkpoint.config",
    "SHAREModel": "model",
    "compress": "pipeline",
    "plan_for": "pipeline",
    "resolve": "plan.sources",
    "verify": "stages.verify",
}

__all__ = [
    "AdapterError",
    "BudgetError",
    "CheckpointError",
    "CollectionError",
    "SHAREConfig",
    "SHAREModel",
    "Settings",
    "Stopped",
    "StreamError",
    "UsageError",
    "WorkspaceError",
    "__version__",
    "compress",
    "plan_for",
    "resolve",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
