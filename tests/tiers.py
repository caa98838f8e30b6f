"""Which cases of a long table belong to the fast tier: every few, beginning where the commit's hash says."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def _commit() -> int:
    """The commit's hash as a number; 0 where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "-c", "safe.directory=*", "rev-parse", "HEAD"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout, 16)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return 0


COMMIT = _commit()


def slow(*values: Any) -> Any:
    """Parameters of a test, of the second tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def some_fast(cases: Iterable[Any], every: int = 7, offset: int = 0) -> list[Any]:
    """Parameters of a test: one in `every` is fast, another at another commit or offset; the others are slow."""
    fast = (COMMIT + offset) % every
    rows = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*row) if i % every == fast else slow(*row) for i, row in enumerate(rows)]
