"""Bytes, errors and predictions of a thousand real adapters, by this package and by others: writes docs/evidence.md.

    python scripts/train_adapters.py build/evidence/trained
    python scripts/train_adapters.py build/evidence/trained --heads 64
    python scripts/evidence.py [RUN] [--counts 10 32 100 316 1000] [--tasks 32 1000] [--arms all own shared]
    python scripts/evidence_product.py [RUN]
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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
PREDICTED, TEXTS = 64, 2  # the first so many adapters, on every second of their held-out texts
UNPREDICTED = ("coded, directions", "SHARE factors", "SHARE bfloat16", "SVD")
OURS = ("coded", "coded, directions", "SHARE")
ADDED = ("-k 32", "-k 128", "--max-error 0.25", "--max-error 0.25 --directions")  # by what the last tenth is added
AGREES = 1e-3  # our certificate with what is measured here
LIMIT_SECONDS, LIMIT_BYTES = 3600.0, 12 << 30  # of a child
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
        folders = {name: root / "adapters" / name for name in names}
        arms = {name: train_adapters.arm_of(int(name.rpartition("-")[2])) for name in names}
        adapters = {name: em.read_adapter(folder) for name, folder in folders.items()}
        return cls(root, adapters, em.bytes_of(*folders.values()), arms)

    def manifest(self, path: Path, names: Iterable[str] | None = None) -> str:
        chosen = self.adapters if names is None else names
        path.write_text("".join(f"{(self.root / 'adapters' / name).resolve()}\n" for name in chosen))
        return str(path)


@dataclass
class Found:
    """What a system gives back, and its bytes; of what is no files, LoRA's alone."""

    adapters: dict[str, em.Adapter]
    bytes: em.Bytes
    facts: Line = field(default_factory=dict)


class Left(Exception):
    """A system cannot do this, for this reason."""


def child(scratch: Path, *command: str) -> Line:
    """Run Python on these arguments: its seconds and its peak of memory."""
    order = {"command": [sys.executable, *command], "log": str(scratch / "log"), "files": None,
             "seconds": LIMIT_SECONDS, "memory": LIMIT_BYTES}  # fmt: skip
    line = _process(order)
    if line["status"] != "ok":
        said = (scratch / "log").read_text(errors="replace").strip().splitlines()
        raise Left(f"{line['status']}: {said[-1][:200] if said else ''}")
    return {"seconds": line["wall_s"], "peak": line["peak_bytes"]}


# Systems


def ours(c: Collection, options: Sequence[str], scratch: Path, names: Iterable[str] | None = None) -> Found:
    """By the command line."""
    out, sources = scratch / "out", c.manifest(scratch / "adapters.txt", names)
    told = ("-o", str(out), "--workers", "1", "-q", *options)
    return opened(out, c, child(scratch, "-m", "lorashare_stream", "compress", sources, *told))


def opened(out: Path, c: Collection, facts: Line) -> Found:
    """A checkpoint of ours; certificates that are not what is measured end the script."""
    from lorashare_stream import SHAREModel

    share = SHAREModel.from_pretrained(out)
    names = [name for name in c.adapters if name in share.adapter_configs]
    found = {name: em.module_pairs(share.reconstruct(name), share.adapter_configs[name]) for name in names}
    errors = {name: em.dw_error(c.adapters[name], found[name]) for name in names}
    apart = max(abs(errors[name] - share.certified(name)["relative_error"]) for name in names)
    if apart > AGREES:
        raise SystemExit(f"{out}: a certificate is {apart:.1e} off")
    size, directions = em.bytes_of(out), 0
    if share.config.coded:  # they lie among what is verbatim
        directions = share.config.ours["bytes"].get("basis", 0)
        size.lora, size.extras = size.lora + directions, size.extras - directions
    return Found(found, size, {**facts, "apart": apart, "directions": directions})


def added(c: Collection, options: Sequence[str], scratch: Path) -> Line:
    """What the last tenth costs on bases, or directions, of the others, and how far off it is."""
    names = list(c.adapters)
    cut = len(names) - -(-len(names) // 10)
    fitted = ours(c, options, scratch, names[:cut])
    late = c.manifest(scratch / "late.txt", names[cut:])
    order = ("add", str(scratch / "out"), late, "--variance", "1e-6", "--workers", "1", "-q")  # whatever bases keep
    found = opened(scratch / "out", c, child(scratch, "-m", "lorashare_stream", *order))
    sizes = {when: sum(x.bytes.as_dict().values()) for when, x in (("before", fitted), ("after", found))}
    errors = {name: em.dw_error(c.adapters[name], x) for name, x in found.adapters.items()}
    parts = {"fitted": names[:cut], "added": names[cut:]}
    means = {part: em.statistics({i: errors[i] for i in own}) for part, own in parts.items()}
    return {**found.facts, **sizes, **means, "counts": [len(own) for own in parts.values()]}


def peer(c: Collection, system: str, k: int, scratch: Path) -> Found:
    """By lorashare or vlora, of the first N of the folder; vlora keeps no heads: they are counted as they were."""
    out, folder = scratch / "out", c.root / "adapters"
    order = (str(HERE / "bench_peers.py"), system, str(folder), str(out), "-k", str(k), "--adapters")
    facts, found = child(scratch, *order, str(len(c.adapters))), {}
    size = em.bytes_of(out)
    if system == "lorashare":
        from lorashare import SHAREModel

        share = SHAREModel.from_pretrained(out)
    else:
        from vlora import SharedSubspace

        share, size.extras = SharedSubspace.load(out), size.extras + c.bytes.extras
    for name in c.adapters:
        back = share.reconstruct(name)
        if system == "vlora":
            sides = (("A", back.lora_a), ("B", back.lora_b))
            back = {f"{layer}.lora_{side}.weight": t for side, tensors in sides for layer, t in tensors.items()}
        found[name] = em.module_pairs(back, json.loads((folder / name / em.CONFIG).read_text()))
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


def _truncated(ratio: int, adapter: em.Adapter, whole: bool = True) -> tuple[em.Adapter, int]:
    budget = sum(4 * (m.a.size + m.b.size) for m in adapter.values()) // ratio
    if whole:
        return em.truncated(adapter, budget)
    return em.rounded(em.truncated(adapter, budget, width=1, scales=8)[0], partial(em.integers, bits=8))


# Each with its settings (a limit, k, how many times fewer bytes, bits, a density); what matters first
SYSTEMS: dict[str, tuple[Sequence[float], Callable[[Collection, Any, Path], Found]]] = {
    "coded": ((0.05, 0.1, 0.25, 0.4, 0.55, 0.7), lambda c, x, s: ours(c, ("--max-error", str(x)), s)),
    "coded, directions": ((0.1, 0.25, 0.4), lambda c, x, s: ours(c, ("--max-error", str(x), "--directions"), s)),
    "SHARE": ((8, 16, 32, 64, 128, 256), lambda c, k, s: ours(c, ("-k", str(k)), s)),
    "lorashare": ((32, 128), lambda c, k, s: peer(c, "lorashare", k, s)),
    "JD": ((16, 32, 64), lambda c, k, _: computed(c, lambda: evidence_joint.joint(c.adapters, k))),
    "JD, 8 clusters": ((16, 32), lambda c, k, _: computed(c, lambda: evidence_joint.joint(c.adapters, k, 8))),
    "SVD, int8": ((8, 16, 32, 64), lambda c, x, _: each(c, partial(_truncated, x, whole=False))),
    "int": ((8, 4, 3), lambda c, x, _: each(c, partial(em.rounded, rounding=partial(em.integers, bits=x)))),
    "LoRAQuant": ((2.8, 3.9), lambda c, x, _: each(c, partial(em.mixed, bits=int(x), energy=round(x % 1, 1)))),
    "ternary": ((0.2, 0.5), lambda c, x, _: each(c, partial(em.rounded, rounding=partial(em.ternary, density=x)))),
    "SHARE factors": ((32, 128), lambda c, k, s: ours(c, ("-k", str(k), "--objective", "factors"), s)),
    "SHARE bfloat16": ((32, 128), lambda c, k, s: ours(c, ("-k", str(k), "--dtype", "bfloat16"), s)),
    "SVD": ((4, 8, 16), lambda c, x, _: each(c, partial(_truncated, x))),
    "vlora": ((8, 32), lambda c, k, s: peer(c, "vlora", k, s)),
}


def measured(results: Results, kind: str, facts: Line, work: Callable[[Path], Line]) -> Line:
    """The line with these facts, measured in a scratch folder if it is not there; a row that cannot be is left out."""
    line = results.find(kind, **facts) or (results.find("left", **facts) if kind == "row" else None)
    if line is None:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                line = results.add(kind, {**facts, **work(Path(scratch))})
            except Left as e:
                if kind != "row":
                    raise
                line = results.add("left", {**facts, "why": str(e)})
        told = {key: f"{x:.5g}" if isinstance(x, float) else x for key, x in line.items() if not isinstance(x, dict)}
        print(", ".join(f"{key} {x}" for key, x in told.items() if key not in ("run", "digest")), flush=True)
    return line


def measure(args: argparse.Namespace, results: Results) -> None:
    """All that is not measured yet."""
    heads, names, tasks = args.trained / "heads.json", trained(args.trained), Tasks(args.trained)
    if heads.exists():
        measured(results, "heads", {}, lambda _: {"accuracy": json.loads(heads.read_text())})
    for n in (n for n in args.counts if n <= len(names)):
        everything = Collection.read(args.trained, names[:n])
        for arm in args.arms:
            own = [i for i in names[:n] if arm in ("all", everything.arms[i])]
            if own:
                c = everything if arm == "all" else Collection.read(args.trained, own)
                predicted = tasks if arm == "all" and n in args.tasks else None
                measure_one(results, {"n": n, "arm": arm}, c, args.systems, predicted)


def measure_one(results: Results, facts: Line, c: Collection, chosen: Iterable[str], tasks: Tasks | None) -> None:
    """All systems on one collection; our forms alone on an arm."""
    measured(results, "collection", facts, lambda _: {"adapters": len(c.adapters), **c.bytes.as_dict()})
    if tasks is not None:
        measured(results, "originals", {"n": facts["n"]}, lambda _: tasks.originals(c))
    for system in (s for s in SYSTEMS if s in chosen and (facts["arm"] == "all" or s in OURS)):
        for setting in SYSTEMS[system][0] if system != "JD, 8 clusters" or facts["n"] >= 100 else ():
            work = partial(row, c, system, setting, None if system in UNPREDICTED else tasks)
            measured(results, "row", {**facts, "system": system, "setting": setting}, work)
    for told in ADDED if facts["arm"] == "all" and facts["n"] >= 100 and "SHARE" in chosen else ():
        measured(results, "added", {**facts, "options": told}, partial(added, c, told.split()))


def row(c: Collection, system: str, setting: float, tasks: Tasks | None, scratch: Path) -> Line:
    """Bytes, errors and predictions of a system."""
    found = SYSTEMS[system][1](c, setting, scratch)
    errors = {i: em.dw_error(c.adapters[i], found.adapters[i]) for i in c.adapters}
    arms = {a: float(np.mean([errors[i] for i in errors if c.arms[i] == a])) for a in sorted(set(c.arms.values()))}
    told = {**em.statistics(errors), "arms": arms, **found.bytes.as_dict(), **found.facts}
    return told | (tasks.predictions(c, found.adapters) if tasks is not None else {})


class Tasks:
    """Held-out text of some of the adapters, and predictions on it."""

    def __init__(self, root: Path) -> None:
        self.root, self.encode = root, train_adapters.encoder()
        self.model = train_adapters.base_model(0).eval()
        self.base = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}
        self.labels: dict[bytes, np.ndarray] = {}  # by the digest of what predicts

    def _facts(self, name: str) -> Line:
        facts: Line = json.loads((self.root / "tasks" / f"{name}.json").read_text())
        return facts | {"held_out": facts["held_out"][::TEXTS]}

    def predict(self, name: str, adapter: em.Adapter) -> np.ndarray:
        """Labels by the base with dW added, under the adapter's own head."""
        import torch

        parts = [(n.encode(), np.float64(m.scale), m.a, m.b) for n, m in sorted(adapter.items())]
        key = hashlib.sha256(
            name.encode() + b"".join(n + s.tobytes() + a.tobytes() + b.tobytes() for n, s, a, b in parts)
        )
        if key.digest() not in self.labels:
            state, head = dict(self.base), em.tensors_of(self.root / "adapters" / name)
            for part in ("classifier.weight", "classifier.bias"):
                state[part] = torch.from_numpy(head[f"base_model.model.{part}"])
            for module, m in adapter.items():
                delta = torch.from_numpy((m.scale * (m.b @ m.a)).astype(np.float32))
                state[f"{module}.weight"] = state[f"{module}.weight"] + delta
            self.model.load_state_dict(state)
            with torch.inference_mode():
                logits = self.model(**self.encode([t for t, _ in self._facts(name)["held_out"]])).logits
            self.labels[key.digest()] = logits.argmax(1).numpy()
        return self.labels[key.digest()]

    def _accuracy(self, name: str, labels: np.ndarray) -> float:
        return float(np.mean(labels == np.array([y for _, y in self._facts(name)["held_out"]])))

    def originals(self, c: Collection) -> Line:
        """Accuracies, which are about those of the end of training: dW added to the base is what PEFT computes."""
        facts = {name: self._facts(name) for name in list(c.adapters)[:PREDICTED]}
        found = {name: self._accuracy(name, self.predict(name, c.adapters[name])) for name in facts}
        here, then = np.mean(list(found.values())), np.mean([x["accuracy"] for x in facts.values()])
        if abs(here - then) > 0.04:
            raise SystemExit(f"accuracy {here:.3f}, and {then:.3f} when trained")
        return {"accuracy": found, "texts": sum(len(x["held_out"]) for x in facts.values())}

    def predictions(self, c: Collection, adapters: Mapping[str, em.Adapter]) -> Line:
        """Accuracy, and agreement with the original, of each adapter."""
        labels = {i: self.predict(i, adapters[i]) for i in list(c.adapters)[:PREDICTED]}
        agreement = {i: float(np.mean(x == self.predict(i, c.adapters[i]))) for i, x in labels.items()}
        return {"accuracy": {i: self._accuracy(i, x) for i, x in labels.items()}, "agreement": agreement}


def trained(root: Path) -> list[str]:
    """Names of the adapters that are there, up to the first gap."""
    there = sorted(p.name for p in (root / "adapters").glob("task-*"))
    return [name for i, name in enumerate(there) if name == train_adapters.name_of(i)]


def options(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that scripts/evidence_product.py has, too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=default_run(), help="its name (default: this boot of this machine)")
    parser.add_argument("--results", type=Path, default=BUILD / "evidence.jsonl")
    parser.add_argument("--trained", type=Path, default=BUILD / "trained", help="what train_adapters.py has made")
    return parser


def add_machine(results: Results) -> None:
    facts = machine()
    if results.find("machine", **facts) is None:
        results.add("machine", facts)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="the first N; left out if not there yet")
    parser.add_argument("--tasks", nargs="*", type=int, default=TASKS, help="N at which predictions are made")
    parser.add_argument("--arms", nargs="+", default=["all"], choices=["all", "own", "shared", "long"])
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, help="only these")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write tables of the run, and measure nothing")
    args = parser.parse_args()
    results = Results.read(args.results, args.run)
    if args.render:
        if not results.lines:
            parser.error(f"{args.results} has nothing of the run {args.run}")
        evidence_report.render(results.lines, args.render)
        return
    warnings.filterwarnings("ignore", message="num_components=")  # lorashare and we clamp k
    add_machine(results)
    measure(args, results)


if __name__ == "__main__":
    main()
