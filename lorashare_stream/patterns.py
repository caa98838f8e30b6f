"""Module patterns of PEFT configurations: regular expressions from strangers, matched in bounded time."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]  # the parse tree of an expression has no public name
from typing import Any

from .errors import AdapterError

_MOST_LOOPS = 4
_MOST_STEPS = 10**9  # of a matcher that does some 10**8 a second
_SINGLE = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.CATEGORY)


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that matches the end of `name` at a dot (peft.utils.get_pattern_key)."""
    return next((pattern for pattern in patterns if _compiled(pattern).match(name)), None)


def check_cost(patterns: Collection[str], names: Collection[str]) -> None:
    """Demand that matching all patterns with all names takes seconds at most.

    Matching backtracks: with n loops over single characters, it may try every way to cut the name into n parts,
    and PEFT puts a loop in front. Loops in loops, which are exponential, are refused by themselves.

    Raises:
        AdapterError: for a pattern that is no expression, or could take forever; or for too many of them.
    """
    longest = max(map(len, names), default=0)
    steps = 0
    for pattern in patterns:
        _compiled(pattern)
        loops = 1 + (_loops(_parser.parse(pattern)) or 0)
        one = math.comb(longest + loops, loops) * (1 + len(pattern) // 32)
        steps += one * len(names)
        if steps > _MOST_STEPS:
            raise AdapterError(
                "module patterns that could take forever to match",
                key=pattern,
                found=f"{len(patterns)} patterns, {len(names)} modules, names of up to {longest} characters",
                remedy="Write them with fewer wildcards, or fewer of them.",
            )


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> re.Pattern[str]:
    """PEFT's expression for a pattern key."""
    try:
        tree = _parser.parse(pattern)
        compiled = re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as e:
        raise AdapterError(
            "a module pattern is no regular expression",
            key=pattern,
            found=str(e),
            remedy="Mend rank_pattern or alpha_pattern, or leave the adapter out.",
        ) from e
    loops = _loops(tree)
    if loops is None or loops > _MOST_LOOPS:
        raise AdapterError(
            "a module pattern could take forever to match",
            key=pattern,
            expected=f"no loop within a loop, and at most {_MOST_LOOPS} loops",
            remedy="Write it with fewer wildcards.",
        )
    return compiled


def _loops(tree: Iterable[Any]) -> int | None:
    """How many loops over single characters a parsed expression has; None if it loops over anything more."""
    count = 0
    for operator, argument in tree:
        if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            _, most, body = argument
            if most > 1 and (len(body) != 1 or body[0][0] not in _SINGLE):
                return None
            parts = [body] if most <= 1 else []
            count += most > 1
        elif operator is _constants.BRANCH:
            parts = argument[1]
        elif operator is _constants.SUBPATTERN:
            parts = [argument[-1]]
        elif operator in _SINGLE or operator is _constants.AT:
            parts = []
        else:  # look-around, back-references, conditionals: not seen in any adapter
            return None
        inner = [_loops(part) for part in parts]
        if None in inner:
            return None
        count += sum(n for n in inner if n is not None)
    return count
