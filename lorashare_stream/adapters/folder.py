"""The files of one adapter folder: which they are, the tensors in them, and what lies beside.

Files of weights beside those of an adapter were trained with it, most of them, and are not read by PEFT: LLaVA's
projector (`non_lora_trainables.bin`), a value head (`value_head.safetensors`), layers of sentence-transformers
(`2_Dense/model.safetensors`), new rows of an embedding (`new_embeddings.safetensors`). Whoever wrote them reads them by
code of its own, so they are not taken into a checkpoint, but named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError, MissingFileError
from ..files import read_bounded, read_json
from ..text import listed, printable
from .foreign import (
    AGAIN,
    START,
    disguised,
    disguised_file,
    foreign_kind,
    is_unfinished,
    remedy_of,
    tool_of_files,
    unfinished,
)
from .keys import parse_key
from .safetensors import Header, TensorReader, TensorRecord, header_of, read_header, repeated

CONFIG = "adapter_config.json"
SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_OF_TRAINERS = ("pytorch_model_fsdp", "global_step", "zero_", "bf16_zero_", "fp16_zero_", "mp_rank_")
PEFT_TENSORS = "file of PEFT's LoRA tensors"
SHARD = re.compile(r"(?:adapter_)?model-\d+-of-\d+\.safetensors")
INDEXES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack", ".gguf", ".nemo")
# What is not named: the state of a training, the same adapter in its other form, what macOS leaves; by file, by folder.
_LEFT_OUT = re.compile(
    r"optim(?:izer|_)|scheduler|scaler|sampler|rng_state|random_states|extra_state|trainer_state|recipe_state|training_args|args\."
    r"|(?:bf16_|fp16_)?zero_(?:pp_|to_fp32)|mp_rank_|pytorch_model_fsdp|adapter_model\.(?:safetensors|bin)$|\._"
)
_FOLDER_LEFT_OUT = re.compile(r"checkpoint-\d+$|global_step\d+$|pytorch_model_fsdp|optimizer|__MACOSX$|\.")
# A folder that has one of these is a thing of its own: an adapter, a checkpoint or a workspace of ours.
_OTHERS = {CONFIG, "share_config.json", "workspace.copy.json"}
MOST_PEEKS = 8  # headers read in a folder without a configuration, to tell what it is


@dataclass(frozen=True, slots=True)
class FileFact:
    """A weight file as it was when the plan was made; a change of either number is a change of the file."""

    path: Path
    size: int
    mtime_ns: int


def file_fact(path: Path) -> FileFact:
    """The facts of one file; links are followed, since the Hub's cache is made of them."""
    stat = path.stat()
    return FileFact(path, stat.st_size, stat.st_mtime_ns)


def check_still(files: Iterable[FileFact]) -> None:
    """Demand that files are those of the plan; an AdapterError if one has changed, or is gone (MissingFileError)."""
    for fact in files:
        try:
            now = file_fact(fact.path)
        except FileNotFoundError as e:
            remedy = "Restore it and run again."
            raise MissingFileError("a weight file is gone", found=printable(fact.path), remedy=remedy) from e
        if now != fact:
            remedy = "Let nothing write to it, restore what was added, and run the same command again."
            raise AdapterError("the adapter was changed while the run was reading it", found=fact.path, remedy=remedy)


def looks_like_adapter(names: Iterable[str]) -> bool:
    """Whether a folder with these file names is meant as an adapter, whole or broken."""
    weights = ("adapter_model", "pytorch_lora_weights"), (".safetensors", ".bin", ".pt")
    return any(n == CONFIG or (n.startswith(weights[0]) and n.endswith(weights[1])) or is_unfinished(n) for n in names)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        MissingFileError: if there is none, saying what the folder holds instead.
        AdapterError: if it is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise _dangling(path) or _no_config(folder)
    try:
        return parse_config(read_bounded(path, limit=16 << 20))
    except ValueError as e:
        raise e if isinstance(e, AdapterError) else AdapterError(f"{CONFIG}: {e}", remedy=AGAIN) from e


def parse_config(raw: bytes) -> dict[str, Any]:
    """A configuration, from its bytes; an AdapterError if they are no JSON object."""
    try:
        config = json.loads(raw)  # also with a byte order mark
    except (ValueError, RecursionError) as e:
        fault = AdapterError(f"{CONFIG} is not valid JSON", found=str(e), remedy=AGAIN)
        raise (disguised(Path(CONFIG), raw[:START], len(raw)) or fault) from e
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise AdapterError(f"{CONFIG} is not an object", found=kind, expected="an object", remedy=AGAIN)
    return config


def digest_config(config: Mapping[str, Any]) -> str:
    """SHA-256 of the values of a configuration, however they are written."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def foreign_lora(folder: Path, names: Iterable[str]) -> tuple[str, str] | None:
    """A file of LoRA and its kind, among the files of a folder without a configuration; None if there is none."""
    names = sorted(names)
    diffusers = [n for n in names if n.startswith("pytorch_lora_weights")]
    if diffusers:
        return diffusers[0], "diffusers LoRA"
    for name in [n for n in names if n.endswith(".safetensors") and not n.startswith("._")][:MOST_PEEKS]:
        try:
            keys = [r.name for r in read_header(folder / name)]
        except (AdapterError, OSError):
            continue
        foreign = foreign_kind(keys, configured=False)
        if foreign is not None:
            return name, foreign[0]
        if any(parse_key(key).module is not None for key in keys):
            return name, PEFT_TENSORS
    return None


def missing_config(
    names: Sequence[str],
    remedy: str = "Point to what PEFT's save_pretrained wrote, by org/name//subfolder if it is in one.",
) -> MissingFileError:
    """The error for a listing without a configuration."""
    return _absent(CONFIG, names, f"{CONFIG} and {SAFETENSORS}", remedy)


def _no_config(folder: Path) -> MissingFileError:
    if not folder.is_dir():
        return MissingFileError("no such folder", found=folder, remedy="Mend its path, or leave it out.")
    entries = sorted(os.listdir(folder))
    remedy = "Point to the folder that PEFT's save_pretrained wrote."
    foreign = foreign_lora(folder, entries)
    if foreign is not None:
        name, kind = foreign
        remedy = remedy_for(kind)
        if kind != PEFT_TENSORS:
            return MissingFileError(f"a {kind}: {printable(name)} without {CONFIG}", remedy=remedy)
    inner = inner_adapters(folder, entries)
    hint = f" Adapters lie in its subfolders: {listed(inner)}." if inner else ""
    return missing_config(entries, remedy + hint)


def remedy_for(kind: str) -> str:
    """What to do with a file that `foreign_lora` has found."""
    if kind == PEFT_TENSORS:
        return f"Put its {CONFIG} beside it, and name it {SAFETENSORS}."
    otherwise = "Only PEFT adapters are taken: load it where it is used, and save it by PEFT's save_pretrained."
    return remedy_of(kind, otherwise)


def inner_adapters(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """The immediate subfolders that hold adapters: PEFT saves those that are not named `default` there."""
    return tuple(n for n in names if (folder / n / CONFIG).is_file())


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of an adapter: safetensors before pickle, as PEFT prefers them; or shards by an index.

    Raises:
        MissingFileError: if there are none.
        AdapterError: if an index names a file outside the folder.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return (folder / name,)
    there = sorted(os.listdir(folder))
    index = next((name for name in INDEXES if (folder / name).is_file()), None)
    if index is None:
        links = [_dangling(folder / name) for name in (SAFETENSORS, PICKLE, *INDEXES)]
        raise next(filter(None, links), None) or missing_weights([*there, *_elsewhere(folder)])
    try:
        where = read_json(folder / index)
    except ValueError as e:
        fault = AdapterError(f"{index} has no usable weight_map", found=str(e), remedy=AGAIN)
        raise (disguised_file(folder / index) or fault) from e
    names = shard_names(index, where, there)
    for name in names:
        if (gone := _dangling(folder / name)) is not None:
            raise gone
    check_shards(index, where["weight_map"], {name: {r.name for r in read_header(folder / name)} for name in names})
    return tuple(folder / name for name in names)


def _dangling(path: Path) -> MissingFileError | None:
    """The error for a link to what is not there, as a cache has them that was cleaned, or copied in part."""
    if not path.is_symlink() or path.exists():
        return None
    what = f"{path.name} is a link to a file that is not there"
    return MissingFileError(what, found=os.readlink(path), remedy="Fetch it again, or copy what links lead to as well.")


def _elsewhere(folder: Path) -> list[str]:
    """Parts of downloads that the Hub's client keeps for a folder: in a folder of its own, or among a cache's blobs."""
    places = (folder / ".cache" / "huggingface" / "download", folder.parent.parent / "blobs")
    return [os.path.relpath(part, folder) for place in places for part in sorted(place.glob("*.incomplete"))]


def missing_weights(entries: Sequence[str]) -> MissingFileError:
    """The error for a listing without weights."""
    remedy = AGAIN
    if any(n.endswith(".distcp") or n.startswith(_OF_TRAINERS) for n in entries):
        remedy = "It holds the shards of ZeRO-3 or FSDP: gather the weights, and save the adapter again."
    elif any(n.startswith("adapter_model") for n in entries):
        remedy = f"If a file among these has the weights, rename it to {SAFETENSORS}."
    return _absent("weights", entries, f"{SAFETENSORS} or {PICKLE}", remedy)


def _absent(what: str, names: Sequence[str], expected: str, remedy: str) -> MissingFileError:
    """The error for a listing without a file; a download that was cut short, or a tool, if one tells why."""
    problem, cut, tool = f"no {what}", unfinished(names), tool_of_files(names)
    if cut is not None:
        problem, remedy = f"{problem}, but a download that was cut short: {printable(cut)}", AGAIN
    elif tool is not None:
        of, file, remedy = f"an adapter of {tool[0].name}", printable(tool[1]), tool[0].remedy
        problem = f"{of}: {file} without {CONFIG}" if what == CONFIG else f"{of}, not of PEFT: {file}"
    return MissingFileError(problem, found=listed(names) or "nothing", expected=expected, remedy=remedy)


def shard_names(index: str, content: Any, there: Sequence[str]) -> list[str]:
    """The shards that the content of an index names, all of which are `there`, and no other; else an AdapterError."""
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
        problem = f"a shard that {index} does not list"
        raise AdapterError(problem, key=index, found=unlisted[0], expected=listed(names), remedy=AGAIN)
    return names


def check_shards(index: str, where: Mapping[str, str], held: Mapping[str, Collection[str]]) -> None:
    """Demand that every key is in the shard that an index says, by `where`, of what shards hold; else AdapterError."""
    for key, name in where.items():
        if key not in held[name]:
            found = listed(n for n in held if key in held[n]) or "no shard that has it"
            raise AdapterError(f"{index} and the shards disagree", key=key, found=found, expected=name, remedy=AGAIN)


def tensor_records(paths: tuple[Path, ...]) -> tuple[TensorRecord, ...]:
    """All tensors of an adapter's files."""
    return tensor_header(paths).records


def tensor_header(paths: tuple[Path, ...]) -> Header:
    """All tensors of an adapter's files, and the metadata of one that is alone; an AdapterError if one is damaged."""
    if paths[0].suffix == ".bin":
        from .pickles import pickle_records

        return Header(pickle_records(paths[0]), {})
    if len(paths) == 1:  # of equal headers the same records
        return header_of(paths[0])
    return Header(once(record for number, path in enumerate(paths) for record in read_header(path, number)), {})


def once(found: Iterable[TensorRecord]) -> tuple[TensorRecord, ...]:
    """The records of all files of an adapter, or an AdapterError if two hold one key."""
    records = tuple(found)
    twice = repeated(r.name for r in records)
    if twice is not None:
        raise AdapterError("two shards hold the same key", key=twice, remedy=AGAIN)
    return records


def open_tensors(paths: tuple[Path, ...], converted: Path | None = None) -> TensorReader:
    """Open an adapter's safetensors files, or its `.bin`, of which a folder `converted` keeps what it becomes."""
    if paths[0].suffix == ".bin":
        from .pickles import open_pickle

        return open_pickle(paths[0], converted)
    return TensorReader(paths)


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the content of files, in order; for one file it is what the Hub lists as its LFS oid."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as f:
            hashlib.file_digest(f, lambda: digest)
    return digest.hexdigest()


def weights_beside(paths: Iterable[str], own: Collection[str] = ()) -> tuple[str, ...]:
    """The files of weights among all paths below an adapter's folder that are not its `own`, sorted.

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
