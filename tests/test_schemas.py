"""Files of JSON: what older versions wrote is read, what newer ones wrote is told, and what is not known is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream import SHAREModel
from lorashare_stream.checkpoint.config import SHAREConfig
from lorashare_stream.checkpoint.format import OURS
from lorashare_stream.checkpoint.records import AdapterMeta
from lorashare_stream.cli.app import main
from lorashare_stream.errors import CheckpointError, WorkspaceError
from lorashare_stream.files import read_sealed, sealed, unsealed, write_sealed
from lorashare_stream.plan.file import PlanFile
from lorashare_stream.schema import Skipped
from lorashare_stream.workspace.journal import read_journal
from lorashare_stream.workspace.workspace import COPY, Workspace

Capture = pytest.CaptureFixture[str]
OLDER = json.loads(Path(__file__).with_name("older.json").read_text())  # written before there were schemas


def changed(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what is ours in a share_config.json and in every adapter_meta.json."""
    path = checkpoint / "share_config.json"
    config = json.loads(path.read_text())
    change(config["compression_stats"][OURS])
    path.write_text(json.dumps(config))
    for meta in checkpoint.glob("adapters/*/adapter_meta.json"):
        values = unsealed(json.loads(meta.read_text()))
        assert values is not None
        change(values[OURS])
        meta.write_text(json.dumps(sealed(values)))


@pytest.mark.parametrize("form", ["share", "coded"])
def test_a_record_of_an_older_version_says_the_same(form: str) -> None:
    record = SHAREConfig(compression_stats={OURS: OLDER[form]}).record
    assert record is not None
    assert (record.format, OLDER[form].get("format")) == (1, None)
    assert (
        record.model_dump().items() >= {k: v for k, v in OLDER[form].items() if k not in ("errors", "settings")}.items()
    )
    assert record.model_dump()["settings"].items() >= OLDER[form]["settings"].items()
    assert record.errors.model_dump(exclude_none=True) == OLDER[form]["errors"]


def test_an_adapter_and_those_that_were_left_out_of_an_older_version_say_the_same(tmp_path: Path) -> None:
    assert AdapterMeta(**OLDER["meta"]).plain() == OLDER["meta"]
    assert [Skipped(**item).model_dump(exclude_none=True) for item in OLDER["skipped"]] == OLDER["skipped"]
    lines = [sealed({k: v for k, v in line.items() if k != "checksum"}) for line in OLDER["journal"]]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal, whole = read_journal(tmp_path / "journal.jsonl")
    assert [type(entry).__name__ for entry in journal.entries] == ["Admission", "Removal"]
    assert whole == (tmp_path / "journal.jsonl").stat().st_size


def test_a_checkpoint_of_an_older_version_is_read_and_changed(checkpoint: Path, tmp_path: Path) -> None:
    changed(checkpoint, lambda ours: ours.pop("format"))
    for command in (
        ["info", "OUT"], ["verify", "OUT", "-q"], ["reconstruct", "OUT", "--all", "-o", str(tmp_path / "r"), "-q"],
        ["remove", "OUT", "a00", "-q"], ["refit", "OUT", "-k", "3", "-o", "OUT", "-q"], ["verify", "OUT", "-q"],
    ):  # fmt: skip
        assert main([str(checkpoint) if word == "OUT" else word for word in command]) == 0


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    made, out = tmp_path / "made.json", tmp_path / "out"
    assert main(["plan", *collection, "-k", "4", "--on-error", "skip", "-o", str(made)]) == 0
    assert main(["compress", "--plan", str(made), "-o", str(out), "-q"]) == 0
    capsys.readouterr()
    assert main(["plan", *collection, "--max-bytes", "900", "--json"]) == 1
    for text in (made.read_text(), (tmp_path / "out.workspace" / "plan.json").read_text(), capsys.readouterr().out):
        written = json.loads(text)
        file = PlanFile.model_validate(written)
        assert file.model_dump(exclude_unset=True) == written
        assert [adapter.source().id for adapter in file.adapters] == [os.path.realpath(folder) for folder in collection]
    shutil.rmtree(out)
    assert main(["compress", "--plan", str(tmp_path / "out.workspace" / "plan.json"), "-o", str(out), "-q"]) == 0


@pytest.mark.parametrize("file", ["config", "meta"])
def test_what_a_newer_version_wrote_is_told(checkpoint: Path, file: str) -> None:
    path = checkpoint / "share_config.json"
    kept = path.read_bytes()
    changed(checkpoint, lambda ours: ours.update(format=2, later=True))
    if file == "meta":
        path.write_bytes(kept)
    with pytest.raises(CheckpointError, match=r"written by a newer version of lorashare-stream.*expected 1.*upgrade"):
        SHAREModel.from_pretrained(checkpoint).reconstruct("a00")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 4}, r"written by a newer version.*found 4; expected 3.*upgrade"),
        ({"format": 2}, r"written by an older version.*found 2; expected 3.*delete this one"),
        ({"colour": 1}, r"key 'colour'.*not what lorashare-stream writes .found 1; expected no field of this name"),
        ({"quantum": "1024"}, r"key 'quantum'.*not what lorashare-stream writes .found 1024; expected a valid integer"),
    ],
)
def test_a_workspace_that_this_version_did_not_write_is_told(
    checkpoint: Path, change: dict[str, Any], told: str
) -> None:
    root = checkpoint.with_name("out.workspace")
    for name in ("workspace.json", COPY):
        write_sealed(root / name, read_sealed(root / name) | change)
    with pytest.raises(WorkspaceError, match=told), Workspace.open(root, read_sealed(root / COPY)):
        pass


@pytest.mark.parametrize("folder", ["markers", "bases", "shapes"])
def test_an_unknown_field_in_a_workspace_is_damage_which_is_mended(checkpoint: Path, folder: str) -> None:
    root, out = checkpoint.with_name("out.workspace"), str(checkpoint)
    before = {path: read_sealed(path) for path in (root / folder).rglob("*.json")}
    assert before
    for path, values in before.items():
        write_sealed(path, values | {"colour": 1})
    assert main(["refit", out, "-k", "8", "-o", out, "-q", "--device", "cpu"]) == 0
    assert main(["verify", out, "-q"]) == 0
    assert not any("colour" in read_sealed(path) for path in (root / folder).rglob("*.json"))


def test_what_is_not_known_is_named(checkpoint: Path) -> None:
    changed(checkpoint, lambda ours: ours.update({"col\u202eour": 1}))
    with pytest.raises(CheckpointError, match=r"key 'col.+u202eour'.*found 1; expected no field of this name"):
        SHAREModel.from_pretrained(checkpoint)
