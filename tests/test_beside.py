"""Files of weights beside an adapter's own are named, wherever adapters are read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from lorashare_stream.adapters.folder import _OTHERS, CONFIG, paths_below, weights_beside
from lorashare_stream.checkpoint.format import CONFIG as SHARE_CONFIG
from lorashare_stream.cli.app import main
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings
from lorashare_stream.settings import Settings
from lorashare_stream.workspace.workspace import COPY

from .conftest import make_collection

TRAINED = [
    "non_lora_trainables.bin", "value_head.safetensors", "value_head.bin", "new_embeddings.safetensors", "a/b/score.pt",
    "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "merged/model-00001-of-00002.safetensors", "optimus.bin",
    "zero_shot_head.pt", "vit.safetensors",
]  # fmt: skip
OTHERS = [
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_3.pth", "scaler.pt",
    "training_args.bin", "random_states_0.pkl", "optim_world_size_8_rank_0.pt", "extra_state_world_size_8_rank_0.pt",
    "trainer_state.json", "README.md", "tokenizer.json", "adapter_model.bin", "._value_head.bin", "zero_to_fp32.pt",
    "global_step9/mp_rank_00_model_states.pt", "global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "checkpoint-100/value_head.bin", "checkpoint-200/global_step200/zero_pp_rank_0.pt", ".cache/x.bin",
    "__MACOSX/x.bin", "named/adapter_config.json", "named/value_head.bin", "named/deeper/value_head.bin",
    "out.share/share_config.json", "out.share/adapters/a/x.safetensors", "w/workspace.copy.json",
    "w/converted/x.safetensors",
]  # fmt: skip


def with_files(folder: str | Path, paths: list[str]) -> None:
    for path in paths:
        file = Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"weights of some kind")


def test_what_is_trained_is_told_and_what_is_of_a_training_is_not(tmp_path: Path) -> None:
    (folder,) = make_collection(tmp_path, 1)
    with_files(folder, TRAINED + OTHERS)
    assert weights_beside(TRAINED + OTHERS) == tuple(sorted(TRAINED))  # a listing of the Hub
    assert weights_beside(paths_below(Path(folder))) == tuple(sorted(TRAINED))
    assert {CONFIG, SHARE_CONFIG, COPY} == _OTHERS


def test_plan_compress_add_and_verify_name_them(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    folders = make_collection(tmp_path / "in", 4)
    (new,) = make_collection(tmp_path / "new", 1, seed=9)
    for folder in [*folders, new]:
        save_file({"v_head.summary.weight": np.ones((1, 4), np.float32)}, Path(folder) / "value_head.safetensors")
        torch.save({}, Path(folder) / "training_args.bin")
    with_files(
        folders[0], ["2_Dense/model.safetensors", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    )
    for form in (["-k", "4"], ["--max-error", "0.3"]):
        out = str(tmp_path / form[0])
        for command, who, files in [
            (["plan", str(tmp_path / "in"), *form], "4 adapters (a00, a01, a02 and 1 more)", 4),
            (["compress", str(tmp_path / "in"), "-o", out, *form], "4 adapters (a00, a01, a02 and 1 more)", 4),
            (["verify", out], "4 adapters (a00, a01, a02 and 1 more)", 4),
            (["add", out, new, "--names", "b"], "1 adapter (b)", 1),
        ]:
            assert main(command) == 0
            told = capsys.readouterr().out + caplog.text
            caplog.clear()
            (line,) = [line for line in told.splitlines() if "files of weights beside" in line]
            assert f"beside {who} are not taken into the checkpoint" in line
            assert f"value_head.safetensors ({files} adapter" in line
            assert ("2_Dense/model.safetensors (1 adapter), m-*-of-*.safetensors (1 adapter)" in line) == (files == 4)
            assert "training_args" not in line
    made = json.loads((tmp_path / "-k.workspace" / "plan.json").read_text())
    assert made["adapters"][1]["beside"] == ["value_head.safetensors"]


def test_the_note_is_bounded(tmp_path: Path) -> None:
    folders = make_collection(tmp_path, 3)
    with_files(folders[1], [f"head{i}.bin" for i in range(40)])
    (note,) = [w for w in plan_warnings(plan_for(resolve(folders), Settings())) if "files of weights" in w]
    assert "head0.bin (1 adapter)" in note
    assert "and 32 more" in note
    assert len(note) < 600
