"""A LoRA resolver of vLLM: adapters of a checkpoint, loaded when a request names them.

An entry point of the group `vllm.general_plugins`, so that vLLM loads it where this package is installed beside it.
It is set by environment variables, which are all that vLLM gives to a plugin:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING  1: without it, vLLM asks no resolver
    LORASHARE_CHECKPOINT              the checkpoint: a folder, or an id of the Hub
    LORASHARE_CACHE                   where adapter folders are kept; ~/.cache/lorashare-stream if it is not set
    LORASHARE_BASE_ALIAS              more names of the base model, by commas
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ..errors import StreamError
from ..text import printable
from .folders import FolderCache, names_base

NAME = "lorashare-stream"
CHECKPOINT, CACHE, ALIAS = "LORASHARE_CHECKPOINT", "LORASHARE_CACHE", "LORASHARE_BASE_ALIAS"
ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
log = logging.getLogger("vllm.lorashare_stream")  # vLLM shows what is below its own logger


class CheckpointResolver(LoRAResolver):  # type: ignore[misc] # vLLM is not there to be checked
    """Resolver of the adapters of one checkpoint; `aliases` are more names of its base model."""

    def __init__(self, folders: FolderCache, aliases: tuple[str, ...] = ()) -> None:
        self.folders, self.aliases = folders, aliases

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request that loads an adapter; None if the checkpoint has none of that name, or is of another base.

        Args:
            base_model_name: what `vllm serve` was given, mostly a path.
            lora_name: the model that a client asked for.

        Raises:
            StreamError: if there is such an adapter and it cannot be served; most are ValueErrors, whose text vLLM 0.32
                gives the client with the status 400.
        """
        return await asyncio.to_thread(self._resolve, base_model_name, lora_name)

    def _resolve(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        try:
            reader = self.folders.reader()
            if lora_name not in reader.names:
                return None
            if not names_base(reader.config, base_model_name, self.aliases):
                log.warning(
                    "%s is an adapter of %s, and the model that is served is called %s: if they are one, set %s=%s",
                    printable(lora_name), printable(reader.config.base_model_name_or_path or "a model without a name"),
                    printable(base_model_name), ALIAS, printable(base_model_name),
                )  # fmt: skip
                return None
            folder = self.folders.folder(lora_name)
        except (StreamError, OSError) as e:
            log.error("%s", e)
            raise
        if folder is None:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))  # vLLM sets the number


def register() -> None:
    """Register the resolver, if a checkpoint is named; vLLM calls this in each of its processes."""
    found = resolver_from(os.environ)
    if found is None:
        return
    if os.environ.get(ALLOW, "0").strip().lower() not in ("1", "true"):
        log.warning("%s has no effect: set %s=1, without which vLLM asks no resolver", CHECKPOINT, ALLOW)
    LoRAResolverRegistry.register_resolver(NAME, found)
    log.info("adapters of %s are served by their names", printable(found.folders.checkpoint))


def resolver_from(environment: Mapping[str, str]) -> CheckpointResolver | None:
    """The resolver that environment variables describe; None if they name no checkpoint."""
    checkpoint = environment.get(CHECKPOINT)
    if not checkpoint:
        return None
    cache = environment.get(CACHE) or Path(environment.get("XDG_CACHE_HOME") or "~/.cache", NAME)
    aliases = tuple(alias.strip() for alias in environment.get(ALIAS, "").split(",") if alias.strip())
    return CheckpointResolver(FolderCache(checkpoint, Path(cache).expanduser().absolute()), aliases)
