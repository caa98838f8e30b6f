"""`SHAREModel`: the names, arguments and return shapes of lorashare, on checkpoints of any size."""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from .checkpoint.config import SHAREConfig
from .checkpoint.location import Folder
from .checkpoint.publish import copy_checkpoint
from .checkpoint.reader import AbsentMapping, CheckpointReader, LazyMapping, Tensors, open_checkpoint, restored
from .checkpoint.restore import comparison, load_factors, refuse_originals, save_adapter
from .edits.add import add_one
from .edits.options import RunOptions
from .edits.remove import remove
from .errors import CheckpointError, UsageError, problem_lines, unknown_adapter
from .hub.push import push
from .hub.repository import place_of
from .pipeline import compress, plan_for
from .plan.sources import resolve
from .report.text import adapter_notes, summary_text
from .runtime.dask import workers_of
from .serving.attach import AttachedModel, attach, check_base
from .serving.engines import check_engine
from .serving.uniform import swap
from .serving.uniform import uniform as uniform_of
from .settings import LIMITS, Settings
from .text import encodable, listed, printable, spelled

log = logging.getLogger(__name__)


@cache
def _say_void(argument: str) -> None:
    """Warn, once, whoever gives an argument of lorashare's that means nothing here."""
    warnings.warn(f"{argument} has no effect: adapters are always streamed", UserWarning, stacklevel=3)


class SHAREModel:
    """Many LoRA adapters of one base model, as loadings on shared bases, or each coded alone.

    Attributes:
        config: the fields of share_config.json.
        components: group id `module:side` -> V (d, k); a coded checkpoint has none, and any use of them says so.
        all_loadings: name -> {group id: loadings (k, r)}; likewise.
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
        self.config, self.components = config, components
        self.all_loadings, self.adapter_configs = all_loadings, adapter_configs
        self.all_classifier_heads: Mapping[str, Tensors] = all_classifier_heads or {}
        self.adapter_sources: Mapping[str, str] = adapter_sources or {}
        self._names: Mapping[str, Any] = all_loadings
        self._reader: CheckpointReader | None = None

    @classmethod
    def from_adapters(
        cls,
        adapters: list[str] | Mapping[str, str],
        num_components: int | str = 32,
        variance_threshold: float = 0.95,
        device: str | None = None,
        layer_by_layer: bool = False,
        chunk_size: int | None = None,
        on_error: str = "raise",
        *,
        output_dir: str | Path | None = None,
        workspace: str | Path | None = None,
        executor: Any = None,
        **settings: Any,
    ) -> SHAREModel:
        """Compress adapters; they are streamed, whatever their number.

        Args:
            adapters: adapter folders, folders of them, globs and manifests; or a mapping name -> folder.
            num_components: k, or `"auto"`: the smallest k per group that reaches `variance_threshold`.
            variance_threshold: share of the energy that `"auto"` keeps, in (0, 1].
            device: `"cpu"`, `"cuda"`, or None for what there is.
            layer_by_layer, chunk_size: accepted for lorashare's sake; streaming makes them void.
            on_error: `"raise"`, or `"skip"` to go on without adapters that cannot be compressed.
            output_dir: the checkpoint's folder; None is a private temporary one, removed with the object.
            workspace: the folder of resumable state; None is beside `output_dir`.
            executor: any `concurrent.futures.Executor`, or a `distributed.Client`; processes of this machine if None.
            **settings: `max_error`, `max_bytes` or `ratio` instead of k, `objective`, `center`, `dtype`,
                `memory`, `workers`, ... as in `Settings`.

        Raises:
            ValueError: our errors are ValueErrors where lorashare's are.
        """
        for name, value in (("layer_by_layer", layer_by_layer), ("chunk_size", chunk_size)):
            if value:
                _say_void(name)
        limits = [name for name in LIMITS if settings.get(name) is not None]
        if limits and num_components != 32:
            raise UsageError("both num_components and a limit", found=listed(limits), remedy="Give only one of them.")
        chosen = Settings.from_mapping(
            {
                **workers_of(executor),
                "num_components": num_components,
                "variance_threshold": variance_threshold,
                "device": str(device or "auto"),
                "on_error": on_error,
                **settings,
            }
        )
        with ExitStack() as temporary:
            if output_dir is None:
                folder = TemporaryDirectory(prefix="lorashare-stream-", ignore_cleanup_errors=True)
                output_dir = Path(temporary.enter_context(folder), "checkpoint")
            out, root = Path(output_dir), None if workspace is None else Path(workspace)
            found = resolve(adapters, missing_ok=chosen.on_error == "skip")
            plan = plan_for(found, chosen, root or out.parent / f"{out.name}.workspace")
            for note in adapter_notes(plan):
                log.warning("%s", spelled(note))
            skipped = compress(plan, out, workspace=root, executor=executor).skipped
            if skipped:
                reasons = "\n".join([f"left out: {listed(e.adapter for e in skipped)}", *problem_lines(skipped)])
                warnings.warn(reasons, UserWarning, stacklevel=2)
            model = cls.from_pretrained(out)
            weakref.finalize(model, temporary.pop_all().close)
        return model

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
        reader = open_checkpoint(
            place_of(
                path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
                subfolder=subfolder, force_download=force_download,
            )
        )  # fmt: skip
        model = cls(reader.config, reader.components, {}, {})
        model._read_by(reader)
        return model

    def _read_by(self, reader: CheckpointReader) -> None:
        """Take everything from a checkpoint, adapters when they are asked for."""
        names, self._names, self._reader = reader.names, reader.names, reader
        self.config, self.components = reader.config, reader.components
        self.all_loadings = AbsentMapping("loadings") if reader.config.coded else LazyMapping(names, reader.loadings)
        self.adapter_configs = LazyMapping(names, reader.adapter_config)
        self.all_classifier_heads = LazyMapping(names, reader.verbatim)
        self.adapter_sources = LazyMapping(names, lambda name: reader.meta(name).original_adapter_path)

    def __repr__(self) -> str:
        base = printable(self.config.base_model_name_or_path)
        form = "coded" if self.config.coded else f"k={self.config.num_components}"
        return f"{type(self).__name__}({len(self._names)} adapters of {base!r}, {form})"

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters."""
        return list(self._names)

    def certified(self, adapter_name: str) -> dict[str, Any]:
        """The record of one adapter: `relative_error`, `worst_module`, `verbatim`, `notes`, ...

        Empty for a checkpoint that lorashare wrote.

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
        """
        self._known(adapter_name)
        ours = None if self._reader is None else self._reader.meta(adapter_name).ours
        return {} if ours is None else ours.model_dump(exclude_unset=True)

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

    def _folder(self) -> Folder:
        """Where it is changed on disk."""
        place = self._open_reader().place
        if not isinstance(place, Folder):
            raise UsageError(
                "a checkpoint on the Hub cannot be changed where it is",
                found=place,
                remedy="Save it by save_pretrained(folder), change the one in the folder, and push that.",
            )
        return place

    def _known(self, name: str) -> None:
        if name not in self._names:
            raise unknown_adapter(name, self.adapter_names)

    def add_adapter(
        self,
        adapter: str,
        name: str | None = None,
        variance_threshold: float | None = None,
        device: str | None = None,
        force_recompute: bool = False,
    ) -> dict[str, Any]:
        """Add an adapter, on disk: on the bases that are there if they hold it well enough, else on new ones.

        To a coded checkpoint it is added as it is coded, alone, within the limit or by the step that is recorded; then
        the last three arguments mean nothing.

        Args:
            adapter: its folder.
            name: else its folder's.
            variance_threshold: share of its dW energy that the bases must keep; None is that of the checkpoint.
            device, force_recompute: where to compute; whether to fit the bases anew in any case.

        Returns:
            As `edits.add.add_one`.

        Raises:
            ValueError: if it is there already, or is none that can be added.
        """
        if name is not None and name in self._names:
            raise UsageError(f"there is an adapter named {printable(name)!r} already", remedy="Give it another name.")
        options = RunOptions(changes={"device": str(device or "auto")}, accept=variance_threshold)
        folder = self._folder()
        result = add_one(folder.root, adapter if name is None else {name: adapter}, options, refit=force_recompute)
        self._read_by(open_checkpoint(folder))
        return result

    def remove_adapter(self, adapter_name: str) -> None:
        """Take an adapter out, on disk. Bases and moments still contain its trace: see `lorashare-stream remove`.

        A coded checkpoint keeps nothing of it.

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            UsageError: a ValueError, if it is the last one.
        """
        self._known(adapter_name)
        folder = self._folder()
        remove(folder.root, [adapter_name], RunOptions())
        self._read_by(open_checkpoint(folder))

    def reconstruct(
        self,
        adapter_name: str,
        output_dir: str | Path | None = None,
        *,
        uniform: bool = False,
        rank: int | None = None,
        engine: str | None = None,
        notes: Counter[str] | None = None,
    ) -> Tensors:
        """One adapter's tensors: V L for what is shared, and what is kept verbatim.

        Args:
            adapter_name: which.
            output_dir: if given, a PEFT adapter folder is written there.
            uniform: one rank and scale 1 for all modules, with the same dW, as engines other than PEFT need it.
            rank: of a uniform adapter; None is the largest of its modules. Implies `uniform`.
            engine: that will serve it, one of `serving.engines.ENGINES`. Implies `uniform`.
            notes: counts what the engine passes over without harm, a sentence each.

        Returns:
            PEFT key -> tensor, in the checkpoint's dtype: lora_A (r, d_in), lora_B (d_out, r).

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            UsageError: if `output_dir` holds an adapter that was not reconstructed, an original perhaps.
            CheckpointError: if it cannot be uniform, or `engine` does not take it; nothing is written then.
        """
        self._known(adapter_name)
        if output_dir is not None:
            refuse_originals(Path(output_dir))
        tensors, uniform = self._tensors(adapter_name), uniform or rank is not None or engine is not None
        if not uniform and output_dir is None:
            return tensors
        config = self.adapter_configs[adapter_name]
        if not config:
            raise CheckpointError("its adapter_config.json was not kept", adapter=adapter_name)
        if uniform:
            tensors, config = uniform_of(tensors, config, rank=rank, adapter=adapter_name)
        passed_over = [] if engine is None else check_engine(engine, tensors, config, adapter_name)
        if output_dir is not None:
            save_adapter(Path(output_dir), tensors, config, self.certified(adapter_name).get("source_id"))
        if notes is not None:
            notes.update(passed_over)
        return tensors

    def _tensors(self, name: str) -> Tensors:
        if self._reader is not None:
            return self._reader.tensors(name)
        return self.all_classifier_heads.get(name, {}) | restored(name, self.components, self.all_loadings[name])

    def apply(self, base_model: Any, adapter_name: str) -> Any:
        """Load one adapter on a base model: a `peft.PeftModel`.

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            UsageError: if the base is a PeftModel, or has a checkpoint attached, or layers of other widths.
        """
        from peft import PeftModel

        check_base(base_model, peft=True)
        with TemporaryDirectory() as folder:
            self.reconstruct(adapter_name, output_dir=folder)
            try:
                return PeftModel.from_pretrained(base_model, folder)
            except RuntimeError as e:
                if "size mismatch" not in str(e):
                    raise
                raise UsageError(
                    "the base model has layers of other widths", adapter=adapter_name, found=str(e),
                    remedy="Load the base model that the adapter is of.",
                ) from e  # fmt: skip

    def swap(self, model: Any, adapter_name: str) -> None:
        """Put an adapter in the place of the one that a `peft.PeftModel` has, as `apply` gives it, in milliseconds.

        The parameters that are there take its values, by PEFT's hot swap: a compiled model stays so if the rank does.

        Args:
            model: what `apply` gave, of an adapter with the same weights beside LoRA and at least the same modules.
            adapter_name: which.

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            UsageError: if it has no place in the model, which is as it was then.
        """
        self._known(adapter_name)
        swap(model, self._tensors(adapter_name), self.adapter_configs[adapter_name], adapter_name)

    def attach(self, base_model: Any, *, memory: int | str | None = None) -> AttachedModel:
        """Attach all adapters to a base model, for batches whose rows have adapters of their own.

        >>> model = share.attach(base)  # doctest: +SKIP
        >>> model(**inputs, adapter_names=["first", "second", "__base__"])  # doctest: +SKIP

        Args:
            base_model: a plain model, which is neither copied nor changed: `detach()` of what is given frees it.
            memory: of a coded checkpoint, the bytes of decoded adapters that are kept, or a text such as `"2GiB"`; None
                is 1 GiB. A SHARE checkpoint is in memory as a whole.

        Returns:
            A `torch.nn.Module` whose `forward` and `generate` take `adapter_names`, one for each row.

        Raises:
            CheckpointError: if no adapter fits the base, or the checkpoint is damaged, or is replaced meanwhile.
            UsageError: if the base has adapters already.
        """
        return attach(self._open_reader(), base_model, memory)

    def summary(self) -> None:
        """Print a summary of the checkpoint: settings, adapters, bytes by part, errors."""
        print(encodable(spelled(summary_text(self.config)), sys.stdout.encoding))

    def damaged_files(self) -> list[CheckpointError]:
        """Errors of files that many adapters share, by digests: of packs of a coded checkpoint."""
        return [] if self._reader is None else self._reader.damaged()

    def reconstruction_error(
        self,
        adapter_name: str,
        original_weights: Mapping[str, torch.Tensor] | None = None,
        original_path: str | None = None,
    ) -> dict[str, Any]:
        """Error of a reconstructed adapter against its original.

        Args:
            adapter_name: which.
            original_weights: its tensors by PEFT key; or
            original_path: its folder.

        Returns:
            `per_layer` (key -> relative Frobenius error), `mean` and `max`, as lorashare gives them; and of
            dW = s B A: `delta_per_module`, `delta_relative` over all modules, `delta_worst_module`. What is coded has
            the dW, but not the factors of its original: there `per_layer` is `delta_per_module`, by module.

        Raises:
            ValueError: if neither original is given.
        """
        if original_weights is None and original_path is None:
            raise UsageError("no original to compare with", expected="original_weights or original_path")
        if isinstance(original_weights, str | Path):
            raise UsageError("original_weights is a path", remedy="Give it as original_path.")
        if original_weights is None:
            original_weights = load_factors(Path(str(original_path)))
        config = self.adapter_configs.get(adapter_name, {})
        found = self.reconstruct(adapter_name)
        return comparison(original_weights, found, config, adapter_name, coded=bool(self.config.coded))
