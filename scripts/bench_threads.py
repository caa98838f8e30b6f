"""What processes gain over threads: the same compression serially, by threads, and by processes.

    python scripts/bench_threads.py FOLDER [-k 32] [--workers 2] [--repeat 3]

FOLDER holds adapters, as `synthetic.py` makes them; the page cache is warm. Prints Markdown: seconds of wall time
without imports, medians; compare within one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from statistics import median

from lorashare_stream import pipeline
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings

EXECUTORS: dict[str, Callable[[int], Executor | None]] = {
    "serial": lambda workers: SerialExecutor(),
    "threads": ThreadPoolExecutor,
    "processes": lambda workers: None,  # those that a run makes for itself
}


def seconds(folder: Path, settings: Settings, executor: Executor | None, out: Path) -> float:
    begun = time.perf_counter()
    pipeline.compress(pipeline.plan_for(resolve([folder]), settings), out, executor=executor)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    settings = Settings(num_components=args.k, workers=args.workers, objective="factors", device="cpu", memory=2 << 30)
    with tempfile.TemporaryDirectory(dir=args.folder.parent, prefix=".bench-") as scratch:
        seconds(args.folder, settings, SerialExecutor(), Path(scratch, "warm"))
        times: dict[str, list[float]] = {name: [] for name in EXECUTORS}
        for turn in range(args.repeat):
            for name, made in EXECUTORS.items():
                out = Path(scratch, f"{name}-{turn}")
                times[name].append(seconds(args.folder, settings, made(args.workers), out))
    print("| collection | " + " | ".join(EXECUTORS) + " |\n|---|" + "---|" * len(EXECUTORS))
    print(f"| {args.folder.name} | " + " | ".join(f"{median(found):.1f}" for found in times.values()) + " |")


if __name__ == "__main__":
    main()
