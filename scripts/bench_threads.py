"""What the interpreter's lock costs: ingest and projection of the same adapters serially, in 2 threads, in 2 processes.

    python scripts/bench_threads.py [--adapters 500]

On adapters as in the collection roberta-1000 (`synthetic.py`), page cache warm. Prints Markdown: milliseconds of wall
time an adapter; compare within one run. The processes are forked after planning, which a program cannot safely do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import synthetic

from lorashare_stream import pipeline
from lorashare_stream.entry import Entry
from lorashare_stream.settings import Settings
from lorashare_stream.sources import resolve
from lorashare_stream.tasks import Job, ingest_adapter, project_adapter

Task = Callable[[Entry], Any]


def serially(task: Task, entries: Sequence[Entry]) -> None:
    for entry in entries:
        task(entry)


def in_threads(task: Task, entries: Sequence[Entry]) -> None:
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(task, entries):
            pass


def in_processes(task: Task, entries: Sequence[Entry]) -> None:
    children = []
    for i in range(2):
        child = os.fork()
        if child == 0:
            serially(task, entries[i::2])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def measure(name: str, task: Task, entries: Sequence[Entry], clear: Callable[[], None]) -> None:
    times = []
    for how in (serially, in_threads, in_processes):
        clear()
        begun = time.perf_counter()
        how(task, entries)
        times.append(f"{(time.perf_counter() - begun) * 1e3 / len(entries):.2f}")
    print(f"| {name} | " + " | ".join(times) + " |", flush=True)


def measured(run: Any, job: Job, staging: Any, receipts: Sequence[Any]) -> None:
    entries = [job.entry(receipt.name) for receipt in receipts]

    def clear() -> None:
        for folder in (job.staging / "adapters").iterdir():
            shutil.rmtree(folder)

    print("| ms an adapter | serial | 2 threads | 2 processes |\n|---|---|---|---|")
    measure("ingest", partial(ingest_adapter, job.settings.objective), entries, lambda: None)
    measure("project", partial(project_adapter, job), entries, clear)
    clear()
    for entry in entries:  # the run goes on to its end
        project_adapter(job, entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=500)
    adapters = parser.parse_args().adapters
    pipeline.project = measured
    with tempfile.TemporaryDirectory() as scratch:
        synthetic.write(synthetic.COLLECTIONS["roberta-1000"], Path(scratch) / "adapters", adapters)
        plan = pipeline.plan_for(resolve([Path(scratch) / "adapters"]), Settings(device="cpu"))
        pipeline.compress(plan, Path(scratch) / "out")


if __name__ == "__main__":
    main()
