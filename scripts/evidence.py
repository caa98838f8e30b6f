"""Bytes, errors and predictions of a thousand real adapters, by this package and by others: writes docs/evidence.md.

    python scripts/train_adapters.py build/evidence/trained
    python scripts/train_adapters.py build/evidence/trained --heads 64
    python scripts/evidence.py [RUN] [--counts 10 32 100 316 1000] [--tasks 32 1000]
    python scripts/evidence.py [RUN] --render docs/evidence.md

Every row goes to a file of JSON lines, and what is there already is not measured again, so that a run may be killed;
a RUN that is not given is named after the boot of the machine. Needs the extras `dev` and `bench`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import evidence_joint
import evidence_measure as em
import evidence_report
import numpy as np
import train_adapters
from bench import HERE, Results, _process, default_run, machine

BUILD = HERE.parent / "build" / "evidence"
COUNTS, TASKS = (10, 32, 100, 316, 1000), (32, 1000)
LIMITS = (0.05, 0.1, 0.25, 0.4, 0.55, 0.7)  # of `coded`: --max-error
KS = (8, 16, 32, 64, 128, 256)  # of `-k`
BOTH = (32, 128)  # of what is measured with two k
RATIOS = (4, 8, 16, 32, 64)  # of truncated SVDs: so many times fewer bytes than A and B
PREDICTED, TEXTS = 64, 2  # the first so many adapters, on every second of their held-out texts
UNPREDICTED = ("SHARE factors", "SHARE bfloat16", "SVD")
AGREES = 1e-3  # our certificate with what is measured here
LIMIT_SECONDS, LIMIT_BYTES = 600.0, 12 << 30  # of a child
Line = dict[str, Any]


@dataclass
class Collection:
    """Some of the adapters that train_adapters.py has made, all of one shape."""

    root: Path
    adapters: dict[str, em.Adapter]
    bytes: em.Bytes
    arms: dict[str, str]

    @classmethod
    def read(cls, root: Path, names: Sequence[str]) -> Collection:
        total = em.Bytes()
        for name in names:
            total += em.bytes_of(root / "adapters" / name)
        arms = {name: train_adapters.arm_of(int(name.rpartition("-")[2])) for name in names}
        return cls(root, {name: em.read_adapter(root / "adapters" / name) for name in names}, total, arms)

    def manifest(self, path: Path, names: Sequence[str] | None = None) -> Path:
        chosen = self.adapters if names is None else names
        path.write_text("".join(f"{(self.root / 'adapters' / name).resolve()}\n" for name in chosen))
        return path


@dataclass
class Found:
    """What a system gives back, and its bytes; of what is no files, LoRA's alone."""

    adapters: dict[str, em.Adapter]
    bytes: em.Bytes
    facts: Line = field(default_factory=dict)


class Left(Exception):
    """A system cannot do this, for this reason."""


def _child(scratch: Path, *command: str) -> Line:
    """Run Python on these arguments: its seconds and its peak of memory."""
    order = {"command": [sys.executable, *command], "log": str(scratch / "log"), "files": None,
             "seconds": LIMIT_SECONDS, "memory": LIMIT_BYTES}  # fmt: skip
    line = _process(order)
    if line["status"] != "ok":
        said = (scratch / "log").read_text(errors="replace").strip().splitlines()
        raise Left(f"{line['status']}: {said[-1][:200] if said else ''}")
    return {"seconds": line["wall_s"], "peak": line["peak_bytes"]}


def ours(c: Collection, options: Sequence[str], scratch: Path) -> Found:
    """By the command line."""
    out, sources = scratch / "out", c.manifest(scratch / "adapters.txt")
    said = ["-o", str(out), "--workers", "1", "-q", *options]
    return _opened(out, c, _child(scratch, "-m", "lorashare_stream", "compress", str(sources), *said))


def _opened(out: Path, c: Collection, facts: Line) -> Found:
    from lorashare_stream import SHAREModel

    share = SHAREModel.from_pretrained(out)
    found = {name: em.module_pairs(share.reconstruct(name), share.adapter_configs[name]) for name in c.adapters}
    errors = {name: em.dw_error(c.adapters[name], found[name]) for name in c.adapters}
    apart = max(abs(errors[name] - share.certified(name)["relative_error"]) for name in c.adapters)
    if apart > AGREES:
        raise SystemExit(f"{out}: a certificate is {apart:.1e} off")
    return Found(found, em.bytes_of(out), {**facts, "apart": apart})


def added(c: Collection, k: int, scratch: Path) -> Line:
    """What the last tenth costs on bases of the others, and how far off it is."""
    names = list(c.adapters)
    fitted, out = names[: -len(names) // 10], scratch / "out"
    sources = c.manifest(scratch / "adapters.txt", fitted)
    said = ["--workers", "1", "-q"]
    _child(scratch, "-m", "lorashare_stream", "compress", str(sources), "-o", str(out), "-k", str(k), *said)
    before = em.bytes_of(out)
    late = c.manifest(scratch / "late.txt", names[len(fitted) :])
    facts = _child(scratch, "-m", "lorashare_stream", "add", str(out), str(late), "--variance", "1e-6", *said)
    found = _opened(out, c, facts)
    errors = {name: em.dw_error(c.adapters[name], x) for name, x in found.adapters.items()}
    sizes = {"before": sum(before.as_dict().values()), "after": sum(found.bytes.as_dict().values())}
    parts = {"fitted": fitted, "added": names[len(fitted) :]}
    means = {part: em.statistics({i: errors[i] for i in own}) for part, own in parts.items()}
    return {**facts, **sizes, **means, "counts": [len(own) for own in parts.values()]}


def peer(c: Collection, system: str, k: int, scratch: Path) -> Found:
    """By lorashare or vlora, of the first N of the folder; vlora keeps no heads: they are counted as they were."""
    out, folder = scratch / "out", c.root / "adapters"
    order = (str(HERE / "bench_peers.py"), system, str(folder), str(out), "-k", str(k), "--adapters")
    facts = _child(scratch, *order, str(len(c.adapters)))
    if system == "lorashare":
        from lorashare import SHAREModel

        share = SHAREModel.from_pretrained(out)
        configs = {i: json.loads((folder / i / em.CONFIG).read_text()) for i in c.adapters}
        return Found(
            {i: em.module_pairs(share.reconstruct(i), configs[i]) for i in c.adapters}, em.bytes_of(out), facts
        )
    from vlora import SharedSubspace

    share, found = SharedSubspace.load(out), {}
    for name, adapter in c.adapters.items():
        back = share.reconstruct(name)
        sides = {
            layer.removeprefix("base_model.model."): (back.lora_a[layer], back.lora_b[layer]) for layer in back.lora_a
        }
        found[name] = {m: em.Module(*(x.numpy() for x in sides[m]), own.scale) for m, own in adapter.items()}
    size = em.bytes_of(out)
    size.extras += c.bytes.extras
    return Found(found, size, facts)


def computed(c: Collection, work: Callable[[], tuple[dict[str, em.Adapter], int]]) -> Found:
    """Adapters that stay PEFT's, with other tensors: headers, configurations and heads are as they were."""
    begun = time.perf_counter()
    adapters, size = work()
    beside = em.Bytes(lora=size, extras=c.bytes.extras, other=c.bytes.other)
    return Found(adapters, beside, {"seconds": time.perf_counter() - begun})


def each(c: Collection, work: Callable[[em.Adapter], tuple[em.Adapter, int]]) -> Found:
    """Each adapter alone."""

    def run() -> tuple[dict[str, em.Adapter], int]:
        found = {name: work(adapter) for name, adapter in c.adapters.items()}
        return {name: adapter for name, (adapter, _) in found.items()}, sum(size for _, size in found.values())

    return computed(c, run)


def _truncated(adapter: em.Adapter, ratio: int, whole: bool) -> tuple[em.Adapter, int]:
    budget = sum(4 * (m.a.size + m.b.size) for m in adapter.values()) // ratio
    options = {"width": 4} if whole else {"width": 1, "scales": 8}
    found, size = em.truncated({"": adapter}, budget, **options)
    return (found[""], size) if whole else em.rounded_one(found[""], partial(em.integers, bits=8))


def systems(c: Collection) -> Iterator[tuple[str, float, Callable[[Path], Found]]]:
    """Every system with each of its settings: a limit, k, how many times fewer bytes, bits; what matters first."""
    arm = len(set(c.arms.values())) == 1
    for limit in LIMITS:
        yield "coded", limit, lambda s, x=limit: ours(c, ("--max-error", str(x)), s)
    for k in KS:
        yield "SHARE", k, lambda s, k=k: ours(c, ("-k", str(k)), s)
    if arm:
        return
    for k in BOTH:
        yield "lorashare", k, lambda s, k=k: peer(c, "lorashare", k, s)
    for k, clusters in ((16, 1), (32, 1), (64, 1), *(((16, 8), (32, 8)) if len(c.adapters) >= 100 else ())):
        name = "JD" if clusters == 1 else f"JD, {clusters} clusters"
        yield name, k, lambda _, k=k, n=clusters: computed(c, lambda: evidence_joint.joint(c.adapters, k, n))
    for ratio in RATIOS[1:]:
        yield "SVD, int8", ratio, lambda _, x=ratio: each(c, lambda a: _truncated(a, x, whole=False))
    for bits in (8, 4, 3):
        yield "int", bits, lambda _, x=bits: each(c, lambda a: em.rounded_one(a, partial(em.integers, bits=x)))
    for bits, energy in ((2, 0.8), (3, 0.9)):
        yield "LoRAQuant", bits + energy, lambda _, x=bits, e=energy: each(c, lambda a: em.mixed(a, x, e))
    for density in (0.2, 0.5):
        yield (
            "ternary",
            density,
            lambda _, x=density: each(c, lambda a: em.rounded_one(a, partial(em.ternary, density=x))),
        )
    for k in BOTH:
        yield "SHARE factors", k, lambda s, k=k: ours(c, ("-k", str(k), "--objective", "factors"), s)
        yield "SHARE bfloat16", k, lambda s, k=k: ours(c, ("-k", str(k), "--dtype", "bfloat16"), s)
    for ratio in RATIOS[:3]:
        yield "SVD", ratio, lambda _, x=ratio: each(c, lambda a: _truncated(a, x, whole=True))
    for k in (8, 32):
        yield "vlora", k, lambda s, k=k: peer(c, "vlora", k, s)


class Evidence:
    """Measures what is not measured yet."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results

    def run(self) -> None:
        there = sorted(p.name for p in (self.args.trained / "adapters").glob("task-*"))
        names = [name for i, name in enumerate(there) if name == train_adapters.name_of(i)]  # up to the first gap
        heads = self.args.trained / "heads.json"
        if heads.exists() and self.results.find("heads") is None:
            self.results.add("heads", {"accuracy": json.loads(heads.read_text())})
        for n in self.args.counts:
            if n > len(names):
                print(f"{n}: left out, there are {len(names)}", flush=True)
                continue
            c = Collection.read(self.args.trained, names[:n])
            for arm in self.args.arms:
                own = [i for i in names[:n] if arm in ("all", c.arms[i])]
                if own:
                    self._measure(arm, c if arm == "all" else Collection.read(self.args.trained, own), n)

    def _measure(self, arm: str, c: Collection, n: int) -> None:
        facts = {"n": n, "arm": arm}
        if self.results.find("collection", **facts) is None:
            self.results.add("collection", {**facts, "adapters": len(c.adapters), **c.bytes.as_dict()})
        tasks = None
        if arm == "all" and n in self.args.tasks:
            tasks = Tasks(c, self.args.results.parent / "labels")
            if self.results.find("originals", n=n) is None:
                self.results.add("originals", {"n": n, **tasks.originals()})
        for system, setting, work in systems(c):
            if not self.args.systems or system in self.args.systems:
                self._one({**facts, "system": system, "setting": setting}, c, work, tasks)
        if self.args.systems:
            return
        for limit in (0.1, 0.25, 0.4):
            if self.results.find("sharing", **facts, limit=limit) is None:
                self.results.add("sharing", {**facts, "limit": limit, **em.sharing(c.adapters, limit)})
        for k in BOTH if arm == "all" and n >= 100 else ():
            if self.results.find("added", **facts, k=k) is None:
                with tempfile.TemporaryDirectory() as scratch:
                    self.results.add("added", {**facts, "k": k, **added(c, k, Path(scratch))})

    def _one(self, facts: Line, c: Collection, work: Callable[[Path], Found], tasks: Tasks | None) -> None:
        if any(self.results.find(kind, **facts) is not None for kind in ("row", "left")):
            return
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = work(Path(scratch))
            except Left as e:
                self.results.add("left", {**facts, "why": str(e)})
                return
        errors = {i: em.dw_error(c.adapters[i], found.adapters[i]) for i in c.adapters}
        arms = {a: float(np.mean([errors[i] for i in errors if c.arms[i] == a])) for a in sorted(set(c.arms.values()))}
        told = {**em.statistics(errors), "arms": arms, **found.bytes.as_dict(), **found.facts}
        if facts["system"] in UNPREDICTED:
            tasks = None
        told |= tasks.measure(found.adapters) if tasks is not None else {}
        row = self.results.add("row", {**facts, **told})
        words = (
            f"{row['at'][11:]} N={row['n']} {row['arm']} {row['system']} {row['setting']:g}: {row['lora'] / 1e6:.3f} MB"
        )
        words += f", error {row['mean']:.4f}, {row['seconds']:.0f} s"
        if tasks is not None:
            words += f", agreement {np.mean(list(row['agreement'].values())):.3f}"
        print(words, flush=True)


class Tasks:
    """Held-out text of some of the adapters, and predictions on it, which are kept by the digest of what predicts."""

    def __init__(self, c: Collection, kept: Path) -> None:
        import torch

        root, names = c.root, list(c.adapters)[:PREDICTED]
        self.c, self.encode, self.kept, self.names = c, train_adapters.encoder(), kept, names
        self.facts = {name: json.loads((root / "tasks" / f"{name}.json").read_text()) for name in names}
        self.heads = {name: em.tensors_of(root / "adapters" / name) for name in names}
        self.model = train_adapters.base_model(0).eval()
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.base = {name: m.weight.detach().clone() for name, m in self.layers.items()}
        self.texts = {name: facts["held_out"][::TEXTS] for name, facts in self.facts.items()}
        kept.mkdir(parents=True, exist_ok=True)

    def predict(self, name: str, adapter: em.Adapter) -> np.ndarray:
        """Labels by the base with dW added, under the adapter's own head."""
        digest = hashlib.sha256(name.encode())
        for module, m in sorted(adapter.items()):
            for x in (module.encode(), np.float64(m.scale).tobytes(), m.a.tobytes(), m.b.tobytes()):
                digest.update(x)
        path = self.kept / f"{digest.hexdigest()[:24]}.npy"
        if not path.exists():
            labels = self._labels(name, adapter)
            part = path.with_suffix(f".{time.monotonic_ns()}.part")
            with part.open("wb") as f:
                np.save(f, labels)
            part.rename(path)
        found: np.ndarray = np.load(path)
        return found

    def _labels(self, name: str, adapter: em.Adapter) -> np.ndarray:
        import torch

        with torch.inference_mode():
            for key in ("weight", "bias"):
                head = torch.from_numpy(self.heads[name][f"base_model.model.classifier.{key}"])
                getattr(self.model.classifier, key).copy_(head)
            for module, weight in self.base.items():
                if module != "classifier":
                    self.layers[module].weight.copy_(weight)
            for module, m in adapter.items():
                self.layers[module].weight.add_(torch.from_numpy((m.scale * (m.b @ m.a)).astype(np.float32)))
            labels: np.ndarray = self.model(**self.encode([t for t, _ in self.texts[name]])).logits.argmax(1).numpy()
        return labels

    def originals(self) -> Line:
        """Accuracies, which are about those of the end of training: dW added to the base is what PEFT computes."""
        found = {name: self._accuracy(name, self._original(name)) for name in self.names}
        whole = [self.facts[name]["accuracy"] for name in self.names]
        if abs(np.mean(list(found.values())) - np.mean(whole)) > 0.04:
            raise SystemExit(f"accuracy {np.mean(list(found.values())):.3f}, and {np.mean(whole):.3f} when trained")
        return {"accuracy": found, "texts": sum(map(len, self.texts.values()))}

    def _original(self, name: str) -> np.ndarray:
        return self.predict(name, self.c.adapters[name])

    def measure(self, adapters: Mapping[str, em.Adapter]) -> Line:
        labels = {name: self.predict(name, adapters[name]) for name in self.names}
        agreement = {name: float(np.mean(x == self._original(name))) for name, x in labels.items()}
        return {"accuracy": {n: self._accuracy(n, found) for n, found in labels.items()}, "agreement": agreement}

    def _accuracy(self, name: str, labels: np.ndarray) -> float:
        return float(np.mean(labels == np.array([y for _, y in self.texts[name]])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=default_run(), help="its name (default: this boot of this machine)")
    parser.add_argument("--results", type=Path, default=BUILD / "evidence.jsonl")
    parser.add_argument("--trained", type=Path, default=BUILD / "trained", help="what train_adapters.py has made")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="the first N; left out if not there yet")
    parser.add_argument("--tasks", nargs="*", type=int, default=TASKS, help="N at which predictions are made")
    parser.add_argument("--arms", nargs="+", default=["all"], choices=["all", "own", "shared", "long"])
    parser.add_argument("--systems", nargs="+", help="only these")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write tables of the run, and measure nothing")
    args = parser.parse_args()
    results = Results.read(args.results, args.run)
    if args.render:
        if not results.lines:
            parser.error(f"{args.results} has nothing of the run {args.run}")
        evidence_report.render(results.lines, args.render)
        return
    warnings.filterwarnings("ignore", message="num_components=")  # lorashare and we clamp k
    facts = machine()
    if results.find("machine", **facts) is None:
        results.add("machine", facts)
    Evidence(args, results).run()


if __name__ == "__main__":
    main()
