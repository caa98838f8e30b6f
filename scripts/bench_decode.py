"""How long one adapter of a coded checkpoint takes to come back, on one core: of MiniLM's size, and of a 7B model's.

    python scripts/bench_decode.py [--limit 0.25] [--repeat 5]

Adapters are made here, with singular values that fall like 1/i, compressed by the command line, and reconstructed from
a checkpoint that is opened anew each time. Prints a Markdown row of medians each: the open and the first adapter, and
the next.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from lorashare_stream import SHAREModel

SIZES = {  # rank, layers, module -> (d_in, d_out)
    "MiniLM, q and v, r = 8": (8, 6, {"query": (384, 384), "value": (384, 384)}),
    "7B, q and v, r = 16": (16, 32, {"q_proj": (4096, 4096), "v_proj": (4096, 4096)}),
}
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "synthetic/base"}


def write(folder: Path, rank: int, layers: int, modules: dict[str, tuple[int, int]]) -> int:
    """Two adapters; how many numbers one has."""
    falling = (1.0 / np.arange(1, rank + 1)).astype(np.float32)
    for i in range(2):
        place, rng, tensors = folder / f"adapter-{i}", np.random.default_rng(i), {}
        place.mkdir(parents=True)
        for layer in range(layers):
            for name, (d_in, d_out) in modules.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, d_in), np.float32) / np.float32(d_in**0.5)
                tensors[f"{key}.lora_B.weight"] = rng.standard_normal((d_out, rank), np.float32) * falling
        save_file(tensors, place / "adapter_model.safetensors")
        config = {**CONFIG, "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
        (place / "adapter_config.json").write_text(json.dumps(config))
    return sum(t.size for t in tensors.values())


def decoded(checkpoint: Path, repeat: int) -> tuple[float, float]:
    """Seconds to open and reconstruct one adapter, and to reconstruct the next, medians."""
    times = []
    for _ in range(repeat + 1):  # the first is not counted: imports, tables
        begun = time.perf_counter()
        share = SHAREModel.from_pretrained(checkpoint)
        share.reconstruct("adapter-0")
        opened = time.perf_counter()
        share.reconstruct("adapter-1")
        times.append((opened - begun, time.perf_counter() - opened))
    first, following = zip(*times[1:], strict=True)
    return median(first), median(following)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--limit", type=float, default=0.25, help="--max-error")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| adapter | numbers, millions | code, KiB | open and the first, ms | the next, ms |\n" + "|---" * 5 + "|")
    for name, (rank, layers, modules) in SIZES.items():
        with tempfile.TemporaryDirectory() as scratch:
            numbers, out = write(Path(scratch) / "in", rank, layers, modules), Path(scratch) / "out"
            command = [sys.executable, "-m", "lorashare_stream", "compress", str(Path(scratch) / "in"), "-o", str(out)]
            options = ["--max-error", str(args.limit), "--workers", "1"]
            subprocess.run([*command, *options], check=True, capture_output=True)
            with threadpool_limits(1):
                first, following = decoded(out, args.repeat)
            code = SHAREModel.from_pretrained(out).config.ours["bytes"]["codes"] / 2 / 1024
        print(f"| {name} | {numbers / 1e6:.2f} | {code:.1f} | {1e3 * first:.0f} | {1e3 * following:.0f} |", flush=True)


if __name__ == "__main__":
    main()
