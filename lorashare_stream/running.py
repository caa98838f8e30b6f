"""A plan, an executor and who watches: how tasks are mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .executors import Executor
from .planning import Plan

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, Iterator[Any]], Iterator[Any]]  # (step, tasks, results) -> the same results


def silent(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """Progress that shows nothing."""
    return results


@dataclass(frozen=True)
class Run:
    """How the tasks of a plan are mapped; `check` raises if the workspace is no longer held."""

    plan: Plan
    executor: Executor
    progress: Progress
    check: Callable[[], None] = lambda: None

    def map(self, step: str, fn: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """Results in the order of the tasks, as many at a time as the plan allows for this step."""
        results = self.executor.map(fn, tasks, self.plan.step(step).concurrency)
        for result in self.progress(step, len(tasks), results):
            self.check()
            yield result

    def all(self, step: str, fn: Callable[[T], Any], tasks: Sequence[T]) -> None:
        """Do all tasks, for what they leave on disk."""
        for _ in self.map(step, fn, tasks):
            pass
