"""The plan of a collection that is not there yet: bytes to fetch, moments, checkpoint, memory, and about how long.

    python scripts/arithmetic.py [--hidden 4096] [--kv 1024] [--layers 32] [--targets q k v] [--rank 16]
        [--adapters 1000] [-k 32] [--disk-budget 10GiB] [--bandwidth 100MB]

Bytes are those of the planner, for imagined adapters of a model with grouped-query attention (the defaults are those
of Mistral-7B), in bfloat16, on the Hub. Times are estimates: floating point operations over the rate of syrk measured
here, a solve measured here, bytes over a bandwidth that is assumed.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from lorashare_stream.adapters.adapter import Adapter, Origin
from lorashare_stream.adapters.folder import FileFact
from lorashare_stream.adapters.hubid import HubId
from lorashare_stream.adapters.layout import read_layout
from lorashare_stream.adapters.safetensors import TensorRecord
from lorashare_stream.adapters.scaling import Scaling
from lorashare_stream.adapters.source import Listing
from lorashare_stream.linalg.basis import fit
from lorashare_stream.linalg.moments import add_block, of_columns
from lorashare_stream.plan.plan import Plan
from lorashare_stream.report.text import plan_text, rows_text
from lorashare_stream.settings import Settings
from lorashare_stream.text import bytes_shown, parse_bytes


def imagined(args: argparse.Namespace) -> Plan:
    """The plan for adapters that differ in nothing but their names."""
    dims = {"q": (args.hidden, args.hidden), "k": (args.hidden, args.kv), "v": (args.hidden, args.kv)}
    dims |= {"o": (args.hidden, args.hidden)}
    records, end = [], 4096
    for layer in range(args.layers):
        for target in args.targets:
            d_in, d_out = dims[target]
            for side, shape in (("A", (args.rank, d_in)), ("B", (d_out, args.rank))):
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}_proj.lora_{side}.weight"
                records.append(TensorRecord(key, "BF16", shape, end, 2 * shape[0] * shape[1]))
                end += records[-1].nbytes
    layout = read_layout(records)
    scalings = (Scaling(2.0),) * len(layout.modules)
    files = (FileFact(Path("adapter_model.safetensors"), end, 0),)
    ids = [HubId(f"org/adapter-{i}", f"{i:040x}") for i in range(args.adapters)]
    adapters = tuple(
        Adapter(
            i.name, str(i), Path(str(i)), files, layout, scalings, "base", "",
            "{}", Origin(i, str(i), Listing(), ""), fetched=False,
        )
        for i in ids
    )  # fmt: skip
    settings = {"num_components": args.k, "device": "cpu", "memory": args.memory, "disk_budget": args.disk_budget}
    return Plan(Settings.from_mapping(settings), adapters, base_model="base", bound_base="base")


def syrk_rate() -> float:
    """Floating point operations a second of one thread, d = 2048."""
    second, rows = np.zeros((2048, 2048), np.float32, order="F"), np.ones((1024, 2048), np.float32)
    add_block(second, rows)
    begun = time.perf_counter()
    for _ in range(8):
        add_block(second, rows)
    return 8 * 2048 * 2049 * 1024 / (time.perf_counter() - begun)


def solve_seconds(d: int, k: int) -> float:
    """Seconds of one fit at d, of vectors with a decaying spectrum."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((d + 64, d)) / (1.0 + np.arange(d)) ** 0.5).astype(np.float32)
    moment = of_columns(rows)
    summed = type(moment)(rows.T @ rows, None, moment.sum, moment.count, moment.energy)
    begun = time.perf_counter()
    fit(summed, k, 0.95, center=False, dtype="BF16")
    return time.perf_counter() - begun


def estimate(plan: Plan, bandwidth: int) -> str:
    cores = os.cpu_count() or 1
    with threadpool_limits(1):
        rate = syrk_rate()
        solves = {d: solve_seconds(d, plan.groups[0].components) for d in {g.dim for g in plan.groups}}
    flops = sum(g.count * g.dim * g.dim for g in plan.groups)
    fetched = sum(e.hub_bytes * plan.fetches(e) for e in plan.adapters)
    moments = sum(4 * g.dim * min(g.dim, g.count) for g in plan.groups)
    steps = {step.name: step.concurrency for step in plan.steps}
    return rows_text(
        [
            ("this machine", f"{cores} cores; syrk {rate / 1e9:.0f} GFLOP/s a core"),
            ("requests", f"{len(plan.adapters)} to plan; {sum(4 * plan.fetches(e) for e in plan.adapters)} to fetch"),
            ("fetched", f"{bytes_shown(fetched)}, {fetched / bandwidth / 60:.0f} min at {bandwidth / 1e6:.0f} MB/s"),
            ("moments", f"{bytes_shown(moments * len(plan.batches))} written, once a batch"),
            ("sums", f"{flops / 1e12:.1f} TFLOP, {flops / rate / steps['accumulate'] / 60:.0f} min"),
            ("solves", f"{sum(solves[g.dim] for g in plan.groups) / steps['fit'] / 60:.1f} min, "
             + ", ".join(f"{s:.1f} s at d = {d}" for d, s in sorted(solves.items()))),
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 4096, "kv": 1024, "layers": 32, "rank": 16, "adapters": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default {value})")
    parser.add_argument("--targets", nargs="+", default=["q", "k", "v"], choices=["q", "k", "v", "o"])
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--disk-budget", default=None)
    parser.add_argument("--bandwidth", type=parse_bytes, default=10**8, metavar="SIZE", help="a second")
    args = parser.parse_args()
    plan = imagined(args)
    plan.validate()
    print(plan_text(plan), estimate(plan, args.bandwidth), sep="\n\n")


if __name__ == "__main__":
    main()
