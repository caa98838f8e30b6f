"""Progress: passes the results of a step on, and may show how many have come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, Iterator[Any]], Iterator[Any]]  # (step, tasks, results) -> the same results


def silent(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """Progress that shows nothing."""
    return results
