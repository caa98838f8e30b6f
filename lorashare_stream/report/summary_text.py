"""Text for people: what a checkpoint holds, how large it is, how far off."""

from __future__ import annotations

from ..checkpoint.config import Recorded, SHAREConfig, record_of
from ..checkpoint.format import PARTS, next_bytes, total_bytes
from ..text import bytes_shown, counted, figure, listed
from .text import Row, rows_text


def summary_text(config: SHAREConfig) -> str:
    """What a checkpoint says of itself: adapters, bases, bytes on disk, errors."""
    return rows_text(_rows_of(config))


def _rows_of(config: SHAREConfig) -> list[Row]:
    stats, ours = config.compression_stats, config.record
    if config.coded:
        return _coded_rows(config, record_of(config))
    auto, shares = ", the most of any group" if config.component_selection == "auto" else "", bool(config.layer_keys)
    mean, least = (figure(stats.get(f"{which}_explained_variance")) for which in ("mean", "min"))
    pairs: list[Row] = [
        *_head_rows(config),
        ("shared modules", f"{len(config.layer_keys)} ({listed(config.target_modules, 12)})" if shares else "none"),
        *([("components k", f"{config.num_components}{auto}")] if shares else []),
        *([("explained variance", f"mean {mean}, least {least}")] if shares else []),
    ]
    if ours:
        return pairs + _our_rows(ours, config.num_adapters)
    return [*pairs, ("LoRA parameters", f"{figure(stats.get('compression_ratio'))} times fewer")]


def _head_rows(config: SHAREConfig) -> list[Row]:
    """What it is of."""
    return [
        ("base model", config.base_model_name_or_path or "not named"),
        ("adapters", f"{config.num_adapters}: {listed(config.adapter_names, 5)}"),
    ]


def _coded_rows(config: SHAREConfig, ours: Recorded) -> list[Row]:
    """What a coded checkpoint says of itself."""
    coded = config.coded
    kinds, mean = listed(config.target_modules, 12), ours.errors.mean
    step = [("step", f"{float(coded['step']):.4g} of ||dW||, of every adapter")] if coded["step"] else []
    large = "the mean error is large: these adapters need more bytes, or a smaller --max-error"
    return [
        *_head_rows(config),
        ("form", "coded: each adapter " + ("on directions that they share" if "basis" in ours.bytes else "alone")),
        ("coded modules", f"{coded['modules']} ({kinds})" if coded["modules"] else "none"),
        *[("asked for", text) for text in ours.settings.asked],
        *step,
        *_bytes_rows(ours, config.num_adapters),
        *_error_rows(ours),
        *_left_rows(ours),
        *_since_rows(ours, "directions"),
        *([("note", large)] if mean > 0.5 else []),
    ]


def _bytes_rows(ours: Recorded, adapters: int) -> list[Row]:
    """Bytes on disk."""
    size = ours.bytes
    total, more = total_bytes(size), " on these bases" if "loadings" in size else ""
    return [
        ("originals", bytes_shown(size["originals"])),
        ("checkpoint", f"{bytes_shown(total)}, {_times(size['originals'] / max(total, 1))}"),
        *[(f"  {part}", bytes_shown(size[part])) for part in PARTS if part in size],
        ("  next adapter", f"about {bytes_shown(next_bytes(size, adapters))}{more}"),
        *(
            [("LoRA bytes", f"{bytes_shown(size['lora'])} in the originals, {_times(size['lora_ratio'])}")]
            if size["lora"]
            else []
        ),
    ]


def _error_rows(ours: Recorded) -> list[Row]:
    """Certified errors."""
    e = ours.errors
    return [("relative dW error", f"mean {e.mean:.4f}, median {e.median:.4f}, p95 {e.p95:.4f}, max {e.max:.4f}")]


def _left_rows(ours: Recorded) -> list[Row]:
    """The worst adapters, those that are kept exact, and how many were left out."""
    worst = [f"{w.name} {w.relative_error:.4f}" for w in ours.errors.worst[:3]]
    pairs: list[Row] = [("worst adapters", listed(worst) or "none is compressed")]
    if ours.verbatim_adapters:
        pairs.append(("kept exact", f"{len(ours.verbatim_adapters)}: {listed(ours.verbatim_adapters)}"))
    if kept := ours.verbatim_factors:
        each = [f"of {name} in {counted(n, 'adapter')}" for name, n in kept.items()]
        pairs.append(("kept verbatim", f"LoRA tensors {listed(each)}, which are compressed but for these"))
    if ours.num_skipped:
        pairs.append(("left out", f"{ours.num_skipped}, with reasons in skipped.json"))
    return pairs


def _since_rows(ours: Recorded, what: str) -> list[Row]:
    """Which adapters were added and taken out since bases, or directions, were fitted."""
    pairs: list[Row] = []
    if ours.projected:
        pairs.append(("added since", f"{len(ours.projected)}, on {what} not fitted to them: {listed(ours.projected)}"))
    if ours.removed:
        removed = f"{len(ours.removed)}, still in the {what} (remove --refit frees them): {listed(ours.removed)}"
        pairs.append(("removed", removed))
    return pairs


def _our_rows(ours: Recorded, adapters: int) -> list[Row]:
    """What this package recorded of a SHARE checkpoint: bytes on disk, certified errors, and who is not shared."""
    size, errors = ours.bytes, ours.errors
    pairs: list[Row] = [
        ("objective", ours.objective + (", centred" if ours.center else "")),
        *[("asked for", text) for text in ours.settings.asked],
        *_bytes_rows(ours, adapters),
        *_error_rows(ours),
    ]
    if ours.cut_from:
        pairs.append(("  cut", f"from k = {ours.cut_from}: these errors follow from its, and are not measured"))
    if errors.mean_square_bounds:
        low, high = (min(1.0, bound**0.5) for bound in errors.mean_square_bounds)
        if high > 1e-3:  # below it they are rounding of float32 moments
            pairs.append(("  bounds of its rms", f"{low:.4f} to {high:.4f}, known from the bases"))
    pairs += _left_rows(ours)
    pairs += _since_rows(ours, "bases")
    if errors.mean > 0.5:
        remedy = "take more components, or code each alone by --max-error"
        pairs.append(("note", f"the mean error is large: these adapters share little at this k; {remedy}"))
    if size["lora_ratio"] < 1:
        pairs.append(("note", "the shared form is larger than the LoRA tensors: add adapters, or take a smaller k"))
    return pairs


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger" if ratio > 0 else "nothing"
