"""This package against lorashare and vlora on synthetic collections: time, memory, bytes, and what was captured.

    python scripts/bench.py [RUN] [--data FOLDER] [--collections NAME ...] [--systems NAME ...] [-k 32 128] [--repeat 3]
    python scripts/bench.py [RUN] --before CHECKOUT [...]
    python scripts/bench.py [RUN] --floor
    python scripts/bench_open.py CHECKPOINT [--run RUN]
    python scripts/bench.py [RUN] --render docs/benchmarks.md

Appends a JSON line for every process to the results (--results), and does not repeat what is already there under the
same RUN, but for failures; a RUN that is not given is named after the boot of the machine. Times are only comparable
within one run: another commit, in a checkout of its own, takes part in it as `before-...`. Collections that are missing
in the data folder are made. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bench_oracle
import bench_report
import synthetic
from bench_oracle import Data
from bench_peers import PEERS

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"
OURS = {
    "ours-factors": ["--objective", "factors"],
    "ours-delta": ["--objective", "delta"],
    "ours-factors-f32": ["--objective", "factors", "--dtype", "float32"],  # as lorashare stores any dtype
    "ours-coded": ["--max-error", "0.25"],  # instead of k
}
SYSTEMS = (*OURS, *PEERS)
# Of another checkout. Not coded: what has no standard form is read back by the code that wrote it.
BEFORE = {name.replace("ours", "before"): words for name, words in OURS.items() if name != "ours-coded"}
COLLECTIONS = [name for name in synthetic.COLLECTIONS if name != "tiny"]
MEMORY = {"mistral-300": "2GiB", "wide": "4GiB"}  # --memory
DEFAULT_MEMORY = "1GiB"
LIMIT_SECONDS, LIMIT_BYTES = 600.0, 20 << 30  # of a peer
FILES = 256  # ulimit -n of our runs
Line = dict[str, Any]


@dataclass
class Results:
    """The JSON lines of one file, those of one run at hand."""

    path: Path
    run: str
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, run: str) -> Results:
        lines = path.read_text().splitlines() if path.exists() else []
        return cls(path, run, [x for x in map(json.loads, lines) if x["run"] == run])

    def without_failures(self) -> Results:
        return replace(self, lines=[x for x in self.lines if x.get("status") != "failed"])

    def add(self, kind: str, facts: Line) -> Line:
        line = {"run": self.run, "kind": kind, "at": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line

    def find(self, kind: str, **facts: Any) -> Line | None:
        """The last line that has these facts."""
        for line in reversed(self.lines):
            if line["kind"] == kind and all(line.get(key) == value for key, value in facts.items()):
                return line
        return None


def default_run() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"{platform.node()}-{boot[:8]}"


def machine() -> Line:
    import scipy.linalg.cython_blas  # noqa: F401  # loads SciPy's BLAS, which is what is used
    from threadpoolctl import threadpool_info

    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in cpus if x.startswith("model name")), platform.machine())
    versions = {}
    for package in ("lorashare-stream", "lorashare", "vlora-dev", "numpy", "scipy", "torch", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    loaded = [x for x in threadpool_info() if x["user_api"] == "blas"]
    blas = {f"{x['internal_api']} {x['version']} ({x.get('architecture')})" for x in loaded}
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "kernel": platform.release(),
        "python": platform.python_version(), "blas": sorted(blas), "versions": versions,
    }  # fmt: skip


def data_of(folder: Path, name: str, count: int) -> Data:
    """The first `count` adapters of a collection, made if they are not there."""
    place = folder / name
    if not (place / f"adapter-{count - 1:05}" / "adapter_config.json").exists():
        synthetic.write(synthetic.COLLECTIONS[name], place, count)
    return Data(name, place, count)


def warm(data: Data) -> None:
    """Read the adapters once, into the page cache, and let earlier writes reach the disk."""
    for folder in data.folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as f:
                while f.read(1 << 23):
                    pass
    os.sync()


class Bench:
    """Runs systems on the adapters of one collection after the other."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results
        self._captured: dict[tuple[Any, ...], float] = {}

    def run(self) -> None:
        """Run everything; removes what it has written."""
        found = map(importlib.util.find_spec, ("lorashare_stream", "lorashare", "vlora"))
        folders = [
            folder for package in found if package is not None for folder in package.submodule_search_locations or ()
        ]
        for folder in [*folders, *([self.args.before / "lorashare_stream"] if self.args.before else [])]:
            compileall.compile_dir(folder, quiet=2)  # as what is installed has been, whatever the environment says
        self.args.data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.args.data, prefix=".bench-") as self.scratch:
            self._run()

    def _run(self) -> None:
        for name in self.args.collections:
            full = self.args.adapters or synthetic.COLLECTIONS[name].adapters
            datas = {full: data_of(self.args.data, name, full)}
            systems = self._systems(name)
            for k in sorted(self.args.k):
                for repeat in range(self.args.repeat):
                    for system in systems if repeat % 2 == 0 else reversed(systems):
                        if system in OURS | BEFORE:
                            self._one(datas[full], k, system, repeat)
                            continue
                        reached = self._fitting(datas, full, k, system, repeat)
                        if reached is not None and reached != full:  # a ratio needs both at the same N
                            for our in (s for s in systems if s in OURS):
                                self._one(datas[reached], k, our, repeat)

    def _systems(self, name: str) -> list[str]:
        chosen = list(self.args.systems)
        if synthetic.COLLECTIONS[name].dtype == "F32" and "ours-factors" in chosen:
            chosen = [s for s in chosen if s != "ours-factors-f32"]
        if self.args.before is None:
            return chosen
        return [*(before for s in chosen if (before := s.replace("ours", "before")) in BEFORE), *chosen]

    def _fitting(self, datas: dict[int, Data], full: int, k: int, system: str, repeat: int) -> int | None:
        """Run a peer on N, N/2, N/4, ... adapters until it can; what a smaller N or k was too much for is not tried."""
        name = datas[full].name
        over = [
            line["adapters"]
            for line in self.results.lines
            if line["kind"] == "run" and line["status"] in ("time", "memory") and line["system"] == system
            and line["k"] <= k and line["collection"].split("-")[0] == name.split("-")[0]
        ]  # fmt: skip
        count = min(full, dict(self.args.at_most).get(system, full))
        while count >= 2:
            if not any(n <= count for n in over):
                if count not in datas:
                    datas[count] = Data(name, datas[full].folder, count)
                line = self._one(datas[count], k, system, repeat)
                if line["status"] not in ("time", "memory"):
                    return count if line["status"] == "ok" else None
            count //= 2
        return None

    def _one(self, data: Data, k: int, system: str, repeat: int) -> Line:
        facts = {"collection": data.name, "adapters": data.count, "k": k, "system": system, "repeat": repeat}
        known, first = self.results.find("run", **facts), self.results.find("run", **{**facts, "repeat": 0})
        if known is not None:
            return known
        if first is not None and (first["status"] != "ok" or first["wall_s"] > self.args.once_over):
            return first
        warm(data)
        # What was written stays till the end: for each file that it makes ext4 looks through all that was deleted in
        # the last minutes, and a run would pay for those before it.
        scratch = tempfile.mkdtemp(dir=self.scratch)
        line = self._measured(data, k, system, Path(scratch))
        print(_told({**facts, **line}), flush=True)
        return self.results.add("run", {**facts, **line})

    def _measured(self, data: Data, k: int, system: str, scratch: Path) -> Line:
        out, log = scratch / "out", scratch / "log"
        words = (OURS | BEFORE).get(system)
        ours = words is not None
        memory = self.args.memory or MEMORY.get(data.name, DEFAULT_MEMORY)
        if words is not None:
            command = ["-P", "-m", "lorashare_stream", "compress", str(_source(data, scratch)), "-o", str(out)]
            command += [] if "--max-error" in words else ["-k", str(k)]
            command += [*words, "--memory", memory, "--device", "cpu", "-q"]
        else:
            command = [str(HERE / "bench_peers.py"), system, str(data.folder), str(out)]
            command += ["-k", str(k), "--adapters", str(data.count)]
        order = {
            "command": [sys.executable, *command], "log": str(log), "files": FILES if ours else None,
            "seconds": 6 * LIMIT_SECONDS if ours else self.args.limit_seconds, "memory": LIMIT_BYTES,
        }  # fmt: skip
        line = _process(order, self.args.before if system in BEFORE else None)
        said = log.read_text(errors="replace").strip().splitlines()
        line |= {"memory": memory if ours else None, "source_bytes": data.bytes}
        line["dtype"] = synthetic.COLLECTIONS[data.name].dtype
        if line["status"] == "failed":
            if any("t allocate memory" in x or "MemoryError" in x for x in said[-3:]):
                line["status"] = "memory"
            line["reason"] = said[-1][:300] if said else f"exit code {line['exit_code']}"
        if line["status"] != "ok":
            return line
        if not ours:
            line |= json.loads(said[-1])
        line |= {"checkpoint_bytes": _size(out), "workspace_bytes": _size(scratch / "out.workspace")}
        line |= self._quality(data, k, system, out)
        if ours and self.args.keep:
            kept = self.args.keep / f"{data.name}-{data.count}-{k}-{system}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(out, kept)
        return line

    def _quality(self, data: Data, k: int, system: str, out: Path) -> Line:
        """Captured energy as a share of the best, float64; none for vlora and coded, which have no basis of vectors."""
        found = bench_oracle.errors(data, out)
        if system == "ours-coded":
            return {**found, "captured": None, "kept": None}  # A and B come back in another gauge: only dW is near
        components = out / "shared_components.safetensors"
        if not components.exists():
            return {**found, "captured": None}
        objective = "delta" if system.endswith("-delta") else "factors"
        digest = hashlib.sha256(components.read_bytes()).hexdigest()
        key = (data.name, data.count, objective, digest)
        if key not in self._captured:
            best = bench_oracle.optimum(data, objective, k, self.args.data / ".oracle")
            self._captured[key] = bench_oracle.captured(data, out, objective) / best
        return {**found, "captured": self._captured[key], "components_sha256": digest}


def _process(order: Line, checkout: Path | None = None) -> Line:
    """Measure a process, in which the package is that of a checkout if there is one."""
    command = [sys.executable, "-I", "-S", str(HERE / "bench_measure.py"), json.dumps(order)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(checkout)} if checkout else {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        out, _ = process.communicate()
    finally:
        process.terminate()  # and what it measures, if we are told to stop
        process.wait()
    if process.returncode != 0:
        raise SystemExit(f"bench_measure.py ends with {process.returncode}")
    line: Line = json.loads(out)
    return line


def _source(data: Data, scratch: Path) -> Path:
    """The folder, or a manifest if it holds more adapters than are meant."""
    if len(list(data.folder.glob("*/adapter_config.json"))) == data.count:
        return data.folder
    manifest = scratch / "adapters.txt"
    manifest.write_text("".join(f"{f.resolve()}\n" for f in data.folders))
    return manifest


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _told(line: Line) -> str:
    words = f"{line['collection']} N={line['adapters']} k={line['k']} {line['system']} #{line['repeat'] + 1}: "
    words += f"{line['wall_s']:.1f} s, {line['peak_bytes'] / 2**20:.0f} MiB, {line['status']}"
    if line["status"] == "ok":
        lacking = "none" if line["captured"] is None else f"1 - {1 - line['captured']:.1e}"
        words += f", captured {lacking}, dW error {line['dw_error']:.4f}"
    return words + (f" ({line['reason']})" if "reason" in line else "")


def floors(args: argparse.Namespace, results: Results) -> Iterator[Line]:
    import bench_floor

    for name in args.collections:
        data = data_of(args.data, name, args.adapters or synthetic.COLLECTIONS[name].adapters)
        warm(data)
        yield results.add("floor", {"collection": name, "adapters": data.count, **bench_floor.floor(data, args.k)})


def _capped(word: str) -> tuple[str, int]:
    name, _, count = word.partition("=")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(PEERS)}")
    return name, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=default_run(), help="its name (default: this boot of this machine)")
    parser.add_argument("--results", type=Path, default=BUILD / "bench.jsonl")
    parser.add_argument("--data", type=Path, default=BUILD, help="folder of collections")
    parser.add_argument("--collections", nargs="+", choices=synthetic.COLLECTIONS, default=COLLECTIONS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of another commit, which runs beside this one")
    parser.add_argument("-k", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--adapters", type=int, help="only the first N of every collection")
    parser.add_argument("--memory", help="of our runs, instead of what the issue gives each collection")
    parser.add_argument("--limit-seconds", type=float, default=LIMIT_SECONDS, help="of a peer, then it gets N/2")
    parser.add_argument("--once-over", type=float, default=float("inf"), metavar="S", help="repeat nothing longer")
    parser.add_argument(
        "--at-most", nargs="+", type=_capped, default=[], metavar="PEER=N", help="start there, more being too much"
    )
    parser.add_argument("--keep", type=Path, help="keep our checkpoints here, COLLECTION-N-K-SYSTEM")
    parser.add_argument("--floor", action="store_true", help="measure what the machine allows, and compress nothing")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write tables of the run, and measure nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # scratch folders are left by nobody
    if max(args.k) > bench_oracle.SPECTRUM:
        parser.error(f"-k: at most {bench_oracle.SPECTRUM}")
    results = Results.read(args.results, args.run)
    if args.render:
        if not results.lines:
            parser.error(f"{args.results} has nothing of the run {args.run}")
        bench_report.render(results.lines, args.render)
        return
    facts = machine()
    if args.before is not None:
        args.before = args.before.resolve()
        commit = subprocess.run(
            ["git", "-C", args.before, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        facts["before"] = commit.stdout.strip()
    if results.find("machine", **facts) is None:
        results.add("machine", facts)
    if args.floor:
        for line in floors(args, results):
            print(json.dumps(line), flush=True)
        return
    Bench(args, results.without_failures()).run()


if __name__ == "__main__":
    main()
