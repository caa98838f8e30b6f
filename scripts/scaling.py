"""How cost grows, by the arithmetic of the plan: prints the tables of docs/scaling.md.

    python scripts/scaling.py [--syrk 150] [--gemm 150] [--read 4] [--adapter-ms 5]

The rates are of one core: GFlop/s of float32 syrk and of products with a thin matrix, GB/s of reading, and milliseconds
of Python and system calls for an adapter of 64 modules in all three passes. `bench.py --floor` measures the others.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from lorashare_stream.linalg.basis import break_even
from lorashare_stream.linalg.eigen import suits_krylov
from lorashare_stream.plan.memory import (
    BYTES_PER_ADAPTER,
    PORTION_BYTES,
    PROCESS_BYTES,
    TILE_BYTES,
    Group,
)
from lorashare_stream.settings import QUANTUM
from lorashare_stream.text import bytes_shown


@dataclass(frozen=True)
class Model:
    """Layers, and (d_in, d_out) of the modules of each that are adapted."""

    name: str
    layers: int
    shapes: tuple[tuple[int, int], ...]


def llama(name: str, layers: int, d: int, kv: int, inner: int, *, everywhere: bool) -> Model:
    attention = ((d, d), (d, kv))
    return Model(
        name, layers, (*attention, (d, kv), (d, d), (d, inner), (d, inner), (inner, d)) if everywhere else attention
    )


MODELS = (
    llama("7B, q and v", 32, 4096, 1024, 14336, everywhere=False),
    llama("7B, all linear", 32, 4096, 1024, 14336, everywhere=True),
    llama("70B, q and v", 80, 8192, 1024, 28672, everywhere=False),
    llama("70B, all linear", 80, 8192, 1024, 28672, everywhere=True),
)


def groups_of(model: Model, adapters: int, rank: int) -> list[Group]:
    return [
        Group(f"layers.{layer}.{i}", side, d, adapters * rank, adapters)
        for layer in range(model.layers)
        for i, dims in enumerate(model.shapes)
        for side, d in zip(("A", "B"), dims, strict=True)
    ]


def fit_flops(g: Group, k: int) -> float:
    """Of the solver that the table in `linalg.eigen` names; Krylov multiplies some 6 k vectors."""
    size = min(g.dim, g.count) if g.stacked else g.dim
    if suits_krylov(size, k):
        return 6 * k * (4 * g.dim * g.count if g.stacked else 2 * g.dim**2)
    return (g.dim * g.count * size if g.stacked else 0) + 4 / 3 * size**3


def row(model: Model, adapters: int, rank: int, k: int, args: argparse.Namespace) -> list[str]:
    groups = groups_of(model, adapters, rank)
    lora = sum(2 * g.dim * g.count for g in groups)  # bfloat16
    syrk = sum(g.dim**2 * g.count for g in groups if not g.stacked)
    fits = sum(fit_flops(g, k) for g in groups)
    projection = sum(4 * g.dim * k * g.count for g in groups)
    seconds = 3 * lora / args.read / 1e9 + syrk / args.syrk / 1e9 + (fits + projection) / args.gemm / 1e9
    seconds += adapters * args.adapter_ms / 1e3 * len(groups) / 128
    basis = sum(2 * g.dim * min(k, g.dim) for g in groups)
    loadings = sum(2 * k * g.count for g in groups)
    widest = max(groups, key=lambda g: g.moment_bytes)
    sums = 0 if widest.stacked else 4 * widest.dim**2
    task = max(PORTION_BYTES, 2 * (sums + 4 * QUANTUM * widest.dim)) + TILE_BYTES
    memory = PROCESS_BYTES + BYTES_PER_ADAPTER * adapters + max(task, widest.moment_bytes)
    return [
        model.name, f"{adapters:,}", bytes_shown(lora), bytes_shown(sum(g.moment_bytes for g in groups)),
        bytes_shown(basis), bytes_shown(loadings), f"{lora / (basis + loadings):.0f}", f"{syrk / 1e15:.3g}",
        f"{(fits + projection) / 1e15:.3g}", f"{seconds / 3600:.2g}", bytes_shown(memory),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("syrk", 150.0), ("gemm", 100.0), ("read", 4.0), ("adapter-ms", 5.0)):
        parser.add_argument(f"--{flag}", type=float, default=default)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("-k", type=int, default=32)
    args = parser.parse_args()
    heads = [
        "model, modules", "adapters", "LoRA, bf16", "moments", "basis", "loadings", "ratio", "SYRK, PFlop",
        "solve and project, PFlop", "core hours", "memory, one task",
    ]  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for model in MODELS:
        for adapters in (1_000, 10_000, 1_000_000):
            print("| " + " | ".join(row(model, adapters, args.rank, args.k, args)) + " |")
    print("\nBreak-even k = d n / (d + n), above which a shared group is larger than the originals:")
    for d in (1024, 4096, 8192, 28672):
        print(f"- d = {d}: " + ", ".join(f"{n:,} vectors {break_even(d, n):.0f}" for n in (200, 1600, 16_000, 160_000)))


if __name__ == "__main__":
    main()
