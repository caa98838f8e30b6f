"""Adapters in several files, and the index that says which key is in which."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError, MissingFileError
from ..text import listed
from .foreign import AGAIN

SHARD = re.compile(r"(?:adapter_)?model-\d+-of-\d+\.safetensors")
INDEXES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")


def shard_names(index: str, content: Any, there: Sequence[str]) -> list[str]:
    """The shards that the content of an index names: all of them are there, among the files beside it, and no other.

    Raises:
        AdapterError: if it is not so, or a name leads out of the folder.
    """
    try:
        names = sorted(set(content["weight_map"].values()))
        if not names:
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdapterError(f"{index} has no usable weight_map", found=str(e), remedy=AGAIN) from e
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise AdapterError(
                "a weight_map leaves the adapter's folder, or names no safetensors file", key=index, found=name,
                expected="file names in the same folder", remedy="Do not trust this adapter.",
            )  # fmt: skip
    absent = [n for n in names if n not in there]
    if absent:
        raise MissingFileError("a shard is missing", key=index, found=listed(there), expected=absent[0], remedy=AGAIN)
    unlisted = sorted(n for n in there if SHARD.fullmatch(n) and n not in names)
    if unlisted:
        found, expected = unlisted[0], listed(names)
        raise AdapterError(
            f"a shard that {index} does not list", key=index, found=found, expected=expected, remedy=AGAIN
        )
    return names


def check_shards(index: str, where: Mapping[str, str], held: Mapping[str, Collection[str]]) -> None:
    """Demand that every key is in the shard that an index says, by `where`, and not only in others (shard -> keys).

    Raises:
        AdapterError: naming one that is not.
    """
    for key, name in where.items():
        if key not in held[name]:
            found = listed(n for n in held if key in held[n]) or "no shard that has it"
            raise AdapterError(f"{index} and the shards disagree", key=key, found=found, expected=name, remedy=AGAIN)
