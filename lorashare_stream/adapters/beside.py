"""Files of weights beside those of an adapter: trained with it, most of them, and not read by PEFT.

LLaVA's projector (`non_lora_trainables.bin`), a value head (`value_head.safetensors`), layers of sentence-transformers
(`2_Dense/model.safetensors`), new rows of an embedding (`new_embeddings.safetensors`): whoever wrote them reads them by
code of its own, so they are not taken into a checkpoint, but named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack", ".gguf", ".nemo")
# What is not named: the state of a training, the same adapter in its other form, what macOS leaves; by file, by folder.
_LEFT_OUT = re.compile(
    r"optim(?:izer|_)|scheduler|scaler|sampler|rng_state|random_states|extra_state|trainer_state|recipe_state|training_args|args\."
    r"|(?:bf16_|fp16_)?zero_(?:pp_|to_fp32)|mp_rank_|pytorch_model_fsdp|adapter_model\.(?:safetensors|bin)$|\._"
)
_FOLDER_LEFT_OUT = re.compile(r"checkpoint-\d+$|global_step\d+$|pytorch_model_fsdp|optimizer|__MACOSX$|\.")
# A folder that has one of these is a thing of its own: an adapter, a checkpoint or a workspace of ours.
_OTHERS = {"adapter_config.json", "share_config.json", "workspace.copy.json"}


def weights_beside(paths: Iterable[str], own: Collection[str] = ()) -> tuple[str, ...]:
    """The files of weights among all paths below an adapter's folder that are not its own, sorted.

    Args:
        paths: relative to the folder.
        own: the adapter's weight files.

    >>> weights_beside(["value_head.bin", "optimizer.pt", "2_Dense/model.safetensors", "checkpoint-9/value_head.bin"])
    ('2_Dense/model.safetensors', 'value_head.bin')
    """
    paths = list(paths)
    others = tuple(f"{folder}/" for folder, _, name in (p.rpartition("/") for p in paths) if folder and name in _OTHERS)
    return tuple(sorted(p for p in paths if _is_told(p) and p not in own and not p.startswith(others)))


def _is_told(path: str) -> bool:
    *folders, name = path.split("/")
    return (
        name.lower().endswith(_WEIGHTS)
        and not _LEFT_OUT.match(name)
        and not any(_FOLDER_LEFT_OUT.match(folder) for folder in folders)
    )


def paths_below(root: Path) -> Iterator[str]:
    """Relative paths of the files below an adapter's folder, but for those in folders of which no weights are named."""
    top = os.fspath(root)
    for folder, below, files in os.walk(top):
        prefix = f"{folder[len(top) :].strip('/')}/".removeprefix("/")
        if prefix and not _OTHERS.isdisjoint(files):
            below.clear()
            continue
        below[:] = [name for name in below if not _FOLDER_LEFT_OUT.match(name)]
        yield from (prefix + name for name in files)
