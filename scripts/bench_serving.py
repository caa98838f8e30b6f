"""Mixed batches from a checkpoint beside PEFT's mixed batches and beside one adapter after another.

    python scripts/bench_serving.py [--adapters 10 100 1000] [--rows 1 8 32] [--repeat 5] [-k 32] [--max-error 0.25]
                                    [--peft-most 100] [--threads N] [--device cpu] [--dtype float32]

A Llama of random weights (hidden size 256, 4 layers) and adapters of rank 16 on q and v whose vectors lie near 24
planted directions. All systems are alive in one process and are measured in turns; a rate is the median of the rounds,
a ratio the median of the ratios of each round. PEFT has all adapters loaded, up to `--peft-most` of them. Prints
Markdown. On cores that others use too, `--threads 1`: threads that wait for each other measure nothing.

    forward    tokens a second over rows of 64 tokens, in one forward pass
    decode     new tokens a second of `generate`, 16 after a prompt of 8
    held       bytes that the system says it holds beside the base; RSS is what the process grew by
    cold       ms from a request for an adapter that was never used to the answer to its 64 tokens
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import synthetic
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from lorashare_stream import SHAREModel

HIDDEN, LAYERS, RANK = 256, 4, 16
PROMPT, LENGTH, NEW = 8, 64, 16
MODULES = (("q_proj", HIDDEN, HIDDEN), ("v_proj", HIDDEN, HIDDEN))
COLLECTION = synthetic.Collection(MODULES, LAYERS, RANK, 0, "F32")


@dataclass
class System:
    """What answers a batch: `answer(inputs, names)` and `write(inputs, names)` give logits and tokens.

    `held` is in bytes, `cold` in seconds, of a name.
    """

    name: str
    answer: Callable[[torch.Tensor, Sequence[str]], Any]
    write: Callable[[torch.Tensor, Sequence[str]], Any]
    held: Callable[[], int]
    cold: Callable[[str], float]
    began: float = 0.0
    grew: int = 0
    error: float = 0.0


def base_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": 1000}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=4)).eval()
    return model.to(args.device, getattr(torch, args.dtype))


def resident() -> int:
    """Bytes of the process, or of the GPU's tensors."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def done() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def tokens(rows: int, length: int, args: argparse.Namespace) -> torch.Tensor:
    found = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(rows))
    return found.to(args.device)


def attached(name: str, checkpoint: Path, args: argparse.Namespace) -> System:
    base, begun = base_model(args), done()
    share = SHAREModel.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the mean error is in the table
        model = share.attach(base)
    began, inputs = done() - begun, tokens(1, LENGTH, args)

    def cold(adapter: str) -> float:
        started = done()
        model(inputs, adapter_names=[adapter])
        return done() - started

    return System(
        name,
        lambda ids, names: model(ids, adapter_names=names),
        lambda ids, names: model.generate(ids, adapter_names=names, **generation(ids)),
        model.resident_bytes, cold, began, error=share.config.ours["errors"]["mean"],
    )  # fmt: skip


def generation(ids: torch.Tensor) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip


def lora_bytes(model: Any) -> int:
    return sum(p.nbytes for n, p in model.named_parameters() if ".lora_" in n)


def of_peft(folders: Sequence[Path], spare: Sequence[Path], args: argparse.Namespace) -> System:
    begun = done()
    model = PeftModel.from_pretrained(base_model(args), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name)
    model.eval()
    began, inputs, place = done() - begun, tokens(1, LENGTH, args), {f.name: f for f in spare}

    def cold(adapter: str) -> float:
        started = done()
        model.load_adapter(place[adapter], f"cold-{adapter}")
        model(inputs, adapter_names=[f"cold-{adapter}"])
        found = done() - started
        model.delete_adapter(f"cold-{adapter}")
        return found

    return System(
        "PEFT, mixed batch",
        lambda ids, names: model(ids, adapter_names=names),
        lambda ids, names: model.generate(input_ids=ids, adapter_names=names, **generation(ids)),
        lambda: lora_bytes(model), cold, began,
    )  # fmt: skip


def swapping(checkpoint: Path, args: argparse.Namespace, scratch: Path) -> System:
    """One adapter in the model at a time, row after row: by `swap` if there is one, else from a folder by PEFT."""
    share, begun = SHAREModel.from_pretrained(checkpoint), done()
    model = share.apply(base_model(args), share.adapter_names[0]).eval()
    began, inputs = done() - begun, tokens(1, LENGTH, args)

    def swap(name: str) -> None:
        if hasattr(share, "swap"):
            share.swap(model, name)
        else:
            folder = scratch / name
            if not folder.exists():
                share.reconstruct(name, output_dir=folder)
            hotswap_adapter(model, str(folder), adapter_name="default", torch_device=args.device)

    def each(run: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor, Sequence[str]], None]:
        def rows(ids: torch.Tensor, names: Sequence[str]) -> None:
            for i, name in enumerate(names):
                swap(name)
                run(ids[i : i + 1])

        return rows

    def cold(adapter: str) -> float:
        started = done()
        swap(adapter)
        model(inputs)
        return done() - started

    run = each(lambda ids: model.generate(input_ids=ids, **generation(ids)))
    return System("swapped row by row", each(model), run, lambda: lora_bytes(model), cold, began)


def grown(make: Callable[[], System]) -> System:
    before = resident()
    found = make()
    found.grew = resident() - before
    return found


def rates(system: System, names: Sequence[str], args: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second, of a forward pass and of decoding."""
    found = []
    for run, length, count in ((system.answer, LENGTH, LENGTH), (system.write, PROMPT, NEW)):
        ids, begun = tokens(len(names), length, args), done()
        run(ids, names)
        found.append(len(names) * count / (done() - begun))
    return found[0], found[1]


def compress(folder: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "lorashare_stream", "compress", str(folder), "-o", str(out), "-q", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@torch.inference_mode()
def measured(n: int, scratch: Path, args: argparse.Namespace) -> list[list[str]]:
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for a deprecated name
    synthetic.PLANTED, synthetic.TAIL = 24, 0.02
    synthetic.write(replace(COLLECTION, adapters=n), scratch / "in", n)
    folders = sorted((scratch / "in").iterdir())
    share = compress(scratch / "in", scratch / "share", "-k", str(args.k))
    coded = compress(scratch / "in", scratch / "coded", "--max-error", str(args.max_error))
    loaded = folders[: args.peft_most]
    systems = [
        grown(lambda: attached(f"SHARE, k = {args.k}", share, args)),
        grown(lambda: attached("coded", coded, args)),
        grown(lambda: of_peft(loaded, folders, args)),
        grown(lambda: swapping(share, args, scratch)),
    ]
    cold = [1e3 * median(s.cold(f.name) for f in folders[1:10]) for s in systems]
    speeds: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(args.repeat + 1):  # the first is not counted
        for rows in args.rows:
            names = [loaded[i % len(loaded)].name for i in range(rows)]
            for i, system in enumerate(systems):
                speeds.setdefault((rows, i), []).append(rates(system, names, args))
    table = []
    for i, s in enumerate(systems):
        several = f"{len(loaded)} of {n}" if s.name.startswith("PEFT") and len(loaded) < n else str(n)
        error = f"{s.error or systems[0].error * (i == 3):.3f}"
        cells = [several, s.name, error, f"{s.held() / 2**20:.1f}", f"{s.grew / 2**20:.0f}", f"{s.began:.2f}",
                 f"{cold[i]:.1f}"]  # fmt: skip
        for rows in args.rows:
            for kind in (0, 1):
                own, peft = ([pair[kind] for pair in speeds[rows, j][1:]] for j in (i, 2))
                ratio = median(a / b for a, b in zip(own, peft, strict=True))
                cells.append(f"{median(own):.0f} ({ratio:.2f})")
        table.append(cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--max-error", type=float, default=0.25)
    parser.add_argument("--peft-most", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    each = [f"{kind}, {rows} rows" for rows in args.rows for kind in ("forward", "decode")]
    print("Tokens a second; in brackets, by PEFT's mixed batch in the same round.\n")
    head = ["adapters", "system", "mean dW error", "held, MiB", "RSS, MiB", "to open, s", "cold, ms", *each]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    for n in args.adapters:
        alone = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # with a memory of its own
        with tempfile.TemporaryDirectory() as scratch, alone:
            for row in alone.submit(measured, n, Path(scratch), args).result():
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
