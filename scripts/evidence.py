"""Error against bytes on real collections, and what the error does to a task: writes docs/evidence.md.

    python scripts/train_adapters.py build/evidence/trained
    python scripts/evidence.py [RUN] [--collections ...] [-k ...]
    python scripts/evidence.py [RUN] --render docs/evidence.md

Every row goes to a file of JSON lines, and what is there already is not measured again; a RUN that is not given is
named after the boot of the machine. Collections that are not there are left out. Needs the extras `dev` and `bench`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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
REAL = ("distilbert", "gpt2", "minilm")
HALVES = {"trained-shared": "shared", "trained-own": "own"}  # each half of the trained ones as a collection
COLLECTIONS = (*REAL, "trained", *HALVES)
KS = (8, 16, 32, 64, 128)
TASK_KS = (8, 16, 32, 64)
TASK_EVERY = 2  # one of so many held-out texts is asked of what is reconstructed, whatever its class
TASK_SYSTEMS = (
    "originals, int8", "lorashare", "factors", "delta", "delta, int8", "truncated SVD", "truncated SVD, int8",
)  # fmt: skip
BELOW = (2, 4)  # of `delta` besides, so that it is known at what a peer takes with the least k
VLORA_KS = (1, 2, 4, 8, 16, 24)  # its vectors are whole tensors, of which N adapters have no more than N
AGREES = 1e-3  # our certificate with what is measured here
Line = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One of our settings: a name, and keyword arguments of `SHAREModel.from_adapters` beside k."""

    name: str
    options: Mapping[str, Any]


# A line each; what the installed version does not know is left out, and said.
OURS = (
    Variant("factors", {"objective": "factors"}),
    Variant("delta", {}),
    Variant("delta, bfloat16", {"dtype": "bfloat16"}),
)


@dataclass
class Collection:
    """Adapters of one base, read once."""

    name: str
    folder: Path
    names: frozenset[str] | None = None  # None is all that are there
    adapters: dict[str, em.Adapter] = field(default_factory=dict)
    bytes: em.Bytes = field(default_factory=em.Bytes)

    def __post_init__(self) -> None:
        for path in sorted(p.parent for p in self.folder.glob("*/adapter_config.json")):
            if self.names is not None and path.name not in self.names:
                continue
            self.adapters[path.name] = em.read_adapter(path)
            for key, size in em.bytes_of(path).as_dict().items():
                setattr(self.bytes, key, getattr(self.bytes, key) + size)

    @property
    def paths(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in self.adapters}

    def computed(self, lora: int) -> em.Bytes:
        """Of adapters that stay PEFT's, with other tensors: headers, configurations and heads are as they were."""
        return em.Bytes(lora=lora, extras=self.bytes.extras, other=self.bytes.other)


@dataclass
class Found:
    """What a system gives back, what it takes, and what it claims of itself."""

    adapters: dict[str, em.Adapter]
    bytes: em.Bytes
    facts: Line = field(default_factory=dict)


class Left(Exception):
    """A system cannot do this, for this reason."""


def ours(c: Collection, k: int, options: Mapping[str, Any], scratch: Path) -> Found:
    from lorashare_stream import SHAREModel
    from lorashare_stream.errors import BudgetError, UsageError

    out = scratch / "out"
    try:
        share = SHAREModel.from_adapters(c.paths, num_components=k, device="cpu", output_dir=out, **options)
    except (UsageError, BudgetError, TypeError) as e:
        if any(word in str(e) for word in ("unknown setting", "unexpected keyword")):
            raise Left("a setting that this version does not have") from e
        if isinstance(e, TypeError):
            raise
        raise Left(str(e).splitlines()[0]) from e
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


def quantised(c: Collection, k: int, scratch: Path) -> Iterator[tuple[str, Found]]:
    """`delta` with int8 loadings, and with int8 components too, a scale a column: a trial, no setting of ours."""
    from lorashare_stream import SHAREModel

    share = SHAREModel.from_adapters(c.paths, num_components=k, device="cpu", output_dir=scratch / "out")
    exact = em.bytes_of(scratch / "out")
    bases = {group: share.components[group].float().numpy() for group in share.components}
    plain = sum(4 * v.size for v in bases.values())
    coarse = {group: em.int8(v) for group, v in bases.items()}
    for system, chosen, basis_bytes in (
        ("delta, int8 loadings", bases, plain),
        ("delta, int8", {g: v for g, (v, _) in coarse.items()}, sum(size for _, size in coarse.values())),
    ):
        found, size = {}, basis_bytes
        for name, adapter in c.adapters.items():
            loadings = {g: em.int8(x.float().numpy()) for g, x in share.all_loadings[name].items()}
            size += sum(nbytes for _, nbytes in loadings.values())
            back = {
                m: em.Module(
                    (chosen[f"{m}:A"] @ loadings[f"{m}:A"][0]).T, chosen[f"{m}:B"] @ loadings[f"{m}:B"][0], a.scale
                )
                for m, a in adapter.items()
                if f"{m}:A" in loadings
            }
            found[name] = back | {m: a for m, a in adapter.items() if m not in back}  # what is kept verbatim
        yield system, Found(found, em.Bytes(size, exact.verbatim, exact.extras, exact.other))


class Evidence:
    """Measures what is not measured yet."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results

    def run(self) -> None:
        for name in self.args.collections:
            folder = SHARED / name if name in REAL else self.args.trained / "adapters"
            if not folder.is_dir():
                print(f"{name}: left out, there is no {folder}", flush=True)
                continue
            c = Collection(name, folder, self._half(HALVES[name]) if name in HALVES else None)
            zero = [i for i, adapter in c.adapters.items() if not any(m.norm for m in adapter.values())]
            about = {"collection": name, "adapters": len(c.adapters), "zero": zero, **c.bytes.as_dict()}
            self._about(c, about)
            tasks = None
            if name == "trained" and not self.args.no_tasks:
                known = self.results.find("originals", collection=name)
                tasks = Tasks(self.args.trained, c, known and known["labels"])
                if known is None:
                    self.results.add("originals", {"collection": name, **tasks.originals()})
            for system, k, work in self._systems(c):
                if self.args.systems and not system.startswith(tuple(self.args.systems)):
                    continue
                self._one(c, system, k, work, tasks)

    def _half(self, half: str) -> frozenset[str]:
        tasks = self.args.trained / "tasks"
        return frozenset(p.stem for p in tasks.glob("*.json") if json.loads(p.read_text())["half"] == half)

    def _about(self, c: Collection, about: Line) -> None:
        if self.results.find("collection", **about) is None:
            ranks = sorted({len(m.a) for adapter in c.adapters.values() for m in adapter.values()})
            self.results.add(
                "collection", about | {"ranks": ranks, "modules": len({m for a in c.adapters.values() for m in a})}
            )

    def _systems(self, c: Collection) -> Iterator[tuple[str, int | None, Callable[[Path], Any]]]:
        """In the order of the page; every one with the k it is given, if it is given one."""
        for rounding in (em.bfloat16, em.int8):

            def work(_: Path, rounding: Any = rounding) -> Found:
                found, size = em.rounded(c.adapters, rounding)
                return Found(found, c.computed(size))

            yield f"originals, {rounding.__name__}", None, work
        for k, v in itertools.product(BELOW, (v for v in OURS if v.name in ("delta", "delta, bfloat16"))):
            yield v.name, k, lambda scratch, k=k, v=v: ours(c, k, v.options, scratch)
        for k in self.args.k:
            yield "lorashare", k, lambda scratch, k=k: lorashare(c, k, scratch)
            for v in OURS:
                yield v.name, k, lambda scratch, k=k, v=v: ours(c, k, v.options, scratch)
            yield "truncated SVD", k, lambda _, k=k: self._truncated(c, k, "delta")
            for system in ("delta, int8 loadings", "delta, int8"):
                yield system, k, lambda scratch, k=k, s=system: dict(quantised(c, k, scratch))[s]
            yield "truncated SVD, int8", k, lambda _, k=k: self._truncated(c, k, "delta, int8")
        for k in VLORA_KS:
            if k < len(c.adapters):
                yield "vlora", k, lambda scratch, k=k: vlora(c, k, scratch)

    def _truncated(self, c: Collection, k: int, like: str) -> Found:
        """At the LoRA bytes of another system with this k; what that keeps verbatim has no dW."""
        row = self.results.find("row", collection=c.name, system=like, k=k)
        if row is None:
            raise Left(f"{like} was not measured")
        if like == "delta":
            found, size = em.truncated(c.adapters, row["lora"])
        else:
            found, _ = em.truncated(c.adapters, row["lora"], width=1, scales=8)
            found, size = em.rounded(found, em.int8)
        return Found(found, c.computed(size))

    def _one(self, c: Collection, system: str, k: int | None, work: Callable[[Path], Any], tasks: Tasks | None) -> None:
        facts = {"collection": c.name, "system": system, "k": k}
        row = self.results.find("row", **facts)
        chosen = system in TASK_SYSTEMS and k in (None, *TASK_KS)
        chosen = chosen or (system == "vlora" and k in (4, 16))
        wanted = tasks is not None and chosen and self.results.find("task", **facts) is None
        if row is not None and not wanted:
            return
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = work(Path(scratch))
            except Left as e:
                if self.results.find("left", **facts, why=str(e)) is None:
                    self.results.add("left", {**facts, "why": str(e)})
                return
        errors = {i: em.dw_error(c.adapters[i], found.adapters[i]) for i in c.adapters}
        if row is None:
            claims = found.facts.pop("claims", {})
            apart = [abs(errors[i] - x) for i, x in claims.items() if x is not None and not np.isnan(errors[i])]
            if apart and max(apart) > AGREES:
                raise SystemExit(f"{c.name}, {system}, k = {k}: a certificate is {max(apart):.1e} off")
            told = {"errors": errors, "apart": max(apart, default=None), **found.bytes.as_dict(), **found.facts}
            row = self.results.add("row", {**facts, **em.statistics(errors), **told})
            print(f"{c.name} {system} k={k}: {row['lora'] / 1e6:.2f} MB, error {row['mean']:.4f}", flush=True)
        if wanted and tasks is not None:
            line = self.results.add("task", {**facts, **tasks.measure(found.adapters)})
            options = [float(np.mean(list(line[key].values()))) for key in ("accuracy", "agreement")]
            print(f"    accuracy {options[0]:.3f}, agreement {options[1]:.3f}", flush=True)


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
        self.asked = slice(None)
        self.predicted = {
            name: np.array(known[name]) if known else self.predict(name, adapter)
            for name, adapter in c.adapters.items()
        }
        self._check()
        self.asked = slice(None, None, TASK_EVERY)
        self.truth = {name: y[self.asked] for name, y in self.truth.items()}
        self.texts = {name: self._encoded(facts["held_out"][self.asked]) for name, facts in self.facts.items()}

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
            "accuracy": {n: self._accuracy(n, labels[self.asked]) for n, labels in self.predicted.items()},
            "labels": {name: labels.tolist() for name, labels in self.predicted.items()},
            "half": {name: facts["half"] for name, facts in self.facts.items()},
            "texts": sum(len(y) for y in self.truth.values()),
            "classes": train_adapters.CLASSES,
        }

    def measure(self, adapters: Mapping[str, em.Adapter]) -> Line:
        labels = {name: self.predict(name, adapter) for name, adapter in adapters.items()}
        agreement = {n: float(np.mean(found == self.predicted[n][self.asked])) for n, found in labels.items()}
        return {"accuracy": {n: self._accuracy(n, found) for n, found in labels.items()}, "agreement": agreement}

    def _accuracy(self, name: str, labels: np.ndarray) -> float:
        return float(np.mean(labels == self.truth[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=default_run(), help="its name (default: this boot of this machine)")
    parser.add_argument("--results", type=Path, default=BUILD / "evidence.jsonl")
    parser.add_argument("--trained", type=Path, default=BUILD / "trained", help="what train_adapters.py has made")
    parser.add_argument("--collections", nargs="+", choices=COLLECTIONS, default=COLLECTIONS)
    parser.add_argument("-k", nargs="+", type=int, default=KS)
    parser.add_argument("--systems", nargs="+", help="only those that begin with one of these words")
    parser.add_argument("--no-tasks", action="store_true", help="errors and bytes alone")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="write tables of the run, and measure nothing")
    args = parser.parse_args()
    if max(args.k) > max(KS):
        parser.error(f"-k: at most {max(KS)}")
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
