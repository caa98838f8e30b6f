"""Model card of a checkpoint: form, errors, how to load it, and the origins of its adapters.

Names, licences and repositories are foreign strings: they are data in the YAML, and escaped in the Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.hubid import HubId, is_repo
from ..checkpoint.config import Recorded, SHAREConfig
from ..checkpoint.format import PARTS, next_bytes, total_bytes
from ..checkpoint.records import HubOrigin
from ..text import bytes_shown, counted, figure, printable

MARK = "<!-- lorashare-stream writes this card anew with each push; without this line it is yours, and kept -->"
ROWS = 1000  # sources in the table
_SITE = "https://huggingface.co"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~^$=@:])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
Rows = list[tuple[str, str]]
Sources = Mapping[str, HubOrigin | None]  # adapter -> origin; of a folder, nothing is told


def card(config: SHAREConfig, sources: Sources, repo: str) -> str:
    """The README.md of a checkpoint on the Hub, from the template `card.md.j2`.

    `ModelCard.from_template` knows no filters, and shows figures that are missing as nothing.

    Args:
        config: of the checkpoint, without local paths.
        sources: of its adapters, in order.
        repo: of the card.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(loader=PackageLoader("lorashare_stream.hub", ""), undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)  # fmt: skip  # noqa: S701
    made.filters |= {"md": escaped, "link": _link, "license": _license, "access": access, "counted": counted}
    return made.get_template("card.md.j2").render(
        metadata=_metadata(config, sources), mark=MARK, rows=ROWS, repo=repo, sources=list(sources.items()),
        facts=_facts(config), base=_base(config), coded=config.coded, ours=config.record,
    )  # fmt: skip


def _metadata(config: SHAREConfig, sources: Sources) -> str:
    """The YAML of the card."""
    from huggingface_hub import ModelCardData

    licenses = {origin and origin.license for origin in sources.values()}
    only = licenses.pop() if len(licenses) == 1 else None
    base = config.base_model_name_or_path
    named = {"base_model": base, "base_model_relation": "adapter"} if is_repo(base) else {}
    tags = ["lora", "peft", "compression"] if config.coded else ["lora", "peft", "share", "lorashare"]
    license_ = only if only and _LICENSE.fullmatch(only) else None
    values: dict[str, Any] = {"library_name": "lorashare-stream", **named, "tags": tags, "license": license_}
    return str(ModelCardData(**values).to_yaml(original_order=list(values)))


def _base(config: SHAREConfig) -> str:
    base = config.base_model_name_or_path
    return f"[{escaped(base)}]({_SITE}/{base})" if is_repo(base) else escaped(base) or "a base model that is not named"


def _facts(config: SHAREConfig) -> Rows:
    """(name, value) of each figure; those without a value are left out."""
    stats, ours, shared = config.compression_stats, config.record, not config.coded
    limit = ours.settings.asked if ours else []
    auto = "" if config.component_selection != "auto" else ", the most of any group"
    if auto and not limit:
        auto += f": as many as explain {config.variance_threshold:.4f}"
    rows = [
        ("base model", _base(config)),
        ("adapters", str(len(config.adapter_names))),
        *[("asked for", escaped(text)) for text in limit],
        ("adapted modules on shared bases", str(len(config.layer_keys)) if shared else ""),
    ]
    if config.layer_keys:
        mean, least = (figure(stats.get(f"{key}_explained_variance")) for key in ("mean", "min"))
        rows += [
            ("components k", f"{config.num_components}{auto}"),
            ("explained variance", f"mean {mean}, least {least}"),
        ]
    if ours:
        rows += _certified(ours, len(config.adapter_names), shared=shared)
    else:
        rows.append(("LoRA parameters", f"{figure(stats.get('compression_ratio'))} times fewer"))
    return [(name, value) for name, value in rows if value]


def _certified(ours: Recorded, adapters: int, *, shared: bool) -> Rows:
    """Certified errors, and bytes on disk."""
    size = ours.bytes
    total, whole = max(1, total_bytes(size)), "the basis" if shared else "everything"
    e, worst = ours.errors, [f"{escaped(w.name)} ({w.relative_error:.4f})" for w in ours.errors.worst[:5]]
    summary = f"mean {e.mean:.4f}, median {e.median:.4f}, 95th percentile {e.p95:.4f}, worst {e.max:.4f}"
    return [
        ("objective", escaped(ours.objective) + (", centred" if ours.center else "")),
        ("relative error of dW", summary if e.adapters else "none: no adapter is compressed"),
        ("worst adapters", ", ".join(worst)),
        ("bytes of the originals", bytes_shown(size["originals"])),
        (
            "bytes of this checkpoint",
            f"{bytes_shown(total)}, {whole} included: {_times(size['originals'] / total)}",
        ),
        ("of which", ", ".join(f"{part} {bytes_shown(size[part])}" for part in PARTS if part in size)),
        ("the next adapter", f"about {bytes_shown(next_bytes(size, adapters))}{' on these bases' if shared else ''}"),
        ("LoRA tensors alone", _times(size["lora_ratio"])),
        ("kept exact", _some(ours.verbatim_adapters)),
        ("added on bases that were not fitted to them", _some(ours.projected)),
        ("precision", escaped(ours.dtype) if shared else ""),
    ]


def _license(origin: HubOrigin | None) -> str:
    return "" if origin is None else origin.license or "not stated"


def access(origin: HubOrigin | None) -> str:
    """`gated`, `private`, or both; empty if everybody may read it, as far as is known."""
    return " and ".join(word for word in ("gated", "private") if origin and getattr(origin, word))


def _link(hub: HubOrigin | None) -> str:
    """A repository at a commit, a link only to what can be one; of a folder nothing."""
    if hub is None:
        return "a local folder"
    subfolder = f", {escaped(hub.subfolder)}" if hub.subfolder else ""
    if not (is_repo(hub.repo) and HubId(hub.repo, hub.revision).pinned):
        return f"{escaped(hub.repo)} @ {escaped(hub.revision)}{subfolder}"
    return f"[{escaped(hub.repo)}]({_SITE}/{hub.repo}/tree/{hub.revision}) @ {hub.revision[:12]}{subfolder}"


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


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
