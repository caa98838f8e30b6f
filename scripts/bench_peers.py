"""Compresses a collection with another library, in a process of its own: for scripts/bench.py.

    python scripts/bench_peers.py SYSTEM FOLDER OUT -k K --adapters N

Prints the seconds without imports as JSON. lorashare is given names and paths, with which it reads each adapter once
less than from paths alone. vlora's SVD knows no bfloat16, so its adapters are turned into float32 as they are read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 20  # adapters, the upper end of what lorashare recommends for 100 and more
LORASHARE: dict[str, dict[str, Any]] = {
    "lorashare": {},
    "lorashare-layers": {"layer_by_layer": True},
    "lorashare-chunked": {"chunk_size": CHUNK},
}
PEERS = (*LORASHARE, "vlora", "vlora-streaming")


def lorashare(system: str) -> Callable[[list[Path], Path, int], None]:
    from lorashare import SHAREModel

    def run(folders: list[Path], out: Path, k: int) -> None:
        adapters = {f.name: str(f) for f in folders}
        share = SHAREModel.from_adapters(adapters, num_components=k, device="cpu", **LORASHARE[system])
        share.save_pretrained(out)

    return run


def vlora(system: str) -> Callable[[list[Path], Path, int], None]:
    import torch
    import vlora.io
    from vlora import SharedSubspace

    read = vlora.io.load_adapter

    def single(path: Path) -> Any:
        adapter = read(path)
        for side in (adapter.lora_a, adapter.lora_b):
            side.update({name: t.to(torch.float32) for name, t in side.items()})
        return adapter

    vlora.io.load_adapter = single

    def run(folders: list[Path], out: Path, k: int) -> None:
        names = [f.name for f in folders]
        if system == "vlora":
            share = SharedSubspace.from_adapters([single(f) for f in folders], names, num_components=k)
        else:
            share = SharedSubspace.from_adapters_streaming(folders, names, num_components=k)
        share.save(out)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-k", type=int, required=True)
    parser.add_argument("--adapters", type=int, required=True)
    args = parser.parse_args()
    run = (lorashare if args.system in LORASHARE else vlora)(args.system)
    begun = time.perf_counter()
    run(sorted(p.parent for p in args.folder.glob("*/adapter_config.json"))[: args.adapters], args.out, args.k)
    print(json.dumps({"work_s": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
