"""Seconds of the phases of a run, of the package of one checkout or of several in turn.

    python scripts/bench_phases.py COLLECTION CHECKOUT [CHECKOUT ...] [-k 32] [--repeat 3]

A phase ends when its first file appears in the workspace or beside the output, which is looked at 200 times a second:
that takes a part of a core, so that runs are slower here than in scripts/bench.py. Prints medians.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PHASES = ("start", "ingest", "sums and bases", "projection and publishing")
EVERY = 0.005  # seconds between two looks


def phases(checkout: Path, collection: Path, k: int, folder: Path) -> list[float]:
    """Seconds of each phase: until the journal, the arrays of moments, the staged adapters, and the end."""
    out, work = folder / "out", folder / "out.workspace"
    command = [sys.executable, "-P", "-m", "lorashare_stream", "compress", collection, "-o", out, "-k", str(k)]
    command += ["--objective", "factors", "--device", "cpu", "--memory", "1GiB", "-q"]
    seen, begun = list[float](), time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=folder
    ) as process:
        while process.poll() is None:
            marks = (
                (work / "journal.jsonl").exists,
                lambda: any((work / "moments").glob("*/")),
                lambda: any(folder.glob(".out.*/adapters")),
            )
            if len(seen) < len(marks) and marks[len(seen)]():
                seen.append(time.perf_counter() - begun)
            time.sleep(EVERY)
    if process.returncode != 0 or len(seen) < len(PHASES) - 1:
        raise SystemExit(f"{checkout} ends with {process.returncode}")
    ends = [*seen, time.perf_counter() - begun]
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", type=Path)
    parser.add_argument("checkouts", type=Path, nargs="+")
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    found: dict[Path, list[list[float]]] = {checkout: [] for checkout in args.checkouts}
    with tempfile.TemporaryDirectory(dir=args.collection.absolute().parent, prefix=".bench-") as scratch:
        for repeat in range(args.repeat):
            for number, checkout in enumerate(found):
                folder = Path(scratch, f"{repeat}-{number}")
                folder.mkdir()
                os.sync()
                found[checkout].append(phases(checkout.absolute(), args.collection.absolute(), args.k, folder))
    print("| checkout |", " | ".join(PHASES), "|\n|---" + "|---" * len(PHASES) + "|")
    for checkout, rounds in found.items():
        print(f"| {checkout} |", " | ".join(f"{median(each):.2f}" for each in zip(*rounds, strict=True)), "|")


if __name__ == "__main__":
    main()
