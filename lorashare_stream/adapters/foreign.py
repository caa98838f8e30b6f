"""Files that are not what their names say, by their first bytes; adapters of tools that do not save PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdapterError
from ..text import bytes_shown, printable

START = 512  # bytes that tell what a file is
AGAIN = "Fetch or save the adapter again, or leave it out."
_PULL = "Run git lfs install and git lfs pull in its repository, or fetch it by the Hub's client."
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")


class Tool(NamedTuple):
    """A tool with a format of its own.

    Attributes:
        name: of the tool.
        fields: of its adapter_config.json, all of which it has and PEFT's has not.
        files: names of its weight files.
        remedy: what to do.
    """

    name: str
    fields: frozenset[str]
    files: re.Pattern[str]
    remedy: str


TOOLS = (
    Tool(
        "mlx-lm", frozenset({"lora_parameters"}), re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)"),
        "Convert it: lora_A and lora_B are lora_a and lora_b transposed, r is rank, lora_alpha is scale times rank.",
    ),
    Tool(
        "the adapters library (AdapterHub)", frozenset({"config", "model_class"}),
        re.compile(r"pytorch_(?:adapter|model_head)\.bin|model_head\.safetensors"),
        "PEFT cannot load it: leave it out.",
    ),
    Tool(
        "ms-swift's own tuners", frozenset({"swift_type"}), re.compile("(?!)"),
        "If it is LoRA, export it by swift export --to_peft_format true; else leave it out.",
    ),
    Tool(
        "torchtune", frozenset(), re.compile(r"adapter(?:_\d+|_model)?\.pt"),
        "Save it by torchtune's FullModelHFCheckpointer, which writes PEFT's files for all models but a few.",
    ),
    Tool(
        "NeMo", frozenset(), re.compile(r".+\.nemo"),
        "Export it for PEFT by NeMo: llm.export_ckpt(..., target='hf-peft').",
    ),
    Tool("LitGPT", frozenset(), re.compile(r"lit_model\.pth\.lora"), "PEFT cannot load it: leave it out."),
    Tool(
        "llama.cpp", frozenset(), re.compile(r"ggml-adapter-model\.bin|.+\.gguf"),
        "Name the PEFT adapter that it was converted from.",
    ),
)  # fmt: skip
_KEYS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "kohya LoRA",
        re.compile(r"^lora_(?:unet|te\d?|transformer|prior)_.*\.(?:lora_(?:up|down)\.weight|alpha|dora_scale)$"),
    ),
    ("diffusers LoRA", re.compile(r"(?:^|[._])(?:lora|lora_linear_layer)\.(?:up|down)\.weight$")),
    ("diffusers LoRA", re.compile(r"to_(?:q|k|v|out)_lora\.(?:up|down)\.weight$")),
    ("mlx-lm LoRA", re.compile(r"(?:^|\.)lora_[ab]$")),
    ("torchtune LoRA", re.compile(r"(?:^|\.)lora_[ab]\.weight$")),
    ("NeMo LoRA", re.compile(r"\.adapters?\.(?:.*\.)?linear_(?:in|out)\.weight$")),
    ("AdaLoRA", re.compile(r"\.lora_E(?:\.|$)")),
    (
        "another PEFT method",
        re.compile(
            r"\.(?:hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|ia3_l|vera_lambda_[bd]|vblora_logits_[AB]|"
            r"ranknum|oft_R|boft_[Rs]|randlora_\w+|hra_u|fourierft_spectrum|ln_tuning_layers|poly_lora_[AB]|"
            r"prompt_embeddings|unilora_\w+)"
        ),
    ),
)
# What diffusers saves by way of PEFT; a GPT-2 adapter without prefix looks alike, so only without a configuration.
_DIFFUSERS_PEFT = re.compile(
    r"^(?:unet|transformer|text_encoder(?:_2|_3)?|prior|controlnet)\..*\.(?:lora_[AB]\.weight|alpha)$"
)
_BY_TINKER = re.compile(r"\.unembed_tokens\.|\.experts\.w[123]\.lora_")  # keys that no model of transformers has
CONVERT = "tinker_cookbook.weights.build_lora_adapter converts such an adapter"


def named_by_tinker(key: str) -> bool:
    """Whether a key has a name that Tinker gives a module, under which PEFT does not find it."""
    return _BY_TINKER.search(key) is not None


def tool_of_config(config: Mapping[str, Any]) -> Tool | None:
    """The tool whose adapter_config.json this is, if it is none of PEFT's."""
    return next((tool for tool in TOOLS if tool.fields and tool.fields <= config.keys()), None)


def tool_of_files(names: Iterable[str]) -> tuple[Tool, str] | None:
    """The tool that wrote a file of these, and the file."""
    names = sorted(names)
    return next(((tool, n) for tool in TOOLS for n in names if tool.files.fullmatch(n)), None)


def foreign_kind(raw_keys: Iterable[str], *, configured: bool = True) -> tuple[str, str] | None:
    """The kind of a file that is not a PEFT LoRA, and the key that tells; None if none does.

    Without an adapter_config.json beside it (`configured`), keys of a model of diffusers tell as well.

    >>> foreign_kind(["lora_unet_down_blocks_0.lora_up.weight"])
    ('kohya LoRA', 'lora_unet_down_blocks_0.lora_up.weight')
    """
    kinds = _KEYS if configured else (*_KEYS, ("diffusers LoRA", _DIFFUSERS_PEFT))
    for key in raw_keys:
        for kind, pattern in kinds:
            if pattern.search(key):
                return kind, key
    return None


def remedy_of(kind: str, otherwise: str) -> str:
    """What to do with LoRA of another kind, as `keys.foreign_kind` names it."""
    return next((tool.remedy for tool in TOOLS if kind == f"{tool.name} LoRA"), otherwise)


def unfinished(names: Iterable[str]) -> str | None:
    """A file of these that is part of a download which did not come to its end."""
    return next((name for name in sorted(names) if name.endswith(_UNFINISHED)), None)


def is_unfinished(name: str) -> bool:
    """Whether a file is part of a download of an adapter's file."""
    return name.startswith(("adapter_model", "adapter_config.json")) and unfinished([name]) is not None


def disguised(path: Path, start: bytes, size: int) -> AdapterError | None:
    r"""The error for a file, of `size` bytes, that is something else than its name says; None if nothing tells.

    >>> print(disguised(Path("adapter_model.bin"), b"\x1f\x8b\x08", 2048))
    adapter_model.bin: a gzip archive (found 2.0 KiB). Unpack it.
    """
    what, found, remedy = _content(path.suffix, start, size)
    if what is None:
        return None
    return AdapterError(f"{printable(path.name)}: {what}", found=found or bytes_shown(size), remedy=remedy)


def disguised_file(path: Path) -> AdapterError | None:
    """As `disguised`, of a file on this machine."""
    with path.open("rb", buffering=0) as f:
        return disguised(path, f.read(START), path.stat().st_size)


def _content(suffix: str, start: bytes, size: int) -> tuple[str | None, str | None, str]:
    """What a file is, what was found, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    length = int.from_bytes(start[:8], "little")
    if size == 0:
        return "an empty file, cut short", "0 bytes", AGAIN
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git-LFS pointer, not the file that it stands for", None, _PULL
    if start.startswith((b"/annex/objects/", b".git/annex/objects/")):
        return "a git-annex pointer, not the file that it stands for", None, "Run git annex get in its repository."
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, of a login or an error perhaps", None, "Fetch it again, with a token if it asks for one."
    if start.startswith(b"\x00\x05\x16\x07"):
        return "what macOS keeps beside a file (AppleDouble)", None, AGAIN
    if not any(start):
        return "only zeros, as of a download that was cut short", None, AGAIN
    if start.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp", None, "Name the PEFT adapter that it was converted from."
    if start.startswith(b"\x1f\x8b"):
        return "a gzip archive", None, "Unpack it."
    if suffix == ".bin" and start[8:9] == b"{" and 0 < length <= size - 8:
        return "safetensors under another name", None, "Rename it to adapter_model.safetensors."
    if suffix == ".safetensors" and (re.match(rb"\x80[\x02-\x05]", start) or b"/data.pkl" in start[:200]):
        return "a pickle of torch under another name", None, "Rename it to adapter_model.bin."
    if suffix != ".json" and _is_text(start):
        return "text, and no weights", start[:60].decode().strip(), AGAIN
    return None, None, AGAIN


def _is_text(start: bytes) -> bool:
    """Whether bytes are those of a message, as servers send instead of a file: `Entry not found`, JSON."""
    return len(start) > 8 and start.isascii() and all(c >= 32 or c in b"\t\r\n" for c in start)
