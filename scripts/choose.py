"""Error against bytes on real collections, for a table of docs/fidelity.md: which objective, which k.

    python scripts/choose.py [FOLDER OF COLLECTIONS ...]

Without folders: the real collections beside the repository where they are, and the one that scripts/quickstart.sh
made. Every collection is compressed with both objectives at several k, and by lorashare where it accepts the
collection; errors are measured against the originals, ratios are of LoRA bytes, basis included. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorashare_stream import Settings, SHAREModel, compress, plan_for, resolve

ROOT = Path(__file__).resolve().parents[1]
SHARED = [ROOT.parent / "shared" / "adapters" / name for name in ("distilbert", "gpt2", "minilm")]
DEFAULTS = [p for p in (*SHARED, ROOT / "build" / "quickstart" / "adapters") if p.is_dir()]
KS = (8, 16, 32, 64)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "delta": {"objective": "delta"},
    "factors": {"objective": "factors"},
    "factors, centred": {"objective": "factors", "center": True},
}


def ours(folder: Path, k: int, options: dict[str, Any]) -> tuple[list[float], float]:
    """Certified errors of all adapters that have any dW, and how many times fewer LoRA bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        compress(plan_for(resolve([folder]), Settings(num_components=k, device="cpu", **options)), out)
        share = SHAREModel.from_pretrained(out)
        facts = [share.certified(name) for name in share.adapter_names]
        return [f["relative_error"] for f in facts if f["delta_norm"] > 0], share.config.ours["bytes"]["lora_ratio"]


def theirs(folder: Path, k: int) -> list[float] | str:
    """Errors of lorashare, measured as ours are; or why it refuses."""
    import lorashare

    try:
        share = lorashare.SHAREModel.from_adapters([str(p) for p in sorted(folder.iterdir())], k, device="cpu")
    except ValueError as e:
        return str(e).split(":")[0].lower()
    with tempfile.TemporaryDirectory() as scratch:
        share.save_pretrained(scratch)
        read = SHAREModel.from_pretrained(scratch)
        return [
            read.reconstruction_error(n, original_path=str(folder / n))["delta_relative"] for n in read.adapter_names
        ]


def rows(folder: Path) -> Iterator[str]:
    for k in KS:
        results = {name: ours(folder, k, options) for name, options in OBJECTIVES.items()}
        cells = [f"{np.mean(errors):.3f} / {max(errors):.3f}" for errors, _ in results.values()]
        peer = theirs(folder, k)
        cells.append(peer if isinstance(peer, str) else f"{np.mean(peer):.3f} / {max(peer):.3f}")
        count, ratio = len(results["delta"][0]), results["delta"][1]
        yield f"| {folder.name} ({count}) | {k} | {ratio:.2f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path, default=DEFAULTS, help="a folder of adapters of one base each")
    folders = parser.parse_args().folders
    if not folders:
        parser.error("no collection here: run scripts/quickstart.sh, which makes one, or name folders of adapters")
    print(f"| collection (adapters) | k | LoRA bytes, times fewer | {' | '.join(OBJECTIVES)} | lorashare 0.1.3 |")
    print("|---|---|---|---|---|---|---|")
    for folder in folders:
        for row in rows(folder):
            print(row, flush=True)


if __name__ == "__main__":
    main()
