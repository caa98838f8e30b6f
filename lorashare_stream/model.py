"""`SHAREModel`: the names, arguments and return shapes of lorashare, on checkpoints of any size."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adding import add_one
from .cluster import executor_of, workers_of
from .comparison import comparison, load_adapter
from .errors import CheckpointError, UsageError, problem_lines
from .hubreader import Folder
from .means import Means
from .names import listed, shown
from .opened import Opened
from .pipeline import compress, plan_for
from .reader import CheckpointReader, Tensors
from .report import adapter_notes
from .restoring import refuse_originals, restored, save_adapter
from .settings import BUDGETS, Settings
from .shrinking import remove
from .sources import resolve
from .summarytext import summary_text

log = logging.getLogger(__name__)
_said: set[str] = set()


class SHAREModel(Opened):
    """Many LoRA adapters of one base model as loadings on shared bases: what `Opened` has, and what is done with it."""

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
            executor: a `distributed.Client`, or an executor of `lorashare_stream.executors`; threads if None, as
                torch is loaded. `Forks()` takes an eighth less time on two cores; not for pickles or a GPU.
            **settings: `max_error`, `max_bytes` or `ratio` instead of k, `trim_rank`, `objective`, `center`, `dtype`,
                `memory`, `workers`, ... as in `Settings`.

        Raises:
            ValueError: our errors are ValueErrors where lorashare's are.
        """
        for name, value in (("layer_by_layer", layer_by_layer), ("chunk_size", chunk_size)):
            if value and name not in _said:
                _said.add(name)
                warnings.warn(f"{name} has no effect: adapters are always streamed", UserWarning, stacklevel=2)
        budgets = [name for name in BUDGETS if settings.get(name) is not None]
        if budgets and num_components != 32:
            raise UsageError("both num_components and a budget", found=listed(budgets), remedy="Give only one of them.")
        mapper = executor_of(executor)
        chosen = Settings.from_mapping(
            {
                **workers_of(mapper),
                "num_components": num_components,
                "variance_threshold": variance_threshold,
                "device": str(device or "auto"),
                "on_error": on_error,
                **settings,
            }
        )
        temporary = None if output_dir is not None else Path(tempfile.mkdtemp(prefix="lorashare-stream-"))
        try:
            out = Path(output_dir) if output_dir is not None else (temporary or Path()) / "checkpoint"
            root = Path(workspace) if workspace is not None else None
            found = resolve(adapters, missing_ok=chosen.on_error == "skip")
            plan = plan_for(found, chosen, root or out.parent / f"{out.name}.workspace")
            for note in adapter_notes(plan):
                log.warning("%s", note)
            skipped = compress(plan, out, workspace=root, executor=mapper).skipped
            if skipped:
                reasons = "\n".join([f"left out: {listed(e.adapter for e in skipped)}", *problem_lines(skipped)])
                warnings.warn(reasons, UserWarning, stacklevel=2)
            model = cls.from_pretrained(out)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if temporary is not None:
            weakref.finalize(model, shutil.rmtree, temporary, ignore_errors=True)
        return model

    def add_adapter(
        self,
        adapter: str,
        name: str | None = None,
        variance_threshold: float | None = None,
        device: str | None = None,
        force_recompute: bool = False,
    ) -> dict[str, Any]:
        """Add an adapter, on disk: on the bases that are there if they hold it well enough, else on new ones.

        Args:
            adapter: its folder.
            name: else its folder's.
            variance_threshold: share of its dW energy that the bases must keep; None is that of the checkpoint.
            device, force_recompute: where to compute; whether to fit the bases anew in any case.

        Returns:
            As `adding.add_one`.

        Raises:
            ValueError: if it is there already, or is none that can be added.
        """
        if name is not None and name in self.all_loadings:
            raise UsageError(f"there is an adapter named {shown(name)!r} already", remedy="Give it another name.")
        means = Means(changes={"device": str(device or "auto")}, accept=variance_threshold)
        root = self._folder()
        result = add_one(root, adapter if name is None else {name: adapter}, means, refit=force_recompute)
        self._read_by(CheckpointReader(Folder(root)))
        return result

    def remove_adapter(self, adapter_name: str) -> None:
        """Take an adapter out, on disk. Bases and moments still contain its trace: see `lorashare-stream remove`.

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            UsageError: a ValueError, if it is the last one.
        """
        self._known(adapter_name)
        root = self._folder()
        remove(root, [adapter_name], Means())
        self._read_by(CheckpointReader(Folder(root)))

    def reconstruct(self, adapter_name: str, output_dir: str | Path | None = None) -> Tensors:
        """One adapter's tensors: V L for what is shared, and what is kept verbatim.

        Args:
            adapter_name: which.
            output_dir: if given, a PEFT adapter folder is written there.

        Returns:
            PEFT key -> tensor, in the checkpoint's dtype, of int8 in float32: lora_A (r, d_in), lora_B (d_out, r).

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            UsageError: if `output_dir` holds an adapter that was not reconstructed, an original perhaps.
        """
        self._known(adapter_name)
        if output_dir is not None:
            refuse_originals(Path(output_dir))
        tensors: Tensors = {}
        for group, loading in self.all_loadings[adapter_name].items():
            tensors |= restored(adapter_name, group, self.components, loading)
        tensors.update(self.all_classifier_heads.get(adapter_name, {}))
        if output_dir is not None:
            config = self.adapter_configs[adapter_name]
            if not config:
                raise CheckpointError("its adapter_config.json was not kept", adapter=adapter_name)
            save_adapter(Path(output_dir), tensors, config)
        return tensors

    def apply(self, base_model: Any, adapter_name: str) -> Any:
        """Load one adapter on a base model: a `peft.PeftModel`."""
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            self.reconstruct(adapter_name, output_dir=folder)
            return PeftModel.from_pretrained(base_model, folder)

    def summary(self) -> None:
        """Print what the checkpoint holds, how large it is, and how far off."""
        print(summary_text(self.config))

    def reconstruction_error(
        self,
        adapter_name: str,
        original_weights: Mapping[str, torch.Tensor] | None = None,
        original_path: str | None = None,
    ) -> dict[str, Any]:
        """How far a reconstructed adapter is from its original.

        Args:
            adapter_name: which.
            original_weights: its tensors by PEFT key; or
            original_path: its folder.

        Returns:
            `per_layer` (key -> relative Frobenius error), `mean` and `max`, as lorashare gives them; and of
            dW = s B A: `delta_per_module`, `delta_relative` over all modules, `delta_worst_module`.

        Raises:
            ValueError: if neither original is given.
        """
        if original_weights is None and original_path is None:
            raise UsageError("no original to compare with", expected="original_weights or original_path")
        if isinstance(original_weights, str | Path):
            raise UsageError("original_weights is a path", remedy="Give it as original_path.")
        if original_weights is None:
            original_weights = {k: v for k, v in load_adapter(Path(str(original_path))).items() if ".lora_" in k}
        config = self.adapter_configs.get(adapter_name, {})
        return comparison(original_weights, self.reconstruct(adapter_name), config, adapter_name)
