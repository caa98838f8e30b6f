"""The model card of a checkpoint: what it is, how far off, how to load it, and where its adapters came from.

Names, licences and repositories are other people's strings: they are data in the YAML, and escaped in the Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.hubid import HubId, is_repo
from ..checkpoint.config import SHAREConfig
from ..checkpoint.format import PARTS, next_bytes, total_bytes
from ..errors import CheckpointError
from ..settings import asked
from ..text import bytes_shown, counted, printable

MARK = "<!-- lorashare-stream writes this card anew with each push; without this line it is yours, and kept -->"
ROWS = 1000  # sources in the table
_SITE = "https://huggingface.co"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~^$=@:])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one adapter came from.

    Attributes:
        name: of the adapter.
        hub: where on the Hub, pinned; None is a folder, of which nothing is told.
        license: as the Hub has it.
        gated, private: whether not everybody may read it there; None if that is not known.
    """

    name: str
    hub: HubId | None = None
    license: str | None = None
    gated: bool | None = None
    private: bool | None = None

    @property
    def closed(self) -> bool:
        """Whether not everybody may read it."""
        return bool(self.gated or self.private)


def card(config: SHAREConfig, sources: Sequence[Provenance], repo_id: str) -> str:
    """The README.md of a checkpoint on the Hub.

    Args:
        config: of the checkpoint, without local paths.
        sources: of its adapters, in order.
        repo_id: where it will be.

    Raises:
        CheckpointError: if its figures cannot be read.
    """
    try:
        facts = _facts(config)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as e:
        fault = f"{type(e).__name__}: {e}"
        raise CheckpointError("the figures in share_config.json cannot be read", found=fault) from e
    base = _base_link(config)
    parts = [
        f"---\n{_front_matter(config, sources)}---\n{MARK}",
        f"# {counted(len(sources), 'LoRA adapter')} in one {'coded' if config.coded else 'SHARE'} checkpoint",
        f"Adapters of {base}, {_CODED if config.coded else _SHARED} Any one of them can be reconstructed as a PEFT "
        "adapter.",
        _table(("", ""), facts),
        *_errors_explained(config),
        _USE.replace("REPO", repo_id),
        _CODED_ONLY if config.coded else _LORASHARE.replace("REPO", repo_id),
        "## Where the adapters came from",
        *_provenance(sources, _TELLS if config.coded else "`adapters/<name>/adapter_meta.json`"),
    ]
    return "\n\n".join(parts) + "\n"


_SHARED = "each kept as loadings on bases that all of them share."
_CODED = "each coded alone: the weight change dW = s B A of its modules, quantised and entropy-coded."
_TELLS = "`SHAREModel.certified(name)`"

_USE = """## Use

With [lorashare-stream](https://pypi.org/project/lorashare-stream/), which fetches only what is used:

```python
from lorashare_stream import SHAREModel

share = SHAREModel.from_pretrained("REPO")
name = share.adapter_names[0]
model = share.apply(base_model, name)  # a PeftModel; base_model is loaded by transformers
weights = share.reconstruct(name, output_dir="adapter")  # or a folder that PEFT loads
```"""
_LORASHARE = """With [lorashare](https://pypi.org/project/lorashare/) 0.1.3, which reads folders:

```python
from huggingface_hub import snapshot_download
from lorashare import SHAREModel

share = SHAREModel.from_pretrained(snapshot_download("REPO"))
```"""

_CODED_ONLY = (
    "The codes of some hundred adapters are one file, of which one ranged request fetches one. lorashare cannot read a "
    "coded checkpoint. What `reconstruct` writes is a PEFT adapter, of the rank and with the keys of its original."
)


def _front_matter(config: SHAREConfig, sources: Sequence[Provenance]) -> str:
    import yaml

    values: dict[str, Any] = {"library_name": "lorashare-stream"}
    if is_repo(config.base_model_name_or_path):
        values |= {"base_model": config.base_model_name_or_path, "base_model_relation": "adapter"}
    values["tags"] = ["lora", "peft", "compression"] if config.coded else ["lora", "peft", "share", "lorashare"]
    licenses = {source.license for source in sources}
    only = licenses.pop() if len(licenses) == 1 else None
    if only and _LICENSE.fullmatch(only):
        values["license"] = only
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _base_link(config: SHAREConfig) -> str:
    base = config.base_model_name_or_path
    if not base:
        return "a base model that is not named"
    return f"[{escaped(base)}]({_SITE}/{base})" if is_repo(base) else escaped(base)


def _facts(config: SHAREConfig) -> Rows:
    stats, ours = config.compression_stats, config.ours
    auto = "" if config.component_selection != "auto" else ", the most of any group"
    limit = asked(ours.get("settings", {}))
    if auto and not limit:
        auto += ": as many as explain " + _share(config.variance_threshold)
    rows = [
        ("base model", _base_link(config)),
        ("adapters", str(len(config.adapter_names))),
        *[("asked for", escaped(text)) for text in limit],
    ]
    if not config.coded:
        rows.append(("adapted modules on shared bases", str(len(config.layer_keys))))
    if config.layer_keys:
        variance = [f"{word} {_share(stats[f'{key}_explained_variance'])}" for key, word in _VARIANCE]
        rows += [("components k", f"{config.num_components}{auto}"), ("explained variance", ", ".join(variance))]
    if not ours:
        return [*rows, ("LoRA parameters", _times(float(stats["compression_ratio"])))]
    return [*rows, *_our_facts(ours, len(config.adapter_names), coded=bool(config.coded))]


_VARIANCE = (("mean", "mean"), ("min", "least"))


def _our_facts(ours: dict[str, Any], adapters: int, *, coded: bool) -> Rows:
    """Certified errors, and bytes on disk."""
    size, errors = ours["bytes"], ours["errors"]
    total = total_bytes(size)
    centred = ", centred" if ours["center"] else ""
    whole = "everything" if coded else "the basis"
    summary = [f"{name} {float(errors[key]):.4f}" for key, name in _ERRORS]
    worst = [f"{escaped(w['name'])} ({float(w['relative_error']):.4f})" for w in errors["worst"][:5]]
    rows = [
        ("objective", f"{escaped(ours['objective'])}{centred}"),
        ("relative error of dW", ", ".join(summary) if errors["adapters"] else "none: no adapter is compressed"),
        ("worst adapters", ", ".join(worst)),
        ("bytes of the originals", bytes_shown(size["originals"])),
        ("bytes of this checkpoint", f"{bytes_shown(total)}, {whole} included: {_times(size['originals'] / total)}"),
        ("of which", ", ".join(f"{part} {bytes_shown(size[part])}" for part in PARTS if part in size)),
        ("the next adapter", f"about {bytes_shown(next_bytes(size, adapters))}{'' if coded else ' on these bases'}"),
        ("LoRA tensors alone", _times(float(size["lora_ratio"]))),
        ("kept exact", _some(ours["verbatim_adapters"])),
        ("added on bases that were not fitted to them", _some(ours["projected"])),
        ("precision", "" if coded else escaped(ours["dtype"])),
    ]
    return [(name, value) for name, value in rows if value]


_ERRORS = (("mean", "mean"), ("median", "median"), ("p95", "95th percentile"), ("max", "worst"))


def _errors_explained(config: SHAREConfig) -> list[str]:
    if not config.ours:
        return []
    text = (
        "The error of an adapter is the Frobenius norm of what its weight change dW = s B A lost, over that of dW, all "
        "of its compressed modules together, computed of the values that are stored. "
    )
    text += f"{_TELLS} tells" if config.coded else "In `adapter_meta.json` is"
    text += " that of each adapter."
    if config.ours.get("cut_from"):
        text += " These are not measured: they follow from the errors at the larger k from which this one was cut."
    return [text]


def _provenance(sources: Sequence[Provenance], tells: str) -> list[str]:
    rows = [
        (
            escaped(source.name),
            "a local folder" if source.hub is None else _link(source.hub),
            ("" if source.hub is None else "not stated") if source.license is None else escaped(source.license),
            " and ".join(word for word, is_so in (("gated", source.gated), ("private", source.private)) if is_so),
        )
        for source in sources[:ROWS]
    ]
    more = len(sources) - ROWS
    rest = [f"And {more} more: {tells} says it of each."] if more > 0 else []
    terms = "The licences are those that the Hub stated when the adapters were read."
    from_hub = any(source.hub is not None for source in sources)
    return [_table(("adapter", "source", "licence", "access"), rows), *rest, *([terms] if from_hub else [])]


def _link(hub: HubId) -> str:
    """A repository at a commit; a link only to what can be one."""
    subfolder = f", {escaped(hub.subfolder)}" if hub.subfolder else ""
    if not (is_repo(hub.repo) and hub.pinned):
        return f"{escaped(hub.repo)} @ {escaped(hub.revision)}{subfolder}"
    return f"[{escaped(hub.repo)}]({_SITE}/{hub.repo}/tree/{hub.revision}) @ {hub.revision[:12]}{subfolder}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: object) -> str:
    r"""A foreign string as Markdown that shows it, in a table's cell too: no link, no HTML, no line of its own.

    >>> escaped("a|b](javascript:x)<b>")
    'a\\|b\\]\\(javascript\\:x\\)&lt;b&gt;'
    """
    plain = _SPECIAL.sub(r"\\\1", printable(text, 200))
    return re.sub(r"(?i)www\.", r"www\\.", "".join(_HTML.get(c, c) for c in plain))


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)}: {', '.join(escaped(n) for n in names[:5])}{more}" if names else ""


def _share(value: Any) -> str:
    return f"{float(value):.4f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
