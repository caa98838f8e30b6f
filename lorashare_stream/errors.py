"""The exceptions. Each names the adapter, the key, what was found, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from .text import counted, listed, printable, spelled

TOLD = 8  # kinds of problems, and names of each, in a message


class StreamError(Exception):
    """Base of all errors of this package.

    Args:
        problem: what is wrong, in one clause.
        adapter, key: where.
        found, expected: the two sides of the disagreement.
        remedy: what the user can do.
    """

    exit_code: ClassVar[int] = 1  # 1: permanent; 2: usage; 75: a rerun may help (EX_TEMPFAIL)

    def __init__(
        self,
        problem: str,
        *,
        adapter: str | None = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.adapter, self.key = problem, adapter, key
        self.found, self.expected, self.remedy = found, expected, remedy
        self.source: str | None = None  # where the adapter comes from; for lists of skipped ones

    def __reduce__(self) -> tuple[Any, ...]:  # keyword arguments survive pickling between processes
        return partial(type(self), self.problem, **self.details()), ()

    def details(self) -> dict[str, Any]:
        """The parts that are known, as plain values (for JSON and for pickling)."""
        parts = {name: getattr(self, name) for name in ("adapter", "key", "found", "expected", "remedy")}
        return {k: v if isinstance(v, str) else printable(v) for k, v in parts.items() if v is not None}

    def __str__(self) -> str:
        return spelled(self.text())

    def text(self, who: str | None = None) -> str:
        """The message, said of `who`, or of the adapter, with options as the command line has them."""
        adapter = f"adapter {printable(self.adapter)!r}" if self.adapter else ""
        return _text_of([self], adapter if who is None else who)


def _text_of(alike: Sequence[StreamError], who: str) -> str:
    """The message of errors that have problem and remedy in common, said of `who`."""
    one = alike[0]
    keys, found, expected = (_each(e.details().get(part) for e in alike) for part in ("key", "found", "expected"))
    where = ", ".join(part for part in (who, f"key {keys!r}" if keys else "") if part)
    text = f"{where}: {one.problem}" if where else one.problem
    facts = [f"{name} {values}" for name, values in (("found", found), ("expected", expected)) if values]
    text += f" ({'; '.join(facts)})" if facts else ""
    return f"{text}. {one.remedy}" if one.remedy else text


def _each(values: Iterable[Any]) -> str:
    """The values that differ, some of them if they are many."""
    different = list(dict.fromkeys(printable(value) for value in values if value is not None))
    return different[0] if len(different) == 1 else listed(different, 5)


class UsageError(StreamError, ValueError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class MissingSourceError(UsageError, FileNotFoundError):
    """A source that is not there (also a FileNotFoundError, as in lorashare)."""


class AdapterError(StreamError, ValueError):
    """One adapter that cannot be compressed: `--on-error skip` goes on without it."""


class UndecidedError(AdapterError):
    """How dW comes of an adapter's factors cannot be told from it alone: a plan keeps it exact, for this reason."""


class ValuesError(AdapterError):
    """Values that must not touch a moment: of a pinned adapter, for ever."""


class DamagedFetchError(AdapterError):
    """A file that was damaged on its way: fetched again, it may be whole."""


class MissingFileError(AdapterError, FileNotFoundError):
    """A file that an adapter must have is not there (also a FileNotFoundError, as in lorashare)."""


class GoneError(MissingFileError):
    """The source of an adapter in a workspace is gone, and its values are needed again."""


class CollectionError(StreamError, ValueError):
    """Several problems at once: everything that could be found before heavy work, named together."""

    def __init__(self, problem: str, *, problems: Sequence[AdapterError] = (), **details: Any) -> None:
        super().__init__(problem, **details)
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.problem, problems=self.problems, **self.details()), ()

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *problem_lines(self.problems)])


def problem_lines(problems: Iterable[StreamError], mark: str = "  - ") -> list[str]:
    """A line for each kind of problem (the same problem and remedy), of most adapters first, with some of their names.

    Of more than `TOLD` kinds, or names, the others are counted. `mark` begins a line.
    """
    kinds: dict[tuple[str, str | None], list[StreamError]] = {}
    for problem in problems:
        kinds.setdefault((problem.problem, problem.remedy), []).append(problem)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    texts = [alike[0].text() if len(alike) == 1 else _text_of(alike, _names_of(alike)) for alike in ordered]
    lines = [mark + spelled(text) for text in texts]
    more = f"{mark}and {sum(map(len, ordered[TOLD:]))} more, for {counted(len(ordered) - TOLD, 'other reason')}"
    return lines[:TOLD] + ([more] if len(ordered) > TOLD else [])


def _names_of(alike: Sequence[StreamError]) -> str:
    """How many adapters have a problem, and the names of some."""
    names = [repr(printable(error.adapter)) for error in alike if error.adapter]
    return f"{len(names)} adapters, {listed(names, TOLD)}" if names else f"{len(alike)} times"


def skipped_as_json(errors: Iterable[StreamError]) -> list[dict[str, Any]]:
    """Adapters that were left out, as plain values: name, reason, and the parts of the reason."""
    listing = [{"reason": e.text(), "problem": e.problem, **e.details(), "source": e.source} for e in errors]
    return [{k: v for k, v in item.items() if v is not None} for item in listing]


class MissingFilesError(CollectionError, FileNotFoundError):
    """Several adapters, each of which lacks a file (also a FileNotFoundError, as in lorashare)."""


def refusal(problem: str, problems: Sequence[AdapterError], remedy: str) -> CollectionError:
    """The error for adapters that cannot be compressed; of the type of its problems where they agree."""
    missing = bool(problems) and all(isinstance(p, FileNotFoundError) for p in problems)
    return (MissingFilesError if missing else CollectionError)(problem, problems=problems, remedy=remedy)


class BudgetError(StreamError, ValueError):
    """The plan does not fit the memory or the disk that it may use."""


class DiskError(BudgetError):
    """A disk without room for what a run will write."""

    exit_code = 75  # when there is room, a rerun helps


class WorkspaceError(StreamError):
    """A workspace that is locked, damaged, or belongs to other numbers."""


class LockedError(WorkspaceError):
    """A workspace or an output that another run holds."""

    exit_code = 75  # when that run has ended, a rerun helps


class CheckpointError(StreamError, ValueError):
    """A folder that is not a whole SHARE checkpoint, or one that was replaced while it was open."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """No checkpoint where one was to be (also a FileNotFoundError, as in lorashare)."""


class RefusedAdapterError(CheckpointError):
    """An adapter of a checkpoint that cannot be uniform, or that an engine does not take."""


class UnknownAdapterError(StreamError, KeyError):
    """No adapter of that name in the checkpoint (also a KeyError, as in lorashare)."""


def unknown_adapter(name: str, names: Iterable[str]) -> UnknownAdapterError:
    """The error for a name that is not among others, with those that are near."""
    known = list(names)
    near = difflib.get_close_matches(str(name), known, n=5, cutoff=0.5)
    remedy = f"Near: {listed(near)}." if near else f"There are: {listed(known, 5)}."
    return UnknownAdapterError(f"no adapter named {printable(name)!r} among {len(known)}", remedy=remedy)


class Stopped(StreamError):
    """The run was stopped by a signal or by the machine; the same command goes on where it was."""

    exit_code = 75


class UnreachableError(StreamError, ConnectionError):
    """The Hub did not answer for as long as a run waits; the same command goes on where it was."""

    exit_code = 75


class ClusterError(StreamError):
    """A cluster that cannot do the work, or has failed at it."""


class UnreachableClusterError(ClusterError, ConnectionError):
    """A scheduler that does not answer, or a cluster without workers; the same command goes on where it was."""

    exit_code = 75
