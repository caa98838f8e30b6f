"""Module patterns of PEFT configurations: regular expressions from strangers, matched in bounded time."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]  # the parse tree of an expression has no public name
from typing import Any

from ..errors import AdapterError

_MOST_STEPS = 3 * 10**8  # of a matcher that does some 10**8 a second
_STEPS_TO_COMPILE, _STEPS_A_CHARACTER = 10**4, 500
_MOST_CHARACTERS = 10_000  # of one pattern
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_SINGLE = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.CATEGORY)
_LITERAL = re.compile(r"[\w.-]*")


def matcher(patterns: Collection[str], names: Collection[str]) -> Callable[[str], str | None]:
    """What finds the first pattern that matches the end of a name at a dot (peft.utils.get_pattern_key), or None.

    Matching backtracks. At worst it tries every way to cut the name into as many parts as the pattern has loops
    over single characters, one more for PEFT's own in front, and with each cut every choice between alternatives.

    Args:
        patterns: of a configuration.
        names: all that will be looked up.

    Raises:
        AdapterError: for a pattern that is no expression, or if looking all names up could take more than seconds.
    """
    longest = max(map(len, names), default=0)
    steps, ends = 0, Counter(name[-1:] for name in names)
    for pattern in patterns:
        loops, choices = _complexity(pattern)
        steps += _STEPS_TO_COMPILE + _STEPS_A_CHARACTER * len(pattern)
        if _LITERAL.fullmatch(pattern):
            steps += ends[_ending(pattern)[-1:]] * max(16, longest // 8)
        else:
            steps += len(names) * math.comb(longest + loops + 1, loops + 1) * choices
        if steps > _MOST_STEPS:
            raise AdapterError(
                "module patterns that could take forever to match",
                key=pattern,
                found=f"{len(patterns)} patterns, {len(names)} names of up to {longest} characters",
                remedy="Write them with fewer wildcards or alternatives, or fewer of them.",
            )
    endings = [(pattern, _ending(pattern)) for pattern in patterns]
    compiled: dict[str, re.Pattern[str]] = {}

    def first_match(name: str) -> str | None:
        for pattern, ending in endings:
            if name.endswith(ending):
                if pattern not in compiled:
                    compiled[pattern] = _compiled(pattern)
                if compiled[pattern].match(name):
                    return pattern
        return None

    return first_match


def _ending(pattern: str) -> str:
    """How a name must end that a pattern without special characters matches; a dot is any character."""
    return pattern.rpartition(".")[2] if _LITERAL.fullmatch(pattern) else ""


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> re.Pattern[str]:
    """PEFT's expression for a pattern key."""
    return re.compile(rf"(.*\.)?({pattern})$")


@lru_cache(maxsize=1 << 14)
def _complexity(pattern: str) -> tuple[int, int]:
    """Loops over single characters, and choices beside them, of a pattern."""
    if len(pattern) > _MOST_CHARACTERS:
        raise AdapterError(
            "a module pattern is too long",
            key=pattern,
            found=f"{len(pattern)} characters",
            expected=f"at most {_MOST_CHARACTERS}",
            remedy="Write it shorter, or leave the adapter out.",
        )
    try:
        tree = _parser.parse(pattern)
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise AdapterError(
            "a module pattern is no regular expression",
            key=pattern,
            found=str(e),
            remedy="Mend rank_pattern or alpha_pattern, or leave the adapter out.",
        ) from e
    found = _counted(tree)
    if found is None:
        raise AdapterError(
            "a module pattern could take forever to match",
            key=pattern,
            found="a loop over more than single characters",
            expected="no loop within a loop",
            remedy="Write it without, or leave the adapter out.",
        )
    return found


def _counted(tree: Iterable[Any]) -> tuple[int, int] | None:
    """Loops and choices of a parsed expression, one after the other; None if it loops over more than characters."""
    loops, choices = 0, 1
    for operator, argument in tree:
        if operator in _REPEATS:
            least, most, body = argument
            found: tuple[int, int] | None
            if len(body) == 1 and body[0][0] in _SINGLE:
                found = (0, 1) if least == most else (0, 2) if most == 1 else (1, 1)
            elif most <= 1:
                inner = _counted(body)
                found = None if inner is None else (inner[0], 1 + inner[1])
            else:
                return None
        else:
            found = _alternatives(operator, argument)
        if found is None:
            return None
        loops, choices = loops + found[0], choices * found[1]
    return loops, choices


def _alternatives(operator: Any, argument: Any) -> tuple[int, int] | None:
    """Of one element that is no repeat: a group, a branch, a look-around, a character."""
    again = 0  # a look-around reads on without consuming, and so does a back-reference
    if operator is _constants.BRANCH:
        parts = argument[1]
    elif operator is _constants.GROUPREF_EXISTS:
        parts = [part for part in argument[1:] if part]
    elif operator in (_constants.SUBPATTERN, _constants.ASSERT, _constants.ASSERT_NOT):
        parts = [argument[-1]]
        again = int(operator is not _constants.SUBPATTERN)
    elif operator is _constants.ATOMIC_GROUP:
        parts = [argument]
    else:
        return int(str(operator).startswith("GROUPREF")), 1
    inner = [_counted(part) for part in parts]
    known = [found for found in inner if found is not None]
    if len(known) < len(inner):
        return None
    return again + max((loops for loops, _ in known), default=0), sum(choices for _, choices in known)
