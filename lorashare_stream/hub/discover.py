"""Discovery of the adapters of a base model that the Hub lists, pinned: a manifest, by one request a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.folder import CONFIG, INDEXES, PICKLE, SAFETENSORS, SHARD, weights_beside
from ..adapters.hubid import HubId, is_repo, parse_hub_id
from ..errors import StreamError
from ..files import atomic_file
from ..text import listed, printable
from .client import Hub, listing_of, peft_of

EXPAND = ["sha", "siblings", "gated", "private", "config", "cardData", "tags", "downloads", "usedStorage"]
_KNOWN = {CONFIG, SAFETENSORS, PICKLE, *INDEXES}
_OF_TRAINING = re.compile(r"(^|/)checkpoint-\d+$")
Item = dict[str, Any]


def discover(
    bases: Sequence[str],
    *,
    author: str | None = None,
    search: str | None = None,
    limit: int | None = None,
    min_downloads: int = 0,
    offline: bool = False,
) -> tuple[list[Item], list[dict[str, str]]]:
    """The adapters of a base model on the Hub, those with most downloads first.

    Of a repository with an adapter at its root that one is taken; else those in its folders, but for the checkpoints
    of a training. `bases` are ids of the base model, its aliases included; `limit` is a number of adapters.

    Returns:
        The lines of a manifest; `repo` and `reason` of what cannot be LoRA, as the listing already shows.

    Raises:
        UnreachableError: if the Hub does not answer.
        StreamError: if it lists no adapter.
    """
    hub = Hub(offline=offline)
    items: list[Item] = []
    left_out: list[dict[str, str]] = []
    seen: set[str] = set()
    for base in bases:
        query = {"author": author, "search": search, "sort": "downloads", "expand": EXPAND}
        for info in models(hub, filter=[f"base_model:adapter:{base}"], **query):
            if (info.downloads or 0) < min_downloads or (limit is not None and len(items) >= limit):
                break
            if info.id not in seen:
                seen.add(info.id)
                found, reason = _adapters_in(info, base)
                items += found
                left_out += [{"repo": info.id, "reason": reason}] if reason else []
    items = items[:limit]
    if not items:
        raise StreamError(
            f"the Hub lists no LoRA adapter of {printable(', '.join(bases))}",
            found=listed(("{repo}: {reason}".format(**item) for item in left_out), 3) or "nothing",
            remedy="Name the base as its adapters name it, and its mirrors by --base-alias; loosen the filters.",
        )
    return items, left_out


def models(hub: Hub, **query: Any) -> Iterator[Any]:
    """The `ModelInfo`s that a query finds: one request a page, each retried alone; `HfApi.list_models` retries too."""
    if hub.offline:
        raise StreamError("the Hub cannot be asked offline", remedy="Use a manifest that was made before.")
    url: str | None = f"{hub.api.endpoint}/api/models"
    asked: dict[str, Any] | None = {name: value for name, value in query.items() if value}
    while url:
        page, url = hub.retry(partial(_page, url, asked), "listing models")
        asked = None  # the address of the next page has it
        yield from page


def _page(url: str, query: Mapping[str, Any] | None) -> tuple[list[Any], str | None]:
    """One page of a listing of models, and the address of the next one."""
    from huggingface_hub import ModelInfo, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    response = get_session().get(url, params=query, headers=build_hf_headers(library_name="lorashare-stream"))
    hf_raise_for_status(response)
    found = [ModelInfo(**{"siblings": None, **item}) for item in response.json()]  # type: ignore[no-untyped-call]
    return found, response.links.get("next", {}).get("url")


def _adapters_in(info: Any, base: str) -> tuple[list[Item], str | None]:
    """The adapters of a repository; or why there are none."""
    kind = peft_of(info).get("peft_type")
    if isinstance(kind, str) and kind.upper() != "LORA":
        return [], f"peft_type {kind}"
    if not is_repo(info.id) or not HubId(info.id, str(info.sha)).pinned:
        return [], "no usable id or commit"
    paths = [s.rfilename for s in info.siblings or ()]
    folders = [path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == CONFIG]
    if not folders:
        return [], f"no {CONFIG}"
    chosen = [""] if "" in folders else sorted(f for f in folders if not _OF_TRAINING.search(f))
    chosen = [f for f in chosen if parse_hub_id(str(HubId(info.id, info.sha, f))) == HubId(info.id, info.sha, f)]
    items = [_item(info, folder, base) for folder in chosen]
    usable = [item for item in items if _has_weights(item["files"])]
    if not chosen:
        return [], "only checkpoints of a training"
    return usable, None if usable else f"no {SAFETENSORS} or {PICKLE} in a folder that can be named"


def _has_weights(files: Sequence[str]) -> bool:
    """Whether files of these names are those of an adapter; an index may be that of a whole model."""
    shards = any(SHARD.fullmatch(name) and name.startswith("adapter_model") for name in files)
    return SAFETENSORS in files or PICKLE in files or (shards and not set(INDEXES).isdisjoint(files))


def _item(info: Any, folder: str, base: str) -> Item:
    listing = listing_of(info, folder)
    beside = weights_beside(listing.files)
    item: Item = {
        "repo": info.id,
        "revision": info.sha,
        "subfolder": folder,
        "files": [name for name in listing.files if name in _KNOWN or name in beside],
        "size": info.used_storage,
        "gated": listing.gated,
        "private": listing.private,
        "base_model": listing.base_model or base,
        "license": listing.license,
        "downloads": info.downloads,
    }
    return {k: v for k, v in item.items() if v not in (None, "")}


def write_manifest(path: Path, items: Sequence[Item]) -> None:
    """Write a manifest that `compress` takes; whole, or not at all."""
    with atomic_file(path) as f:
        f.write(b"".join(json.dumps(item).encode() + b"\n" for item in items))
