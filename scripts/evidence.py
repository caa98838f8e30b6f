"""Error against bytes on real collections, and what the error does to a task: writes docs/evidence.md
and its tables.

    python scripts/train_adapters.py build/evidence/trained
    python scripts/evidence.py [RUN] [--collections ...]
    python scripts/evidence.py [RUN] --render docs/evidence.md

Every row goes to a file of JSON lines, and what is there already is not measured again; a RUN that is not given is
named after the boot of the machine. Collections that are not there are left out. Needs the extras `dev` and `bench`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import evidence_measure as em
import evidence_report
import numpy as np
import train_adapters
from bench import Results, default_run, machine

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "evidence"
SHARED = ROOT.parent / "shared" / "adapters"
COLLECTIONS = ("distilbert", "gpt2", "minilm", "trained")
LIMITS = (0.05, 0.1, 0.16, 0.25, 0.4, 0.55)  # of `coded`: --max-error
KS = (8, 16, 32, 64)  # of `-k` and lorashare
RATIOS = (2, 4, 8, 16, 32, 64)  # of truncated SVDs: so many times fewer bytes than A and B
VLORA_KS = (1, 2, 4, 8)  # its vectors are whole tensors, of which N adapters have no more than N
ROUNDED = {
    "bfloat16": em.bfloat16,
    "int8": em.int8,
    "int4": partial(em.integers, bits=4),
    "int3": partial(em.integers, bits=3),
}
AGREES = 1e-3  # our certificate with what is measured here
Line = dict[str, Any]


@dataclass
class Collection:
    """Adapters of one base, read once."""

    name: str
    folder: Path
    adapters: dict[str, em.Adapter] = field(default_factory=dict)
    bytes: em.Bytes = field(default_factory=em.Bytes)

    def __post_init__(self) -> None:
        for path in sorted(p.parent for p in self.folder.glob("*/adapter_config.json")):
            self.adapters[path.name] = em.read_adapter(path)
            for key, size in em.bytes_of(path).as_dict().items():
                setattr(self.bytes, key, getattr(self.bytes, key) + size)

    @property
    def paths(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in self.adapters}

    def computed(self, lora: int) -> em.Bytes:
        """Of adapters that stay PEFT's, with other tensors: headers, configurations and heads are as they were."""
        return em.Bytes(lora=lora, extras=self.bytes.extras, other=self.bytes.other)

    def rounded(self, adapters: Mapping[str, em.Adapter], rounding: Any) -> tuple[dict[str, em.Adapter], em.Bytes]:
        found, size = em.rounded(adapters, rounding)
        return found, self.computed(size)

    def truncated(self, budget: int, width: int = 4, scales: int = 0) -> tuple[dict[str, em.Adapter], em.Bytes]:
        found, size = em.truncated(self.adapters, budget, width, scales)
        return found, self.computed(size)


@dataclass
class Found:
    """What a system gives back, what it takes, and what it claims of itself."""

    adapters: dict[str, em.Adapter]
    bytes: em.Bytes
    facts: Line = field(default_factory=dict)


class Left(Exception):
    """A system cannot do this, for this reason."""


def ours(c: Collection, options: Mapping[str, Any], scratch: Path) -> Found:
    """By `SHAREModel.from_adapters` with these options."""
    from lorashare_stream import SHAREModel

    out = scratch / "out"
    share = SHAREModel.from_adapters(c.paths, device="cpu", output_dir=out, **options)
    found = {name: _restored(share, name, scratch) for name in c.adapters}
    claims = {name: share.certified(name).get("relative_error") for name in c.adapters}
    return Found(found, em.bytes_of(out), {"claims": claims})


def lorashare(c: Collection, k: int, scratch: Path) -> Found:
    """In memory. It refuses adapters of different ranks and targets, which its arithmetic can do: then unchecked."""
    import lorashare.compression
    import lorashare.model

    facts = {}
    decompose, check = lorashare.compression.eigendecomposition, lorashare.model.validate_adapters
    lorashare.compression.eigendecomposition = partial(_decomposed, decompose)
    try:
        share = lorashare.SHAREModel.from_adapters(c.paths, num_components=k, device="cpu")
    except ValueError as e:
        facts["refuses"] = str(e).split(":")[0]
        lorashare.model.validate_adapters = lambda _: None
        share = lorashare.SHAREModel.from_adapters(c.paths, num_components=k, device="cpu")
    finally:
        lorashare.compression.eigendecomposition, lorashare.model.validate_adapters = decompose, check
    share.save_pretrained(scratch / "out")
    share = lorashare.SHAREModel.from_pretrained(scratch / "out")
    return Found({name: _restored(share, name, scratch) for name in c.adapters}, em.bytes_of(scratch / "out"), facts)


def _decomposed(decompose: Callable[..., Line], matrix: Any, device: str = "cpu") -> Line:
    """lorashare's full eigendecomposition, which does not depend on k, once for all k: minutes on gpt2."""
    import torch

    digest = hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:32]
    kept = BUILD / "lorashare" / f"{digest}.pt"
    if not kept.exists():
        found = decompose(matrix, device=device)
        found["eigenvectors"] = found["eigenvectors"][:, : max(KS)].clone()  # the others are never asked for
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return torch.load(kept, weights_only=True)


def vlora(c: Collection, k: int, scratch: Path) -> Found:
    """It reads safetensors alone, so the adapters are copied; it keeps no heads, so they are counted as they were."""
    import torch
    from safetensors.torch import save_file
    from vlora import SharedSubspace
    from vlora.io import load_adapter

    for name, path in c.paths.items():
        place = scratch / "in" / name
        place.mkdir(parents=True)
        shutil.copyfile(Path(path) / em.CONFIG, place / em.CONFIG)
        tensors = em.tensors_of(Path(path))
        save_file({key: torch.from_numpy(np.ascontiguousarray(t)) for key, t in tensors.items()}, place / em.WEIGHTS)
    try:
        loaded = [load_adapter(scratch / "in" / name) for name in c.adapters]
        share = SharedSubspace.from_adapters(loaded, list(c.adapters), num_components=k)
    except ValueError as e:
        raise Left(str(e).split(":")[0]) from e
    share.save(scratch / "out")
    share = SharedSubspace.load(scratch / "out")
    found = {}
    for name, adapter in c.adapters.items():
        back = share.reconstruct(name)
        found[name] = {
            layer.removeprefix("base_model.model."): em.Module(
                back.lora_a[layer].numpy(),
                back.lora_b[layer].numpy(),
                adapter[layer.removeprefix("base_model.model.")].scale,
            )
            for layer in back.layer_names
        }
    size = em.bytes_of(scratch / "out")
    size.extras += c.bytes.extras
    return Found(found, size)


def _restored(share: Any, name: str, scratch: Path) -> em.Adapter:
    """What PEFT would load: through a folder, with the configuration that is written there."""
    place = scratch / "restored"
    shutil.rmtree(place, ignore_errors=True)
    share.reconstruct(name, output_dir=str(place))
    return em.read_adapter(place)


class Evidence:
    """Measures what is not measured yet."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results

    def run(self) -> None:
        for name in self.args.collections:
            folder = self.args.trained / "adapters" if name == "trained" else SHARED / name
            if not folder.is_dir():
                print(f"{name}: left out, there is no {folder}", flush=True)
                continue
            c = Collection(name, folder)
            zero = [i for i, adapter in c.adapters.items() if not any(m.norm for m in adapter.values())]
            about = {"collection": name, "adapters": len(c.adapters), "zero": zero, **c.bytes.as_dict()}
            self._about(c, about)
            tasks = None
            if name == "trained" and not self.args.no_tasks:
                known = self.results.find("originals", collection=name)
                tasks = Tasks(self.args.trained, c, known and known["labels"])
                if known is None:
                    self.results.add("originals", {"collection": name, **tasks.originals()})
            for system, setting, work in self._systems(c):
                if not self.args.systems or system.startswith(tuple(self.args.systems)):
                    self._one(c, system, setting, work, tasks)

    def _about(self, c: Collection, about: Line) -> None:
        if self.results.find("collection", **about) is None:
            ranks = sorted({len(m.a) for adapter in c.adapters.values() for m in adapter.values()})
            self.results.add(
                "collection", about | {"ranks": ranks, "modules": len({m for a in c.adapters.values() for m in a})}
            )

    def _systems(self, c: Collection) -> Iterator[tuple[str, float, Callable[[Path], Any]]]:
        """Every system with each of its settings: a limit, k, how many times fewer bytes; 0 if it has none."""
        for limit in LIMITS:
            yield "coded", limit, lambda scratch, limit=limit: ours(c, {"max_error": limit}, scratch)
        for k in KS:
            yield "-k", k, lambda scratch, k=k: ours(c, {"num_components": k}, scratch)
        for name, rounding in ROUNDED.items():
            yield name, 0, lambda _, rounding=rounding: Found(*c.rounded(c.adapters, rounding))
        for ratio in RATIOS:
            budget = c.bytes.lora // ratio
            yield "SVD", ratio, lambda _, b=budget: Found(*c.truncated(b))
            yield (
                "SVD, int8",
                ratio,
                lambda _, b=budget: Found(*c.rounded(c.truncated(b, width=1, scales=8)[0], em.int8)),
            )
        for k in VLORA_KS:
            yield "vlora", k, lambda scratch, k=k: vlora(c, k, scratch)
        for k in KS:
            yield "lorashare", k, lambda scratch, k=k: lorashare(c, k, scratch)

    def _one(
        self, c: Collection, system: str, setting: float, work: Callable[[Path], Any], tasks: Tasks | None
    ) -> None:
        facts = {"collection": c.name, "system": system, "setting": setting}
        if self.results.find("row", **facts) is not None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = work(Path(scratch))
            except Left as e:
                if self.results.find("left", **facts, why=str(e)) is None:
                    self.results.add("left", {**facts, "why": str(e)})
                return
        errors = {i: em.dw_error(c.adapters[i], found.adapters[i]) for i in c.adapters}
        claims = found.facts.pop("claims", {})
        apart = [abs(errors[i] - x) for i, x in claims.items() if x is not None and not np.isnan(errors[i])]
        if apart and max(apart) > AGREES:
            raise SystemExit(f"{c.name}, {system}, {setting}: a certificate is {max(apart):.1e} off")
        told = {"errors": errors, "apart": max(apart, default=None), **found.bytes.as_dict(), **found.facts}
        told |= tasks.measure(found.adapters) if tasks is not None else {}
        row = self.results.add("row", {**facts, **em.statistics(errors), **told})
        words = f"{c.name} {system} {setting:g}: {row['lora'] / 1e6:.3f} MB, error {row['mean']:.4f}"
        if tasks is not None:
            words += f", agreement {np.mean(list(row['agreement'].values())):.3f}"
        print(words, flush=True)


class Tasks:
    """Held-out text of the trained adapters, and their predictions on it."""

    def __init__(self, root: Path, c: Collection, known: Mapping[str, list[int]] | None = None) -> None:
        import torch

        self.c, self.encode = c, train_adapters.encoder()
        self.facts = {name: json.loads((root / "tasks" / f"{name}.json").read_text()) for name in c.adapters}
        self.model = train_adapters.base_model(0).eval()
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.base = {name: m.weight.detach().clone() for name, m in self.layers.items()}
        self.texts = {name: self._encoded(facts["held_out"]) for name, facts in self.facts.items()}
        self.truth = {name: np.array([y for _, y in facts["held_out"]]) for name, facts in self.facts.items()}
        self.predicted = {
            name: np.array(known[name]) if known else self.predict(name, adapter)
            for name, adapter in c.adapters.items()
        }
        self._check()

    def _check(self) -> None:
        """dW added to the base is what PEFT computes: the accuracy is that of the end of training."""
        for name, facts in self.facts.items():
            right = float(np.mean(self.predicted[name] == self.truth[name]))
            if abs(right - facts["accuracy"]) > 1.5 / len(facts["held_out"]):
                raise SystemExit(f"{name}: accuracy {right}, and {facts['accuracy']} when it was trained")

    def _encoded(self, texts: list[Any]) -> list[tuple[Any, list[int]]]:
        """Batches of texts of like length, and where they were."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
        parts = [order[i : i + 32] for i in range(0, len(order), 32)]
        return [(self.encode([texts[i][0] for i in part]), part) for part in parts]

    def predict(self, name: str, adapter: em.Adapter) -> np.ndarray:
        """Labels by the base with dW added, under the adapter's own head."""
        import torch

        head = em.tensors_of(self.c.folder / name)
        with torch.no_grad():
            for key in ("weight", "bias"):
                getattr(self.model.classifier, key).copy_(torch.from_numpy(head[f"base_model.model.classifier.{key}"]))
            for module in self.c.adapters[name]:
                self.layers[module].weight.copy_(self.base[module])
            for module, m in adapter.items():
                self.layers[module].weight.add_(torch.from_numpy(m.scale * (m.b @ m.a)))
            labels = np.empty(len(self.truth[name]), int)
            for inputs, places in self.texts[name]:
                labels[places] = self.model(**inputs).logits.argmax(1).numpy()
        return labels

    def originals(self) -> Line:
        return {
            "accuracy": {n: self._accuracy(n, labels) for n, labels in self.predicted.items()},
            "labels": {name: labels.tolist() for name, labels in self.predicted.items()},
            "texts": sum(len(y) for y in self.truth.values()),
            "classes": train_adapters.CLASSES,
        }

    def measure(self, adapters: Mapping[str, em.Adapter]) -> Line:
        labels = {name: self.predict(name, adapter) for name, adapter in adapters.items()}
        agreement = {n: float(np.mean(found == self.predicted[n])) for n, found in labels.items()}
        return {"accuracy": {n: self._accuracy(n, found) for n, found in labels.items()}, "agreement": agreement}

    def _accuracy(self, name: str, labels: np.ndarray) -> float:
        return float(np.mean(labels == self.truth[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=default_run(), help="its name (default: this boot of this machine)")
    parser.add_argument("--results", type=Path, default=BUILD / "evidence.jsonl")
    parser.add_argument("--trained", type=Path, default=BUILD / "trained", help="what train_adapters.py has made")
    parser.add_argument("--collections", nargs="+", choices=COLLECTIONS, default=COLLECTIONS)
    parser.add_argument("--systems", nargs="+", help="only those that begin with one of these words")
    parser.add_argument("--no-tasks", action="store_true", help="errors and bytes alone")
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
