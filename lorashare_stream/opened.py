"""A checkpoint, opened: what it holds, lazily, and the whole of it, copied to a folder or pushed to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from .errors import CheckpointError, UsageError, unknown_adapter
from .hubreader import Folder, place_of
from .names import shown
from .publishing import copy_checkpoint
from .pushing import push
from .reader import CheckpointReader, PerAdapter, Tensors
from .shareconfig import SHAREConfig


class Opened:
    """The part of `SHAREModel` that a checkpoint fills.

    Attributes:
        config: the fields of share_config.json.
        components: group id `module:side` -> V (d, k).
        all_loadings: name -> {group id: loadings (k, r)}.
        adapter_configs: name -> the adapter_config.json that it came with.
        all_classifier_heads: name -> {PEFT key: tensor}, what is kept verbatim.
        adapter_sources: name -> where it came from.

    Opened by `from_pretrained`, all but `config` are lazy: nothing of an adapter is read before it is asked for.
    """

    def __init__(
        self,
        config: SHAREConfig,
        components: Mapping[str, torch.Tensor],
        all_loadings: Mapping[str, Tensors],
        adapter_configs: Mapping[str, dict[str, Any]],
        all_classifier_heads: Mapping[str, Tensors] | None = None,
        adapter_sources: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.components = components
        self.all_loadings = all_loadings
        self.adapter_configs = adapter_configs
        self.all_classifier_heads: Mapping[str, Tensors] = all_classifier_heads or {}
        self.adapter_sources: Mapping[str, str] = adapter_sources or {}
        self._root: Path | None = None  # where it can be changed
        self._reader: CheckpointReader | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        force_download: bool = False,
    ) -> Self:
        """Open a checkpoint, of ours or of lorashare, in a folder or on the Hub.

        Of one on the Hub, configuration and bases are fetched now, an adapter when it is asked for, all of one commit.

        Args:
            path: its folder; or, as text, a Hub id `org/name`, `org/name@revision//subfolder`. A folder comes first.
            revision: a branch, a tag or a commit; None is the default branch.
            token: for a private or gated repository; None is that of the environment.
            cache_dir: of the Hub's files; None is that of the environment.
            local_files_only: never ask the Hub; HF_HUB_OFFLINE=1 says the same.
            subfolder: where in the folder or repository it is.
            force_download: whether files are fetched that are in the cache.

        Raises:
            CheckpointError: if `path` is no whole SHARE checkpoint, or one that may not be read.
            UnreachableError: if the Hub does not answer: what is in the cache may be out of date.
        """
        reader = CheckpointReader(
            place_of(
                path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
                subfolder=subfolder, force_download=force_download,
            )
        )  # fmt: skip
        model = cls(reader.config, reader.components, {}, {})
        model._read_by(reader)
        return model

    def _read_by(self, reader: CheckpointReader) -> None:
        """Take everything from a checkpoint, when it is asked for."""
        names = reader.names
        self.config, self.components = reader.config, reader.components
        self.all_loadings = PerAdapter(names, reader.loadings)
        self.adapter_configs = PerAdapter(names, reader.adapter_config)
        self.all_classifier_heads = PerAdapter(names, reader.verbatim)
        self.adapter_sources = reader.sources
        self._reader = reader
        self._root = reader.place.root if isinstance(reader.place, Folder) else None

    def __repr__(self) -> str:
        base, k = shown(self.config.base_model_name_or_path), self.config.num_components
        return f"{type(self).__name__}({len(self.all_loadings)} adapters of {base!r}, k={k})"

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters."""
        return list(self.all_loadings)

    def certified(self, adapter_name: str) -> dict[str, Any]:
        """What compression recorded of one adapter: `relative_error`, `worst_module`, `verbatim`, `notes`, ...

        Empty for a checkpoint that lorashare wrote.
        """
        self._known(adapter_name)
        return {} if self._reader is None else dict(self._reader.meta(adapter_name).get("lorashare_stream", {}))

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Copy the checkpoint to a folder, fetching all of one on the Hub; a checkpoint that is there is replaced."""
        with self._open_reader().folder() as root:
            copy_checkpoint(root, Path(output_dir))

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        overwrite: bool = False,
    ) -> str:
        """Upload the checkpoint to a repository of the Hub, which is made if there is none, its configuration last.

        Args:
            repo_id: `org/name`.
            private: whether only its owner may read it; None is yes if a source of an adapter is gated or private.
            token: that may write; None is that of the environment.
            commit_message: else one that says what it is.
            revision: the branch; None is the default branch.
            create_pr: whether the commits are proposed as a pull request.
            overwrite: replace a checkpoint of other adapters, or push beside files of another kind.

        Returns:
            The URL of the last commit, or of the pull request.
        """
        reader = self._open_reader()
        if private is None and reader.place.is_closed():
            private = True  # who may not read it there may not read it elsewhere
        with reader.folder() as root:
            pushed = push(
                root, repo_id, private=private, token=token, commit_message=commit_message, revision=revision,
                create_pr=create_pr, overwrite=overwrite,
            )  # fmt: skip
        return pushed.url

    def _open_reader(self) -> CheckpointReader:
        if self._reader is None:
            raise CheckpointError(
                "this model was not read from a checkpoint", remedy="Build it by from_adapters or from_pretrained."
            )
        return self._reader

    def _folder(self) -> Path:
        """Where it is changed on disk."""
        place = self._open_reader().place
        if self._root is None:
            raise UsageError(
                "a checkpoint on the Hub cannot be changed where it is",
                found=place,
                remedy="Save it by save_pretrained(folder), change the one in the folder, and push that.",
            )
        return self._root

    def _known(self, name: str) -> None:
        if name not in self.all_loadings:
            raise unknown_adapter(name, self.adapter_names)
