"""The command line as a shell sees it: streams, exit codes, signals, full disks."""

from __future__ import annotations

import errno
import io
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from lorashare_stream.cli import commands, output
from lorashare_stream.cli.app import main
from lorashare_stream.cli.output import progress_of, say, table_text
from lorashare_stream.errors import BudgetError, CollectionError, UsageError
from lorashare_stream.model import SHAREModel
from lorashare_stream.runtime.progress import silent
from lorashare_stream.settings import TYPES, Settings, choices_of, flags_of, shown
from lorashare_stream.workspace import moments as momentstore

from .conftest import load_tensors, make_collection, tree_digest, write_adapter
from .oracle import share_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Capture = pytest.CaptureFixture[str]


def call(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_plan_compress_info_reconstruct_verify(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    assert call("plan", tmp_path / "adapters", "-k", 4, "-o", plan) == 0
    assert not out.exists()
    text = capsys.readouterr().out
    assert all(part in text for part in ("tiny-base", "8", "break-even", "peak memory", "accumulate"))
    assert call("compress", "--plan", plan, "-o", out) == 0
    captured = capsys.readouterr()
    assert "relative dW error" in captured.out
    assert "rm -r" in captured.out
    assert "accumulate: 3 modules in 0:00" in captured.err
    assert call("info", out) == 0
    assert "relative dW error" in capsys.readouterr().out
    assert call("reconstruct", out, "--adapter", "a03", "-o", tmp_path / "one") == 0
    assert call("reconstruct", out, "--adapter", "a03", "a01", "-o", tmp_path / "two") == 0
    assert call("reconstruct", out, "--all", "-o", tmp_path / "all") == 0
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["a01", "a03"]
    assert len(list((tmp_path / "all").iterdir())) == 8
    assert (
        tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two" / "a03") == tree_digest(tmp_path / "all" / "a03")
    )
    capsys.readouterr()
    assert call("verify", out) == 0
    lines = capsys.readouterr().out.splitlines()
    errors = [float(line.split()[1]) for line in lines[1:9]]
    assert errors == sorted(errors, reverse=True)
    assert lines[-1].startswith("mean dW error")


@pytest.mark.parametrize("command", ["plan", "compress", "info", "reconstruct", "verify"])
def test_json_is_one_object_and_nothing_else(
    tmp_path: Path, collection: list[str], capsys: Capture, command: str
) -> None:
    out = tmp_path / "out"
    assert call("compress", *collection, "-o", out, "-k", 4, "-q") == 0
    capsys.readouterr()
    arguments = {
        "plan": collection, "compress": [*collection, "-o", out, "-k", 3], "info": [out],
        "reconstruct": [out, "--all", "-o", tmp_path / "rec"], "verify": [out],
    }[command]  # fmt: skip
    assert call(command, *arguments, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    expected = {
        "plan": "sizes",
        "compress": "errors",
        "info": "bytes",
        "reconstruct": "reconstructed",
        "verify": "mean",
    }
    assert expected[command] in value


@pytest.mark.parametrize("limit", [["-k", 4], ["--max-error", 0.3]])
def test_info_tells_bytes_and_ratio_of_the_whole_checkpoint_as_json_too(
    tmp_path: Path, collection: list[str], capsys: Capture, limit: list[object]
) -> None:
    out = tmp_path / "out"
    assert call("compress", *collection, "-o", out, *limit, "-q", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert call("info", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    used = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    originals = sum(file.stat().st_size for folder in collection for file in Path(folder).glob("*.safetensors"))
    assert told["checkpoint_bytes"] == made["checkpoint_bytes"] == used
    assert told["times_smaller"] == made["times_smaller"] == originals / used
    assert call("info", out) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint "))
    ratio = originals / used
    how = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    assert shown.split("  ")[-1].strip() == f"{used / 1024:.1f} KiB, {how}"


def told_by(capsys: Capture, *arguments: object) -> str:
    """What a command prints, in one line."""
    assert call(*arguments) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # a runner may ask for colours
    return " ".join(text.replace("\u2502", " ").split())


@pytest.mark.parametrize("command", ["plan", "compress", "add", "remove", "refit"])
def test_the_help_names_what_an_option_may_be_in_groups(command: str, capsys: Capture) -> None:
    told = told_by(capsys, command, "--help")
    for name in TYPES:
        flag, choices = flags_of(name)[-1], choices_of(name)
        assert not choices or f"{flag} " not in told or f"{flag} {{{','.join(choices)}}}: {shown(name).help}" in told
    assert "--device {auto,cpu,cuda}: where to compute" in told
    groups = [told.find(f"\u2500 {group} \u2500") for group in ("Arguments", "Options", "Where and how", "Hub")]
    assert -1 not in groups
    assert groups == sorted(groups)


def test_a_plan_of_refused_adapters_alone_has_no_table(tmp_path: Path, capsys: Capture) -> None:
    (folder,) = make_collection(tmp_path / "adapters", 1)
    os.truncate(Path(folder) / "adapter_model.safetensors", 500)
    assert main(["plan", folder]) == 1
    said = capsys.readouterr()
    assert said.out == "adapters  0, and 1 refused\n"
    assert "a00" in said.err


def test_every_setting_is_an_option_of_compress(capsys: Capture) -> None:
    told = told_by(capsys, "compress", "--help").replace("--[no-]", "--")
    assert all(flag in told for name in TYPES for flag in flags_of(name))


def test_a_shell_completes_commands_options_and_values() -> None:
    def complete(*words: str) -> list[str]:
        environment = os.environ | {
            "_LORASHARE_STREAM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("lorashare-stream", *words)),
            "COMP_CWORD": str(len(words)),
        }  # fmt: skip
        command = [sys.executable, "-m", "lorashare_stream"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert complete("re") == ["remove", "refit", "report", "reconstruct"]
    assert complete("compress", "x", "--dev") == ["--device"]
    assert complete("compress", "x", "--device", "c") == ["cpu", "cuda"]
    command = [sys.executable, "-m", "lorashare_stream", "--show-completion"]
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "SHELL": "/bin/bash"}
    script = subprocess.run([*command, "bash"], env=environment, capture_output=True, text=True, check=True).stdout
    assert "_LORASHARE_STREAM_COMPLETE=complete_bash" in script


def test_what_says_nothing_of_a_coded_checkpoint_is_told(
    tmp_path: Path, collection: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    note = "dtype says nothing of a coded checkpoint: its adapters come back in the dtypes of their sources"
    for form, told in (
        (["--max-error", 0.3, "--dtype", "float16"], True), (["--ratio", 2, "--dtype", "float16"], True),
        (["--max-error", 0.3], False), (["-k", 4, "--dtype", "float16"], False),
    ):  # fmt: skip
        caplog.clear()
        assert call("plan", *collection, *form) == 0
        assert (f"note: {note}" in capsys.readouterr().out) == told
        assert call("compress", *collection, "-o", tmp_path / "out", *form, "--overwrite", "-q") == 0
        assert (note in caplog.text) == told
    caplog.clear()
    SHAREModel.from_adapters([str(tmp_path / "adapters")], max_error=0.3, dtype="float16")
    assert note in caplog.text


def test_messages_in_python_name_arguments_and_those_of_the_command_line_options(
    tmp_path: Path, collection: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads(Path(collection[0], "adapter_config.json").read_text())
    Path(collection[0], "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "other"}))
    Path(collection[1], "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    caplog.set_level("WARNING")
    for arguments, flags in (({}, []), ({"on_error": "skip"}, ["--on-error", "skip"])):
        assert call("compress", *collection, "-o", tmp_path / "shell", "-k", 4, *flags) == (3 if flags else 1)
        shell = capsys.readouterr().err + caplog.text
        caplog.clear()
        with pytest.raises(CollectionError) if not flags else pytest.warns(UserWarning, match="left out") as caught:
            SHAREModel.from_adapters(collection, 4, output_dir=tmp_path / "python", **arguments)
        names = str(caught.value if not flags else caught[0].message) + caplog.text
        caplog.clear()
        assert all(flag in shell for flag in ("--base-alias", "--any-base"))
        assert "any_base=True" not in shell
        assert all(name in names for name in ("base_aliases", "any_base=True"))
        assert "--" not in names.replace("---", "")
    assert "--share-initial" in shell
    assert "share_initial=True" in names
    with pytest.raises(UsageError, match=r"^num_components cannot be 0"):
        Settings(num_components=0)
    with pytest.raises(BudgetError, match=r'Use memory="\d+MiB" or more'):
        SHAREModel.from_adapters(collection[2:], 4, memory="1MiB")


def test_json_of_a_failure(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    (Path(collection[0]) / "adapter_config.json").unlink()
    for command in (["plan", *collection], ["compress", *collection, "-o", tmp_path / "out"]):
        assert call(*command, "--json") == 1
        captured = capsys.readouterr()
        assert "a00" in json.dumps(json.loads(captured.out))
        assert "'a00'" in captured.err


def test_quiet_is_silent(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    assert call("compress", *collection, "-o", tmp_path / "out", "-k", 4, "-q") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress", "{c}", "-o", "{out}", "-k", "zero"], 2, "num_components"),
        (["compress", "{c}", "-o", "{out}", "--center"], 2, "factors"),
        (["compress", "{c}"], 2, "no output"),
        (["compress", "-o", "{out}"], 2, "no sources"),
        (["compress", "{c}", "-o", "/"], 2, "cannot be the current folder"),
        (["compress", "nowhere", "-o", "{out}"], 2, "no such source"),
        (["compress", "{c}", "-o", "{out}", "--config", "nowhere.yaml"], 2, "no such configuration"),
        (["compress", "{c}", "-o", "{out}", "--plan", "{c}"], 2, "both sources and --plan"),
        (["compress", "{c}", "-o", "{out}", "--names", "one", "two"], 2, "--names needs one name"),
        (["compress", "{c}", "-o", "{out}", "--memory", "1MiB"], 1, "smallest|at least"),
        (["info", "{c}"], 1, "no checkpoint"),
        (["info", "nowhere"], 1, "no checkpoint"),
        (["reconstruct", "{c}", "--all", "-o", "{out}"], 1, "no checkpoint"),
        (["verify", "nowhere"], 1, "no checkpoint"),
    ],
)
def test_exit_codes_of_errors(
    tmp_path: Path, collection: list[str], capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    filled = [a.format(c=tmp_path / "adapters", out=tmp_path / "out") for a in arguments]
    assert main(filled) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert any(part in captured.err for part in message.split("|")), captured.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [("fly", "No such command 'fly'"), ("compress --colour", "No such option: --colour"),
     ("compress --max", "No such option: --max"), ("info", "Missing argument 'CHECKPOINT'"),
     ("refit x", "Missing option '-o' / '--output'"), ("reconstruct x -o y", "no adapters"),
     ("compress x -o -k 4", "-o needs a value (found -k)"), ("compress x -o y --names", "--names needs a value"),
     ("compress x --workers few", "Invalid value for '--workers'"), ("info x y", "Got unexpected extra argument"),
     ("compress x -k 4 --max-error 0.1", "--max-error is not allowed with -k"), ("plan x -q -v", "is not allowed with"),
     ("reconstruct x -o y --all --adapter z", "is not allowed with"),
     ("push x a/b --private --public", "is not allowed with")],
)  # fmt: skip
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_words_that_cannot_be_meant_exit_with_2_and_say_where_help_is(
    words: str, problem: str, flags: list[str], capsys: Capture
) -> None:
    assert main([*words.split(), *flags]) == 2
    captured = capsys.readouterr()
    told, where = captured.err.splitlines()
    assert told.startswith("lorashare-stream: ")
    assert problem in told
    assert where == f"Try: lorashare-stream {words.replace('fly', '').split(' ')[0]} --help".replace("  ", " ")
    assert (json.loads(captured.out)["exit_code"] == 2) if flags else not captured.out


def test_no_command_exits_with_2(capsys: Capture) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "lorashare-stream: Missing command\nTry: lorashare-stream --help\n"


def test_options_that_take_all_words_that_follow(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out = tmp_path / "out"
    assert call("compress", "--names", "x", "y", "-k", 4, "-q", "-o", out, "--", *collection[:2]) == 0
    assert call("reconstruct", out, "--adapter", "x", "y", "--json", "-o", tmp_path / "rec") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reconstructed"].keys() == {"x", "y"}
    assert call("reconstruct", out, "--adapter", "x", "--adapter=y", "--json", "-o", tmp_path / "rec") == 0
    assert json.loads(capsys.readouterr().out)["reconstructed"].keys() == {"x", "y"}
    assert call("verify", out, "-q", "--sources", *collection[:2], "--workspace", tmp_path / "nothing") == 0


@pytest.mark.parametrize(("flags", "center"), [([], True), (["--no-center"], False), (["--center"], True)])
def test_a_switch_of_a_file_is_turned_off_by_its_option(
    tmp_path: Path, collection: list[str], capsys: Capture, flags: list[str], center: bool
) -> None:
    (tmp_path / "job.yaml").write_text("objective: factors\ncenter: true\n")
    assert call("plan", *collection, "--config", tmp_path / "job.yaml", "--json", *flags) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["center"] == center


def test_skipping_exits_with_3_and_lists_the_reasons(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    (Path(collection[0]) / "adapter_config.json").unlink()
    poisoned = {k: v * np.float32("nan") for k, v in load_tensors(collection[1]).items()}
    write_adapter(Path(collection[1]), poisoned, r=4, lora_alpha=8)
    command = ["compress", *collection, "-o", tmp_path / "out", "-k", 4, "--on-error", "skip"]
    assert call(*command, "--json") == 3
    captured = capsys.readouterr()
    assert [s["adapter"] for s in json.loads(captured.out)["skipped"]] == ["a00", "a01"]
    assert "left out 2 adapters" in captured.err
    assert "no adapter_config.json" in captured.err
    assert "not finite" in captured.err
    assert "left out" in (call("info", tmp_path / "out"), capsys.readouterr().out)[1]
    assert call(*command) == 3  # again, and nothing to do: the same answer
    assert call("plan", *collection, "--on-error", "skip") == 3


def test_a_plan_that_no_longer_holds_is_refused(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    plan = tmp_path / "plan.json"
    assert call("plan", *collection, "-k", 4, "-o", plan) == 0
    assert call("compress", "--plan", plan, "-k", 5, "-o", tmp_path / "out") == 2
    assert "no longer holds" in capsys.readouterr().err
    write_adapter(Path(collection[0]), load_tensors(collection[1]), r=4, lora_alpha=80)
    assert call("compress", "--plan", plan, "-o", tmp_path / "out") == 2
    plan.write_text("{}")
    assert call("compress", "--plan", plan, "-o", tmp_path / "out") == 2
    assert "is not what lorashare-stream writes (found nothing; expected a value)" in capsys.readouterr().err
    plan.write_text('{"format": 2}')
    assert call("compress", "--plan", plan, "-o", tmp_path / "out") == 2
    assert "was written by a newer version of lorashare-stream" in capsys.readouterr().err


def test_a_plan_remembers_what_it_left_out(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    (Path(collection[0]) / "adapter_config.json").unlink()
    assert call("plan", *collection, "-k", 4, "--on-error", "skip", "-o", tmp_path / "plan.json") == 3
    assert call("compress", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out") == 3
    assert json.loads((tmp_path / "out" / "skipped.json").read_text())[0]["adapter"] == "a00"
    capsys.readouterr()


def test_settings_from_yaml_and_flags_win(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        yaml.safe_dump({"sources": collection, "output": str(tmp_path / "out"), "num_components": 3, "memory": "1GiB"})
    )
    assert call("compress", "--config", config, "-q") == 0
    assert share_config(tmp_path / "out")["num_components"] == 3
    assert call("compress", "--config", config, "-q", "-k", 2) == 0
    assert share_config(tmp_path / "out")["num_components"] == 2
    config.write_text("colour: red\n")
    assert call("compress", *collection, "-o", tmp_path / "x", "--config", config) == 2
    assert "unknown setting" in capsys.readouterr().err


def test_the_base_model_by_flags_by_yaml_and_by_a_saved_plan(
    tmp_path: Path, collection: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in collection[:2]:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        Path(folder, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "mirror/tiny"}))
    out = tmp_path / "out"
    assert call("compress", *collection, "-o", out, "-k", 4) == 1
    text = capsys.readouterr().err
    assert "2 of 8 adapters" in text
    assert all(part in text for part in ("mirror/tiny", "tiny-base", "--base-alias", "--any-base"))
    assert not out.exists()

    assert call("plan", *collection, "-k", 4, "-o", tmp_path / "plan.json", "--base-alias", "x", "mirror/tiny") == 0
    assert "also named  mirror/tiny by 2 adapters" in capsys.readouterr().out
    assert call("compress", "--plan", tmp_path / "plan.json", "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["base_model_name_or_path"] == "tiny-base"

    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump({"base_model": "org/tiny", "base_aliases": ["mirror/tiny", "tiny-base"]})
    )
    assert call("compress", *collection, "-o", out, "-k", 4, "--config", tmp_path / "job.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["base_model_name_or_path"] == "org/tiny"

    assert call("compress", *collection, "-o", tmp_path / "any", "-k", 4, "--any-base") == 0
    assert "whatever base model they name, adapters are accepted: mirror/tiny by 2 adapters" in caplog.text


def test_what_is_kept_exact_is_told_and_the_flag_shares_it(
    tmp_path: Path, collection: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads(Path(collection[0], "adapter_config.json").read_text())
    Path(collection[0], "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert call("compress", *collection, "-o", tmp_path / "exact", "-k", 4) == 0
    captured = capsys.readouterr()
    assert "part of the base model (init_lora_weights pissa); --share-initial compresses such adapters" in caplog.text
    assert "in 1 adapter (a00)" in caplog.text
    assert "kept exact           1: a00" in captured.out
    assert "a00" in captured.out
    assert call("verify", tmp_path / "exact") == 0
    assert call("compress", *collection, "-o", tmp_path / "shared", "-k", 4, "--share-initial") == 0
    assert "kept exact" not in capsys.readouterr().out
    assert call("verify", tmp_path / "shared") == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_configuration_is_valid(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    Settings.from_mapping({k: v for k, v in values.items() if k not in ("sources", "output", "workspace")})


def test_the_published_method_has_an_example() -> None:
    values = yaml.safe_load((CONFIGS / "published_method.yaml").read_text())
    assert (values["objective"], values["center"], values["num_components"]) == ("factors", True, 32)


def test_spellings_of_lorashare(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out = tmp_path / "out"
    arguments = [*collection[:2], "--output", out, "--num-components", "auto", "--variance", 0.9, "--names", "x", "y"]
    assert call("compress", *arguments, "--device", "cpu", "--layer-by-layer", "--chunk-size", 10) == 0
    assert share_config(out)["adapter_names"] == ["x", "y"]
    assert share_config(out)["variance_threshold"] == 0.9
    capsys.readouterr()


def test_overwrite_replaces_the_checkpoint_of_another_run(
    tmp_path: Path, collection: list[str], capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert call("compress", *collection, "-o", out, "-k", 4, "-q") == 0
    other = ["compress", *collection[:4], "-o", out, "-k", 2, "-q", "--workspace", tmp_path / "elsewhere"]
    assert call(*other) == 2
    assert call(*other, "--overwrite") == 0
    assert share_config(out)["num_adapters"] == 4
    capsys.readouterr()


def test_verify_fails_for_what_is_not_as_certified(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out = tmp_path / "out"
    assert call("compress", *collection, "-o", out, "-k", 4, "-q") == 0
    assert call("verify", out, "--sources", *collection[1:], "-q") == 1
    assert "FAILED adapter 'a00': its original is not among the sources" in capsys.readouterr().err
    tensors = load_tensors(collection[0])
    write_adapter(
        Path(collection[0]), tensors | {k: v * 1.1 for k, v in tensors.items() if "lora_B" in k}, r=4, lora_alpha=8
    )
    head = {"base_model.model.head.weight": np.zeros((3, 5), np.float32)}
    write_adapter(Path(collection[1]), load_tensors(collection[1]) | head, r=4, lora_alpha=8)
    assert call("verify", out, "--json", "-q") == 1
    captured = capsys.readouterr()
    problems = {a["name"]: a["problem"] for a in json.loads(captured.out)["adapters"] if a["problem"]}
    assert problems.keys() == {"a00", "a01"}
    assert all("not the one that was compressed" in text for text in problems.values())


def test_verify_says_where_moved_originals_are_named(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    assert call("compress", *collection, "-o", out, "-k", 6, "-q") == 0
    Path(collection[0]).parent.rename(moved)
    assert call("verify", out, "-q") == 1
    said = capsys.readouterr().err
    assert "its original is no longer where it was (found " in said
    assert "Name the folder where the originals are now by --sources" in said
    assert call("verify", out, "-q", "--sources", moved) == 0


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("part", ["loadings", "classifier_head"])
def test_verify_fails_for_a_checkpoint_that_was_changed(
    tmp_path: Path, collection: list[str], capsys: Capture, part: str, digest: bool
) -> None:
    """By the digest of the file, or, where the record has none, by what comes back."""
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "out"
    assert call("compress", *collection, "-o", out, "-k", 4, "-q") == 0
    path = out / "adapters" / "a02" / f"{part}.safetensors"
    save_file({k: v * np.float32(1.1) for k, v in load_file(path).items()}, path)
    if not digest:
        record = json.loads(path.with_name("adapter_meta.json").read_text())
        record["lorashare_stream"]["files"] = {}
        path.with_name("adapter_meta.json").write_text(json.dumps(record))
    assert call("verify", out, "-q") == 1
    message = ": the checkpoint claims a relative error that it does not have (found "
    if part == "classifier_head":
        message = ", key 'base_model.model.head.weight': a tensor that is kept verbatim differs from the original"
    if digest:
        message = f": {part}.safetensors is damaged. Take the adapter out"
        assert call("reconstruct", out, "--adapter", "a02", "-o", tmp_path / "back", "-q") == 1
    assert f"FAILED adapter 'a02'{message}" in capsys.readouterr().err
    assert call("reconstruct", out, "--adapter", "a01", "-o", tmp_path / "a01", "-q") == 0


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(errno.ENOSPC, 75, "No space left"), (errno.EROFS, 1, "Read-only"), (errno.EACCES, 1, "Permission denied"),
     (errno.EMFILE, 1, "Too many open files")],
)  # fmt: skip
def test_faults_of_the_machine_are_one_sentence(
    tmp_path: Path,
    collection: list[str],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    message: str,
) -> None:
    calls = []
    original = momentstore.save

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(number, os.strerror(number), "/some/where")
        return original(*arguments)

    monkeypatch.setattr(momentstore, "save", fail)
    command = ["compress", *collection, "-o", tmp_path / "out", "-k", 4, "-q"]
    assert call(*command) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "kept" in line
    monkeypatch.undo()
    assert call(*command) == 0


@pytest.mark.few(2)
@pytest.mark.parametrize("limit", ["NOFILE", "FSIZE"])
def test_limits_of_the_process_are_one_sentence_and_nothing_is_lost(
    tmp_path: Path, collection: list[str], limit: str
) -> None:
    command = [sys.executable, "-m", "lorashare_stream", "compress", *collection, "-q", "--device", "cpu", "-k", "4"]
    command += ["--workers", "1"]  # a process more takes other files
    for most in (19, 18, 17) if limit == "NOFILE" else (5000,):  # how many are open at a time depends on who is faster
        code = f"""
import resource, sys
from lorashare_stream.cli import app as cli, commands
resource.setrlimit(resource.RLIMIT_{limit}, ({most},) * 2)
sys.exit(cli.main({[*command[3:], "-o", str(tmp_path / "out")]!r}))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            break
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.workspace")
    assert done.returncode == (1 if limit == "NOFILE" else 75), done.stderr
    (line,) = done.stderr.splitlines()
    assert ("Too many open files" if limit == "NOFILE" else "File too large") in line
    assert "kept" in line
    assert (tmp_path / "out.workspace" / "journal.jsonl").exists()
    for out in ("out", "whole"):
        assert call(*command[3:], "-o", tmp_path / out) == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


class Child:
    """The real command in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "lorashare_stream", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[list[object]]:
    """A command that runs for a second or more."""
    make_collection(tmp_path / "adapters", 100, {f"layers.{i}.q": (256, 256) for i in range(8)})
    return [tmp_path / "adapters", "-o", tmp_path / "out", "-k", 4, "--device", "cpu"]


@pytest.mark.few(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_within_seconds_says_how_to_resume_and_exits_with_75(
    tmp_path: Path, slow: list[object], number: signal.Signals
) -> None:
    child = Child("compress", *slow)
    journal = tmp_path / "out.workspace" / "journal.jsonl"
    while not (journal.exists() and journal.stat().st_size) and child.process.poll() is None:
        time.sleep(0.005)
    child.process.send_signal(number)
    begun = time.monotonic()
    code, out, err = child.finish()
    assert (code, out) == (75, "")
    assert time.monotonic() - begun < 60
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    code, _, err = Child("compress", *slow).finish()
    assert code == 0, err
    assert call("compress", *slow[:1], "-o", tmp_path / "whole", *slow[3:], "-q") == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


@pytest.mark.few(3)
@pytest.mark.parametrize("command", ["verify {out} -q", "compress --help", "--help"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, collection: list[str], command: str) -> None:
    assert call("compress", *collection, "-o", tmp_path / "out", "-k", 4, "-q") == 0
    words = f"{sys.executable} -m lorashare_stream {command.format(out=tmp_path / 'out')}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} | true"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.few(2)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_log_that_nobody_reads_does_not_stop_the_work(tmp_path: Path, slow: list[object], unbuffered: str) -> None:
    command = [sys.executable, "-m", "lorashare_stream", "compress", *map(str, slow)]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        process.stderr.close()
        assert process.stdout.read().startswith(b"base model")
    assert process.returncode == 0
    assert (tmp_path / "out" / "share_config.json").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_signal_is_told_by_the_exit_code_even_if_nobody_reads(
    tmp_path: Path, slow: list[object], stream: str
) -> None:
    command = [sys.executable, "-m", "lorashare_stream", "compress", *map(str, slow), "-q", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        getattr(process, stream).close()
        journal = tmp_path / "out.workspace" / "journal.jsonl"
        while not (journal.exists() and journal.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert not (tmp_path / "out.workspace" / "holder.json").exists()


@pytest.mark.parametrize("limit", ["-k 8", "--max-error 0.3"])
def test_names_that_the_encoding_of_stdout_cannot_hold_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """A batch job has another locale than the login shell: the work is done, and the names are shown all the same."""
    folders = make_collection(tmp_path / "adapters", 2)
    Path(folders[0]).rename(tmp_path / "adapters" / "M\u00fcller \u5ba2\u6237 \U0001f600")
    out = tmp_path / "out"
    for command in (
        ["compress", tmp_path / "adapters", "-o", out, *limit.split()],
        ["verify", out],
        ["info", out],
        ["report", out, "-o", tmp_path / "r\u5ba2.html"],
        ["remove", out, "M\u00fcller \u5ba2\u6237 \U0001f600"],
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert call(*command) == 0
        written = sys.stdout.buffer.getvalue()
        assert (b"\\u5ba2\\u6237 \\U0001f600" if command[0] != "report" else b"r\\u5ba2.html") in written


def test_a_summary_in_python_is_escaped_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((checkpoint / "share_config.json").read_text())
    config["base_model_name_or_path"] = "M\u00fcller"
    (checkpoint / "share_config.json").write_text(json.dumps(config))
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    SHAREModel.from_pretrained(checkpoint).summary()
    written.flush()
    assert b"base model           M\\xfcller" in written.buffer.getvalue()


def test_a_name_that_no_file_can_have_under_the_locale_is_refused_in_a_sentence(
    tmp_path: Path, collection: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsencode(name: str | os.PathLike[str]) -> bytes:
        return os.fspath(name).encode("ascii")

    manifest = tmp_path / "list.jsonl"
    manifest.write_text("".join(json.dumps({"name": f"\u5ba2{i}", "path": p}) + "\n" for i, p in enumerate(collection)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsencode", fsencode)
        assert call("compress", manifest, "-o", tmp_path / "out", "-k", 4) == 2
        assert "no file can have it under this locale" in capsys.readouterr().err
        patched.setattr(commands, "place_of", lambda *_, **__: fsencode("\u5ba2"))
        assert call("info", tmp_path / "out") == 1
        assert "expected characters of ascii" in capsys.readouterr().err
    assert call("compress", manifest, "-o", tmp_path / "out", "-k", 4) == 0


def test_a_user_without_a_home_is_told_where_the_hub_needs_one(
    tmp_path: Path, checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert call("report", checkpoint, "-o", tmp_path / "r.html") == 0
    assert call("verify", checkpoint, "-q") == 0
    assert call("info", checkpoint) == 0
    capsys.readouterr()
    for command in (["plan", "org/name", "--offline"], ["push", checkpoint, "org/name"], ["info", "org/name"]):
        assert call(*command) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "this user has no home folder (found ~/.cache/huggingface/hub). Set HF_HOME" in captured.err


def test_bytes_that_are_not_utf_8_in_names_of_files(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    """They are names like others, also of checkpoints, and reconstructions are known as such."""
    odd = os.fsdecode(b"caf\xe9")
    Path(collection[0]).rename(tmp_path / "adapters" / odd)
    for limit in (["-k", 4], ["--max-error", 0.3]):
        out, rec = tmp_path / f"{limit[0]}{odd}", tmp_path / f"rec{limit[0]}{odd}"
        assert call("compress", tmp_path / "adapters", "-o", out, *limit, "-q") == 0
        assert call("verify", out) == 0
        assert call("report", out, "-o", tmp_path / f"{odd}.html") == 0
        assert call("reconstruct", out, "--all", "-o", rec) == 0
        assert call("reconstruct", out, "--all", "-o", rec) == 0
        assert len(list(rec.iterdir())) == 8
        assert "caf_-" in capsys.readouterr().out


def test_a_locale_that_is_not_utf_8_is_told(checkpoint: Path) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "lorashare_stream", "info", str(checkpoint), "-q"]
    for setting, told in ((env, True), ({**env, "PYTHONUTF8": "1"}, False)):
        done = subprocess.run(command, env=setting, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0
        assert ("names of files in ascii" in done.stderr) is told


@pytest.mark.few(5)
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "2>/dev/full"])
def test_closed_streams_and_a_full_log_keep_nobody_from_the_work(
    tmp_path: Path, collection: list[str], closed: str
) -> None:
    command = f"{sys.executable} -m lorashare_stream compress {tmp_path}/adapters -o {tmp_path}/out -k 4 --json"
    done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if "1>" not in closed:
        assert json.loads(done.stdout)["checkpoint"] == str(tmp_path / "out")
    assert call("verify", tmp_path / "out", "-q") == 0


@pytest.mark.few(3)
@pytest.mark.parametrize("flags", [[], ["--json"], ["--help"]])
def test_a_full_disk_under_stdout_is_told_in_a_sentence(checkpoint: Path, flags: list[str]) -> None:
    with open("/dev/full", "w") as full:
        words = [
            sys.executable,
            "-m",
            "lorashare_stream",
            *(["info", str(checkpoint)] if flags != ["--help"] else []),
            *flags,
        ]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 75
    assert done.stderr.startswith("lorashare-stream: No space left on device. ")
    assert done.stderr.count("\n") == 1


def test_progress_lines_tell_rate_and_time_left(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    assert list(output.lines("ingest", 6, iter("abcdef"))) == list("abcdef")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ingest: 2 of 6 adapters, 0.10/s, 0:40 left"
    assert lines[-1] == "ingest: 6 adapters in 1:10"


class Terminal(io.StringIO):
    """A terminal, which is gone if it says so."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(text)


@pytest.mark.parametrize("gone", [False, True])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    terminal = Terminal()
    terminal.gone = gone
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert progress_of({}) is output.bars
    assert progress_of({"quiet": True}) is silent
    for result in progress_of({})("fit", 3, iter("abc")):
        say(f"a note on [red]{result}[/]")
    if gone:
        return
    shown = terminal.getvalue()
    assert "3/3 modules" in shown
    assert "/s" in shown
    assert "left" in shown
    assert "a note on [red]b[/]\n" in shown  # a name is no markup
    assert "\x1b[?25l" not in shown  # a process that is killed leaves no terminal without a cursor
    assert sys.stderr is terminal
    monkeypatch.setenv("TERM", "dumb")
    assert progress_of({}) is output.lines


@pytest.mark.parametrize("rows", [3, 2000])
def test_a_table_is_as_wide_as_the_terminal_and_its_names_are_no_markup(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    name = "[red]customer[/] " + "x" * 60
    table = [(name, "0.100000", "evil\x1b[2J")] * rows
    plain = table_text(table, ("adapter", "dW error", "in module"))
    assert plain.splitlines()[1].startswith(name)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = table_text(table, ("adapter", "dW error", "in module"))
    if rows > 1000:
        assert drawn == plain
        return
    seen = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert seen.replace("\n", "").isprintable()
    assert all(len(line) <= 50 for line in seen.splitlines())
    assert "[red]customer[/]" in seen
    assert seen.count("0.100000") == rows


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lorashare-stream ")
