"""Scrubbing of what leaves the machine: local paths tell user names, projects, and how a disk is laid out.

Names, Hub ids, keys of tensors and figures stay. The path of an adapter's source becomes
`local:<last component>-<8 hex digits>`, the same for the same path; any other `.../<last component>`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from ..adapters.hubid import parse_hub_id
from ..text import source_suffix

_BASE_KEYS = frozenset({"base_model", "base_model_name_or_path", "base_aliases"})
_SOURCE_KEYS = frozenset({"source_id", "original_adapter_path", "source"})
_FOREIGN = "original_config"  # for PEFT to read: expressions in it may look like anything
_START = r"(?:(?i:file):/+|~[\w.-]*/|\.{1,2}/|/(?!/)|(?<!:)//+|[A-Za-z]:[\\/]|\\\\)(?=[^\s/\\])"
_LOCAL = re.compile(_START)
_END = r"\s/\\'\"`<>|;,()\[\]{}"  # ends a component in running text, where a blank may be part of a folder's name
_IN_TEXT = re.compile(
    rf"""(?<=['"`]){_START}[^'"`\n]+(?=['"`])"""  # in quotes: all of it
    rf"""|(?<![^\s'"`(\[{{<=,;:|]){_START}(?=[^{_END}])"""
    rf"""(?:[^{_END}]|[/\\]|[ ](?![.~])(?=(?:[^{_END}]+[ ]){{0,2}}[^{_END}]+[/\\]))*"""
)
_PARTS = frozenset({"found", "expected"})  # of an error: a path may be all of it
_RELATIVE = re.compile(r"[\w.@+-]+(?:/[\w.@+-]+){2,}")
_ABSOLUTE = re.compile(r"(?<![\w.)\]/:*\\])(?:~|file:/*)?(?:/[\w.@+-]+){2,}")  # in text that may be a pattern


def is_local(text: str) -> bool:
    """Whether a text is a path on this machine, written so that it can be nothing else.

    >>> [is_local(t) for t in ("/data/a", "~/a", "../a", "file:///a", "C:/a", "org/name", "local:a-0123abcd", ".../a")]
    [True, True, True, True, True, False, False, False]
    """
    return _LOCAL.match(text) is not None


def last_component(text: str) -> str:
    r"""The last component of a path, however it is written.

    >>> last_component("C:\\models\\llama\\")
    'llama'
    """
    return re.split(r"[/\\]", text.rstrip("/\\ "))[-1] or "folder"


def _leads_somewhere(text: str) -> bool:
    """Whether the name of a model or an adapter is a path: `a/b` is taken for a Hub id, `a/b/c` is none."""
    return is_local(text) or (("/" in text or "\\" in text) and parse_hub_id(text) is None)


def _is_folder(text: str) -> bool:
    """Whether the name of a base model is a path: by its form, or since a folder is there."""
    return _leads_somewhere(text) or ("/" in text and os.path.isdir(text))


class Scrubber:
    """Takes local paths out of plain values.

    Args:
        base_model: of the checkpoint, which replaces a path of a base model.
        folders: paths that are replaced in running text wherever they occur, as the user's home is.
    """

    def __init__(self, base_model: str, folders: Iterable[str] = ()) -> None:
        home = os.path.expanduser("~")  # as it is where a user has none
        self._base = "" if _is_folder(base_model) else base_model
        known = {*(() if home == "~" else (home, os.path.realpath(home))), *(f for f in folders if _is_folder(f))}
        found = sorted(known, key=len, reverse=True)
        names = "|".join(re.escape(f.rstrip("/")) for f in found if len(f) > 2)
        self._folders = re.compile(rf"(?:{names or '(?!)'})(/|(?![\w-]))")

    def __call__(self, value: Any) -> Any:
        """The value without paths; one that has none is equal."""
        return self._value(value, "", (), foreign=False)

    def _value(self, value: Any, key: str, known: tuple[str, ...], *, foreign: bool) -> Any:
        if isinstance(value, str):
            return self._string(value, key, known, foreign=foreign)
        if isinstance(value, list):
            return [self._value(item, key, known, foreign=foreign) for item in value]
        if not isinstance(value, dict):
            return value
        telling = _SOURCE_KEYS | _PARTS
        paths = [v for k, v in value.items() if k in telling and isinstance(v, str) and self._is_path(k, v)]
        known = tuple(sorted({*known, *paths}, key=len, reverse=True))
        keys = {k: f".../{last_component(k)}" if isinstance(k, str) and is_local(k) else k for k in value}
        return {keys[k]: self._value(v, k, known, foreign=foreign or k == _FOREIGN) for k, v in value.items()}

    @staticmethod
    def _is_path(key: str, text: str) -> bool:
        """Whether a text is a path as a whole; of a revision, only by its form."""
        if key in _SOURCE_KEYS:
            return _leads_somewhere(text)
        return is_local(text) or (key != "revision" and _RELATIVE.fullmatch(text) is not None)

    def _string(self, text: str, key: str, known: tuple[str, ...], *, foreign: bool) -> str:
        if "/" not in text and "\\" not in text:
            return text
        if key in _SOURCE_KEYS and _leads_somewhere(text):
            return f"local:{last_component(text)}{source_suffix(text)}"
        if key in _BASE_KEYS and _is_folder(text):
            return self._base or last_component(text)
        if (foreign or key in _PARTS) and self._is_path(key, text):
            return f".../{last_component(text)}"
        for path in known:
            text = text.replace(path, f".../{last_component(path)}")
        text = self._folders.sub(lambda m: m[1] or "...", text)  # what is left of a path is one, and shortened next
        return (_ABSOLUTE if foreign else _IN_TEXT).sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    path = match.group()
    kept = path.rstrip(".:")  # the end of a sentence
    return f".../{last_component(kept)}{path[len(kept) :]}"
