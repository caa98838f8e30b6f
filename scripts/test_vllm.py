"""Adapters of a checkpoint, asked by name from vLLM's OpenAI-compatible server, against what PEFT generates.

Called by scripts/test_vllm.sh, in an environment with vLLM. The base model and its tokenizer are tiny and made here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lorashare_stream import SHAREModel

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
PROMPT = [5, 6, 7, 8]
LENGTH = 12
START = 300.0  # seconds that the server may take to start
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 40}},
    "fourth": {},
    "dora": {"use_dora": True},
}
ASKED = ["plain", "rslora", "patterns"]


def make_base(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=256, bos_token_id=1, eos_token_id=2, **size)
    config.initializer_range = 0.2  # so that no token follows itself for ever
    LlamaForCausalLM(config).save_pretrained(folder)


def make_adapters(base: Path, folder: Path, kinds: dict[str, dict[str, Any]]) -> None:
    for name, options in kinds.items():
        torch.manual_seed(int.from_bytes(name.encode()[:4], "big"))
        options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**options))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)


def compress(*words: str | Path) -> None:
    subprocess.run(["lorashare-stream", *map(str, words), "--quiet"], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def server(model: Path, **environment: str | Path) -> Iterator[str]:
    """The address of a server that holds two adapters in memory, and one in the engine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # `vllm serve` of this wheel looks for a distribution named vllm; the module that it runs does not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"]
    command += ["--max-lora-rank", "8", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    given = {
        **os.environ,
        **cpu,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        **{k: str(v) for k, v in environment.items()},
    }
    with open("server.log", "wb") as log:
        process = subprocess.Popen(command, env=given, stdout=log, stderr=log)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START
        while not is_up(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start:\n{Path('server.log').read_text()[-4000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, model: str) -> tuple[int, Any]:
    """The status, and the tokens of a greedy answer or the message of an error."""
    question = {"model": model, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}
    body = json.dumps(question | {"ignore_eos": True, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)["error"]["message"]


def by_peft(share: SHAREModel, base: Path, name: str | None) -> list[int]:
    """The tokens that PEFT generates with a reconstructed adapter, or the base without one."""
    model = LlamaForCausalLM.from_pretrained(base).eval()
    if name is not None:
        model = share.apply(model, name).eval()
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None  # as ignore_eos
    found: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return found[len(PROMPT) :]


def expect(what: str, found: object, wanted: object) -> None:
    print(f"{'ok  ' if found == wanted else 'FAIL'} {what}: {found}", flush=True)
    if found != wanted:
        raise SystemExit(f"expected {wanted}")


def check(address: str, checkpoint: Path, base: Path, called: Path) -> None:
    """Ask for adapters by name, all at once and one by one, and for some that are not there or cannot be served."""
    share = SHAREModel.from_pretrained(checkpoint)
    wanted = {name: by_peft(share, base, name) for name in ASKED}
    wanted[str(called)] = by_peft(share, base, None)
    if len({tuple(tokens) for tokens in wanted.values()}) < len(wanted):
        raise SystemExit("the adapters of this test do not differ in what they generate")
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: ask(address, name), ASKED * 3))
    expect("asked thrice each, all at once: right", found == [(200, wanted[name]) for name in ASKED] * 3, True)
    for name in [str(called), *ASKED, *ASKED]:  # two fit, so that each is evicted and loaded again
        expect(f"{name} like PEFT", ask(address, name), (200, wanted[name]))
    expect("one that is not there", ask(address, "nobody")[0], 404)
    code, message = ask(address, "dora")
    expect(f"one that vLLM cannot serve ({message})", (code, "DoRA" in message), (400, True))
    expect("tracebacks in the server's log", Path("server.log").read_text().count("Traceback"), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is written")
    root: Path = parser.parse_args().folder.absolute()
    logging.disable_progress_bar()
    base, adapters, cache = root / "base", root / "adapters", root / "cache"
    make_base(base)
    make_adapters(base, adapters, KINDS)
    forms = {"share": ["-k", "32"], "coded": ["--max-error", "0.1"]}
    for form, options in forms.items():
        compress("compress", adapters, "-o", root / form, *options)

    print("SHARE checkpoint")
    with server(base, LORASHARE_CHECKPOINT=root / "share", LORASHARE_CACHE=cache) as address:
        check(address, root / "share", base, base)
        make_adapters(base, root / "more", {"late": {}})
        compress("add", root / "share", root / "more")
        share = SHAREModel.from_pretrained(root / "share")
        expect("one that was added meanwhile", ask(address, "late"), (200, by_peft(share, base, "late")))
        expect("one of before", ask(address, "plain")[0], 200)

    print("coded checkpoint, the base model at another path than its adapters name")
    moved = Path(shutil.copytree(base, root / "elsewhere"))
    served = {"LORASHARE_CHECKPOINT": root / "coded", "LORASHARE_CACHE": cache, "LORASHARE_BASE_ALIAS": moved}
    with server(moved, **served) as address:
        check(address, root / "coded", base, moved)
    left = [p for p in cache.rglob("*") if p.name.startswith(".")]
    expect("folders in the cache", (len(list(cache.glob("*/*"))), left), (2 * len(ASKED) + 1, []))


if __name__ == "__main__":
    main()
