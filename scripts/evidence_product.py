"""The command line on a thousand real adapters, whole and killed, and on ten thousand by noise.

    python scripts/evidence_product.py [RUN] [--adapters 1000] [--copies 10] [--kills 6] [--scratch FOLDER]

Rows go to the file of JSON lines that scripts/evidence.py renders; what is there already is not measured again. What is
written besides, 4 GB for ten thousand adapters, is removed at the end.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import evidence
import evidence_measure as em
import numpy as np
from bench import Results
from evidence import Line, child, measured
from safetensors.numpy import load_file, save_file

FORMS = ("--max-error 0.25", "-k 32")  # options of compress
NOISE = 0.01  # of the rms of each tensor


def compress(sources: Path, options: str, scratch: Path) -> list[str]:
    return ["-m", "lorashare_stream", "compress", str(sources), "-o", str(scratch / "out"), "-q", *options.split()]


def whole(sources: Path, options: str, scratch: Path) -> Line:
    """A run from what is there to the end, and a verification."""
    facts, out = child(scratch, *compress(sources, options, scratch)), scratch / "out"
    verified = child(scratch, "-m", "lorashare_stream", "verify", str(out), "-q")
    size = sum(em.bytes_of(out).as_dict().values())
    return {**facts, "verify": verified["seconds"], "bytes": size, "digest": digest(out)}


def killed(sources: Path, options: str, seconds: float, same: str, scratch: Path) -> Line:
    """A run that is killed after so many seconds, then the same to the end; `same` is the digest of a whole run."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *compress(sources, options, scratch)], stdout=quiet, stderr=quiet)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    told = {"killed": process.wait() == -signal.SIGKILL, "after": seconds, **whole(sources, options, scratch)}
    return {**told, "same": told["digest"] == same}


def digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def noisy(folders: Sequence[Path], copies: int, root: Path) -> None:
    """Copies of adapters, each with noise of its own."""
    for number, copy in np.ndindex(len(folders), copies):
        source, rng = folders[number], np.random.default_rng((number, copy))
        tensors, out = load_file(source / "adapter_model.safetensors"), root / f"{source.name}-{copy}"
        for x in tensors.values():
            x += NOISE * np.sqrt(np.mean(x**2)) * rng.standard_normal(x.shape, np.float32)
        out.mkdir(parents=True)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(source / em.CONFIG, out)


def main() -> None:
    parser = evidence.options(__doc__)
    parser.add_argument("--adapters", type=int, default=1000, help="the first so many of those that are there")
    parser.add_argument("--copies", type=int, default=10, help="of each, by noise; 0 for none")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--scratch", type=Path, default=evidence.BUILD, help="where there is room")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # scratch folders are removed
    args.scratch.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(args.scratch)
    results = Results.read(args.results, args.run)
    evidence.add_machine(results)
    folders = [args.trained.resolve() / "adapters" / i for i in evidence.trained(args.trained)[: args.adapters]]
    with tempfile.TemporaryDirectory() as scratch:
        sources, copies = Path(scratch) / "adapters.txt", Path(scratch) / "copies"
        sources.write_text("".join(f"{folder}\n" for folder in folders))
        for options in FORMS:
            facts = {"n": len(folders), "options": options}
            told = measured(results, "product", {**facts, "copies": 1}, partial(whole, sources, options))
            for moment in range(1, args.kills + 1):
                seconds = moment / (args.kills + 1) * told["seconds"]
                work = partial(killed, sources, options, seconds, told["digest"])
                measured(results, "kill", {**facts, "moment": moment}, work)
        for options in FORMS if args.copies else ():
            facts = {"n": len(folders), "options": options, "copies": args.copies}
            if results.find("product", **facts) is None and not copies.exists():
                noisy(folders, args.copies, copies)
            measured(results, "product", facts, partial(whole, copies, options))


if __name__ == "__main__":
    main()
