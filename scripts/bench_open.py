"""What it costs to open a checkpoint, to reconstruct an adapter of it, and to start the command line.

    python scripts/bench_open.py CHECKPOINT [--run RUN] [--results FILE] [--repeat 5]

Every number is a median of processes of their own. The memory of a process is its resident size above that after the
imports, torch among them; the peak likewise. Appends a JSON line for scripts/bench.py --render.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench import BUILD, Results, default_run

ADAPTERS = 20
CHILD = """
import json, sys, time
import safetensors.torch, torch
from lorashare_stream import SHAREModel
import lorashare_stream.checkpoint.reader, lorashare_stream.model

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

before = status("VmRSS")
begun = time.perf_counter()
share = SHAREModel.from_pretrained(sys.argv[1])
opened = time.perf_counter() - begun
after, peak = status("VmRSS"), status("VmHWM")
names = share.adapter_names
count = min(int(sys.argv[2]), len(names))
times = []
for i in range(count):
    begun = time.perf_counter()
    share.reconstruct(names[i * len(names) // count])
    times.append(1e3 * (time.perf_counter() - begun))
used = status("VmHWM")
print(json.dumps({
    "adapters": len(names), "open_s": opened, "open_bytes": after - before, "open_peak_bytes": peak - before,
    "used_peak_bytes": used - before,
    "first_ms": times[0], "reconstruct_ms": sorted(times)[len(times) // 2],
}))
"""


def opened(checkpoint: Path, repeat: int) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(ADAPTERS)]
    found = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeat)]
    return {key: median(f[key] for f in found) for key in found[0]}


def help_seconds(repeat: int) -> float:
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lorashare_stream", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begun)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--run", default=default_run())
    parser.add_argument("--results", type=Path, default=BUILD / "bench.jsonl")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    facts = {
        "checkpoint": args.checkpoint.name,
        **opened(args.checkpoint, args.repeat),
        "help_s": help_seconds(args.repeat),
    }
    print(json.dumps(Results.read(args.results, args.run).add("open", facts)))


if __name__ == "__main__":
    main()
