"""Adapters of tools that save by themselves: their keys, configurations and side files, written by hand.

What a tool writes was looked up in its public repository, where `source` says; `known` was not looked up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lorashare_stream.adapters.foreign import TOOLS
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings
from lorashare_stream.settings import Settings

from .conftest import load_tensors

BASE = "org/base"
ONE = np.ones((2, 2), np.float32)
Tensors = dict[str, np.ndarray]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def pairs(pattern: str = "base_model.model.{}.lora_{}.weight", sides: str = "AB") -> Tensors:
    """Factors of two modules, (4, 32) and (32, 4), under keys of a tool's own."""
    rng = np.random.default_rng(0)
    shapes = [(sides[0], (4, 32)), (sides[1], (32, 4))]
    return {
        pattern.format(module, side): rng.standard_normal(shape).astype(np.float32)
        for module in (Q, V) for side, shape in shapes
    }  # fmt: skip


def config(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": BASE, **fields}


@dataclass(frozen=True)
class Case:
    """What a tool writes, and what is to come of it.

    Attributes:
        source: where that was looked up.
        tensors, config: of the adapter.
        file: of the tensors; a pickle if it does not end in `.safetensors`.
        beside: other files.
        told: parts of what the plan notes.
        untold: what it does not note.
        refused: parts of why the adapter is refused; it is taken if there are none.
        exact: whether nothing of it is shared.
    """

    source: str
    tensors: Tensors = field(default_factory=pairs)
    config: Mapping[str, Any] | None = field(default_factory=config)
    file: str = "adapter_model.safetensors"
    beside: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    exact: bool = False


TRAINER = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json")
EXPERTS = {  # one lora_A for all experts of w1, one lora_B for all of w2
    "base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight": np.ones((1, 4, 32), np.float32),
    "base_model.model.model.layers.0.mlp.experts.w1.lora_B.weight": np.ones((3, 48, 4), np.float32),
    "base_model.model.model.unembed_tokens.lora_A.weight": np.ones((4, 32), np.float32),
    "base_model.model.model.unembed_tokens.lora_B.weight": np.ones((50, 4), np.float32),
}
EXPERT_W3 = "base_model.model.model.layers.0.mlp.experts.w3.lora_{}.weight"
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}, "num_layers": 16}
MLX_TENSORS = {
    f"{m}.lora_{s}": np.ones(shape, np.float32) for m in (Q, V) for s, shape in (("a", (32, 4)), ("b", (4, 32)))
}
HUB_CONFIG = {"config": {"architecture": "lora", "r": 8, "alpha": 8}, "model_class": "BertModel", "hidden_size": 32}
TORCHTUNE = pairs("layers.{}.lora_{}.weight", "ab")
CASES = {
    "Unsloth": Case(
        "known",
        config=config(
            auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, use_rslora=True,
            target_modules="(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)",
        ),
        beside=(*TRAINER, "unsloth.Q4_K_M.gguf"), told=("unsloth.Q4_K_M.gguf",), untold=("optimizer", "training_args"),
    ),
    "LLaMA-Factory, reward": Case(
        "hiyouga/LLaMA-Factory: src/llamafactory/train/callbacks.py, fix_valuehead_checkpoint",
        beside=(*TRAINER, "value_head.safetensors", "checkpoint-10/value_head.safetensors"),
        told=("value_head.safetensors (1 adapter)",), untold=("checkpoint-10", "rng_state"),
    ),
    "LLaMA-Factory, PiSSA": Case(
        "hiyouga/LLaMA-Factory: src/llamafactory/train/callbacks.py, PissaConvertCallback",
        config=config(init_lora_weights="pissa_niter_16"),
        beside=("pissa_init/adapter_config.json", "pissa_init/adapter_model.safetensors"),
        told=("kept exact", "a/pissa_init"), untold=("files of weights",), exact=True,
    ),
    "ms-swift": Case(
        "modelscope/ms-swift: examples/train/multimodal/lora_llm_full_vit/custom_plugin.py; other names are known",
        beside=(*TRAINER, "vit.safetensors", "additional_config.json", "args.json"),
        told=("vit.safetensors (1 adapter)",), untold=("args.json",),
    ),
    "ms-swift, own LoRA": Case(
        "modelscope/ms-swift: docs, Swift.save_to_peft_format",
        pairs("{}.lora_{}.default.weight"), config(swift_type="LORA"), told=("keys were not as PEFT saves them",),
    ),
    "ms-swift, own tuners": Case(
        "known", {"h.0.adapter.linear1.weight": ONE}, {"swift_type": "ADAPTER", "adapter_length": 128},
        refused=("an adapter of ms-swift's own tuners, not of PEFT", "swift_type", "swift export --to_peft_format"),
    ),
    "axolotl": Case(
        "known", pairs() | {"base_model.model.lm_head.weight": np.ones((50, 32), np.float32)},
        config(modules_to_save=["lm_head"]),
        beside=("checkpoint-7/adapter_model.safetensors", "merged/model.safetensors"),
        told=("merged/model.safetensors",), untold=("checkpoint-7",),
    ),
    "axolotl, torch.compile": Case(
        "known", pairs("_orig_mod.base_model.model.{}.lora_{}.weight"), told=("keys were not as PEFT saves them",)
    ),
    "torchtune": Case(
        "pytorch/torchtune: training/checkpointing/_checkpointer.py, models/convert_weights.py",
        config={"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},  # early: without a base
        beside=("adapter_model.pt", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        told=("adapter_model.pt (1 adapter), model-*-of-*.safetensors (1 adapter)",),
    ),
    "torchtune, Phi-3 and Llama 3.2 Vision": Case(
        "pytorch/torchtune: training/checkpointing/_checkpointer.py", TORCHTUNE, None, "adapter_model.pt",
        refused=("an adapter of torchtune: adapter_model.pt without adapter_config.json", "FullModelHFCheckpointer"),
    ),
    "torchtune, renamed": Case(
        "pytorch/torchtune: models/convert_weights.py", TORCHTUNE, file="adapter_model.bin",
        refused=("the keys are those of torchtune LoRA", "FullModelHFCheckpointer"),
    ),
    "NeMo AutoModel": Case(
        "NVIDIA-NeMo/Automodel: components/checkpoint/addons.py, PeftAddon",
        config=config(task_type="CAUSAL_LM", use_dora=False, bias="none"),
        beside=("automodel_peft_config.json", "special_tokens_map.json"), untold=("files of weights",),
    ),
    "NeMo, Megatron": Case(
        "NVIDIA/NeMo: keys that its export for PEFT maps, in code that was found without its path",
        {f"decoder.layers.0.self_attention.linear_qkv.adapter.linear_{n}.weight": ONE for n in ("in", "out")},
        refused=("the keys are those of NeMo LoRA", "hf-peft"),
    ),
    "OpenRLHF, ZeRO-3": Case(
        "OpenRLHF/OpenRLHF: openrlhf/utils/deepspeed/deepspeed.py, save_model", file="adapter_model.bin",
        beside=("config.json", "tokenizer.json"), untold=("files of weights",),
    ),
    "verl": Case(
        "volcengine/verl: workers/fsdp_workers.py, save_checkpoint",
        config=config(task_type="CAUSAL_LM", revision=None, loftq_config={}, eva_config=None, runtime_config={}),
        untold=("files of weights", "keys"),
    ),
    "verl, nothing gathered": Case(
        "volcengine/verl: utils/fsdp_utils.py, layered_summon_lora_params gave none", {},
        refused=("holds no LoRA tensors", "no tensors", "gather"),
    ),
    "Tinker": Case(
        "thinking-machines-lab/tinker-cookbook: tinker_cookbook/weights/README.md, _adapter.py",
        pairs() | EXPERTS, config(target_modules="all-linear"), beside=("checkpoint_complete",),
        told=("3-D lora_B (a convolution, or experts in one tensor)", "Tinker's names", "build_lora_adapter"),
        untold=("files of weights",),
    ),
    "Tinker, Nemotron": Case(
        "thinking-machines-lab/tinker-cookbook: tinker_cookbook/weights/_adapter.py, _convert_adapter",
        pairs() | {EXPERT_W3.format(side): np.ones((0, 4, 32), np.float32) for side in "AB"},
        refused=("an empty tensor: Tinker's placeholder", "[0, 4, 32]", "build_lora_adapter"),
    ),
    "mlx-lm": Case(
        "ml-explore/mlx-lm: mlx_lm/tuner/utils.py, lora.py", MLX_TENSORS, MLX, "adapters.safetensors",
        beside=("0000100_adapters.safetensors",),
        refused=("an adapter of mlx-lm, not of PEFT", "lora_a and lora_b transposed", "scale times rank"),
    ),
    "mlx-lm, without a configuration": Case(
        "ml-explore/mlx-lm: mlx_lm/tuner/utils.py, lora.py", MLX_TENSORS, None, "adapters.safetensors",
        refused=("a mlx-lm LoRA: adapters.safetensors without adapter_config.json", "transposed"),
    ),
    "AdapterHub": Case(
        "known; names of files found in several repositories that load them",
        {"bert.encoder.layer.0.loras.x.lora_A": ONE}, HUB_CONFIG, "pytorch_adapter.bin",
        refused=("an adapter of the adapters library (AdapterHub), not of PEFT", "leave it out"),
    ),
    "llama.cpp": Case(
        "known", {}, config(), "adapter.gguf",
        refused=("an adapter of llama.cpp, not of PEFT: adapter.gguf", "converted from"),
    ),
}  # fmt: skip


def written(folder: Path, case: Case) -> Path:
    folder.mkdir(parents=True)
    if case.file.endswith(".safetensors"):
        save_file(case.tensors, folder / case.file)
    else:
        torch.save({k: torch.from_numpy(v) for k, v in case.tensors.items()}, folder / case.file)
    if case.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(case.config))
    for name in case.beside:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_a_tool_saves(tmp_path: Path, compressed: Callable[..., Path], name: str) -> None:
    case = CASES[name]
    folder = written(tmp_path / "in" / "a", case)
    written(tmp_path / "in" / "b", Case("PEFT"))
    made = plan_for(resolve([tmp_path / "in"]), Settings())
    if case.refused:
        (error,) = made.refused
        assert error.adapter == "a"
        assert all(part in str(error) for part in case.refused), str(error)
        return
    assert not made.refused
    notes = "\n".join(plan_warnings(made))
    assert all(part in notes for part in case.told), notes
    assert not any(part in notes for part in case.untold), notes
    adapter = next(e for e in made.adapters if e.name == "a")
    assert [m.name for m in adapter.layout.modules if m.name in (Q, V)] == ([] if case.exact else [Q, V])
    for form, options in (("share", {"num_components": 100}), ("coded", {"max_error": 0.1})):
        share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], form, **options))
        found = share.reconstruct("a", output_dir=tmp_path / f"back-{form}")
        expected = {k: v for k, v in pairs().items() if not case.exact}
        for module in (Q, V) if expected else ():
            keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "BA"]
            b, a = (found[k].float().numpy() for k in keys)
            delta = expected[keys[0]] @ expected[keys[1]]
            assert np.linalg.norm(b @ a - delta) <= (0.2 if form == "coded" else 1e-4) * np.linalg.norm(delta)
        for key, record in adapter.layout.extras:
            assert np.array_equal(found[key].numpy(), case.tensors[record.name])
        assert json.loads((tmp_path / f"back-{form}" / "adapter_config.json").read_text()) == case.config
        assert load_tensors(tmp_path / f"back-{form}").keys() == found.keys()
    assert folder.is_dir()


def test_every_tool_is_tried_and_says_what_to_do() -> None:
    refused = [part for case in CASES.values() for part in case.refused]
    untried = [tool.name for tool in TOOLS if not any(tool.name in part for part in refused)]
    assert untried == ["LitGPT"]
    assert all(tool.remedy.endswith(".") for tool in TOOLS)


def test_a_folder_of_files_of_a_tool_is_told(tmp_path: Path) -> None:
    (tmp_path / "lit_model.pth.lora").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"but one of LitGPT .*leave it out"):
        resolve([tmp_path])
