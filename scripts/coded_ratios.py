"""How many times smaller coded checkpoints of real adapters are, against what was asked: a table of docs/evidence.md.

    python scripts/coded_ratios.py [FOLDER OF COLLECTIONS]

Every collection is compressed by the command line at each limit; an adapter above the limit ends the script. LoRA bytes
of the originals are divided by the size of all files less the tensors that are kept verbatim (heads): codes, records,
headers. In brackets: the same without share_config.json, which weighs 1 KB, and the codes alone. Prints Markdown.

The last column tells the spectrum: the participation ratio (sum s^2)^2 / sum s^4 of the singular values of dW, averaged
over modules and adapters by energy, of the rank.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import evidence_measure as em
import numpy as np

from lorashare_stream import SHAREModel

SHARED = Path(__file__).resolve().parents[2] / "shared" / "adapters"
LIMITS = (0.05, 0.1, 0.25, 0.4)
ASKED = {
    "minilm": (9.7, 14.3, 39, 87),
    "distilbert": (9.7, 14.4, 32, 58),
    "gpt2": (9.0, 13.0, 30, 56),
    "gemma3-270m": (6.6, 8.4, 13, 19),
    "flan-t5-base": (10.8, 18, 68, 155),
    "experts": (14, 26.5, 96, 188),
}
ALONE = {"gemma3-270m": "ao-wei", "flan-t5-base": "Siddharth", "experts": "branbot6"}  # begin of the folder in spectra/


def collections(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Name -> folders of adapters, those with dW = 0 left out."""
    for name in ("minilm", "distilbert", "gpt2"):
        folders = sorted(p.parent for p in (root / name).glob("*/adapter_config.json"))
        yield name, [p for p in folders if not _is_zero(p)]
    for name, begin in ALONE.items():
        yield name, sorted((root / "spectra").glob(f"{begin}*"))


def _is_zero(folder: Path) -> bool:
    """Whether every lora_B of a folder is zero."""
    return all(not m.b.any() for m in em.read_adapter(folder).values())


def participation(folders: Sequence[Path]) -> tuple[float, float]:
    """The participation ratio, and the rank, weighted by energy (each adapter by the same)."""
    ratios, ranks, weights = [], [], []
    for folder in folders:
        modules = em.read_adapter(folder).values()
        squares = [em.singular(m)[1] ** 2 for m in modules]
        whole = sum(float(s.sum()) for s in squares)
        for m, s in zip(modules, squares, strict=True):
            if s.sum() > 0:
                ratios.append(float(s.sum() ** 2 / np.square(s).sum()))
                ranks.append(len(m.a))
                weights.append(float(s.sum()) / whole)
    return float(np.average(ratios, weights=weights)), float(np.average(ranks, weights=weights))


def measured(folders: Sequence[Path], limit: float) -> tuple[list[float], float]:
    """Times smaller: of all files, without share_config.json, of the codes alone; and the largest certified error."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "lorashare_stream", "compress", *map(str, folders), "-o", str(out), "-q"]
        subprocess.run(
            [*command, "--max-error", str(limit)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        share = SHAREModel.from_pretrained(out)
        worst = max(share.certified(name)["relative_error"] for name in share.adapter_names)
        if len(share.adapter_names) != len(folders) or worst > limit:
            raise SystemExit(
                f"{folders[0].parent}: {len(share.adapter_names)} of {len(folders)} adapters, error {worst}"
            )
        size = share.config.ours["bytes"]
        files = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) - size["verbatim"]
        sizes = (files, files - (out / "share_config.json").stat().st_size, size["codes"])
        return [size["lora"] / x for x in sizes], worst


def _cell(files: float, without: float, codes: float, asked: float) -> str:
    mark = "" if files >= asked else "**"
    return f"{mark}{files:.3g}{mark} ({without:.3g}; {codes:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=SHARED, help="with minilm, distilbert, gpt2 and spectra"
    )
    root = parser.parse_args().folder
    print(f"| times smaller at E = | {' | '.join(map(str, LIMITS))} | asked | largest error / E | spectrum |")
    print("|---" * (len(LIMITS) + 4) + "|")
    for name, folders in collections(root):
        found = [measured(folders, limit) for limit in LIMITS]
        cells = [_cell(*times, wanted) for (times, _), wanted in zip(found, ASKED[name], strict=True)]
        largest = max(worst / limit for (_, worst), limit in zip(found, LIMITS, strict=True))
        asked = ", ".join(f"{a:g}" for a in ASKED[name])
        ratio, rank = participation(folders)
        told = [f"{name} ({len(folders)})", *cells, asked, f"{largest:.4f}", f"{ratio:.1f} of {rank:.0f}"]
        print(f"| {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
