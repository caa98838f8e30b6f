"""What reviewers and new users broke once, and may not break again."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorashare_stream import SHAREConfig, SHAREModel
from lorashare_stream.cli.app import main
from lorashare_stream.errors import CheckpointError, CollectionError, StreamError, UsageError
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import factor_keys, load_tensors, make_collection, make_tensors, tree_digest, write_adapter
from .tiers import some_fast

Compress = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
A, B = factor_keys("layers.0.q")


def call(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("alpha", [0, -8, 16.5])
def test_alphas_that_peft_takes_are_taken(tmp_path: Path, compressed: Compress, alpha: float) -> None:
    rng = np.random.default_rng(0)
    folders = [
        write_adapter(tmp_path / f"a{i}", make_tensors(rng, {"q": (16, 12)}), lora_alpha=alpha) for i in range(4)
    ]
    share = SHAREModel.from_pretrained(compressed(folders, num_components=16))
    assert share.config.lora_alpha == alpha
    assert share.config.ours["errors"]["max"] < 1e-5
    share.summary()


@pytest.mark.parametrize("objective", ["delta", "factors"])
@pytest.mark.parametrize(("a", "b"), [(1e-40, 1), (1e-20, 1e-20), (1e10, 1e-20), (1e-25, 1e-25), (1e11, 1e11)])
def test_extreme_magnitudes(tmp_path: Path, compressed: Compress, objective: str, a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    folders = []
    for i in range(12):
        tensors = make_tensors(rng, {"q": (16, 12)})
        if i == 0:
            tensors = {
                k: (v.astype(np.float64) * (a if "_A." in k else b)).astype(np.float32) for k, v in tensors.items()
            }
        folders.append(str(write_adapter(tmp_path / f"a{i:02}", tensors)))
    out = compressed(folders, num_components=16, objective=objective)
    assert np.isfinite(
        json.loads((out / "share_config.json").read_text())["compression_stats"]["mean_explained_variance"]
    )
    whole = SHAREModel.from_pretrained(out)
    if objective == "delta":  # equal strength: no adapter is lost for its size
        assert all(whole.certified(n)["relative_error"] < (0.2 if a == 1e-40 else 1e-4) for n in whole.adapter_names)


def test_a_collection_of_tiny_factors_does_not_fail(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    folders = []
    for i in range(8):
        tensors = {k: (v * np.float32(1e-25)) for k, v in make_tensors(rng, {"q": (16, 12)}).items()}
        folders.append(str(write_adapter(tmp_path / f"a{i:02}", tensors)))
    for objective in ("delta", "factors"):
        compressed(folders, objective, num_components=4, objective=objective)


def test_values_beyond_what_a_moment_holds_are_refused(collection: list[str], compressed: Compress) -> None:
    path = Path(collection[0]) / "adapter_model.safetensors"
    save_file(load_file(path) | {A: np.full((4, 40), 1e20, np.float32)}, path)
    with pytest.raises(CollectionError, match=r"larger than a moment can hold .found 1e\+20"):
        compressed(collection)


def test_the_base_model_is_settled_before_shapes(tmp_path: Path) -> None:
    """Adapters of another base, however many, do not outvote those of the right one on a shape."""
    rng = np.random.default_rng(0)
    for i in range(5):
        modules = {"q": (16, 24), **({"m": (16, 24)} if i == 0 else {})}
        write_adapter(tmp_path / f"x{i}", make_tensors(rng, modules))
    for i in range(4):
        write_adapter(
            tmp_path / f"y{i}", make_tensors(rng, {"q": (16, 24), "m": (32, 24)}), base_model_name_or_path="z"
        )
    plan = plan_for(resolve([tmp_path]), Settings())
    assert [e.name for e in plan.adapters] == [f"x{i}" for i in range(5)]
    assert {e.adapter for e in plan.refused} == {f"y{i}" for i in range(4)}
    assert all(e.source == str(tmp_path / str(e.adapter)) for e in plan.refused)


@pytest.mark.parametrize(
    "text",
    [
        "output: [a]",
        "output: 5",
        "workspace: [x]",
        "overwrite: 'no'",
        "workers: '2'",
        "num_components: {a: 1}",
        "- 1",
        "sources: 3",
    ],
)
def test_configurations_of_wrong_types(tmp_path: Path, collection: list[str], capsys: Capture, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    flags = [] if "output" in text else ["-o", tmp_path / "out"]
    given = [] if "sources" in text else collection
    assert call("compress", *given, *flags, "--config", path) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_configuration_that_is_not_utf8(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    (tmp_path / "c.yaml").write_bytes(b"sources: [\xe9]")
    assert call("compress", "--config", tmp_path / "c.yaml", "-o", tmp_path / "out") == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("k", ["²", "1" * 5000, "-1", "1e3"])
def test_numbers_of_components_that_int_chokes_on(collection: list[str], capsys: Capture, k: str) -> None:
    assert call("plan", *collection, f"-k={k}") == 2
    assert call("plan", *collection, "--memory", "1" * 400) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_manifest_that_holds_itself_many_times_over(tmp_path: Path, capsys: Capture) -> None:
    lines = ["- &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"- &a{i + 1} [{','.join([f'*a{i}'] * 9)}]" for i in range(12)]  # 9^12 leaves, if written out
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    assert call("plan", tmp_path / "bomb.yaml") == 2
    (tmp_path / "c.yaml").write_text("colour:\n" + "\n".join("  " + line for line in lines) + "\nworkers: *a12\n")
    assert call("plan", "--config", tmp_path / "c.yaml") == 2
    assert len(capsys.readouterr().err) < 5000


def test_arguments_are_shown_escaped(collection: list[str], capsys: Capture) -> None:
    assert call("plan", *collection, "--bo\x1b[31mgus") == 2
    assert "\x1b" not in capsys.readouterr().err


STATE = ["workspace.json", "published.json", "plan.json", "skipped.json", "journal.jsonl", "marker"]
OTHER = ["[]", "{}", "{bad", "", "null", '{"lease": 0, "entries": "x", "admitted": 1}']


@pytest.mark.parametrize(
    ("name", "content"),
    [case for i, name in enumerate(STATE) for case in some_fast([(name, text) for text in OTHER], len(OTHER), i)],
)
def test_state_that_something_else_has_written(
    tmp_path: Path, collection: list[str], capsys: Capture, name: str, content: str
) -> None:
    command = ["compress", *collection, "-o", tmp_path / "out", "-q"]
    assert call(*command, "-k", 4) == 0
    root = tmp_path / "out.workspace"
    path = next((root / "markers").glob("*.json")) if name == "marker" else root / name
    path.write_text(content)
    verified = call("verify", tmp_path / "out", "-q")
    assert verified == (1 if name == "journal.jsonl" else 0)  # which tells where the originals are
    code = call(*command, "-k", 3)
    assert code == (2 if name == "published.json" else 0)
    assert "Traceback" not in capsys.readouterr().err
    if code == 0:
        assert call(*command[:-2], tmp_path / "fresh", "-q", "-k", 3) == 0
        assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


@pytest.mark.parametrize(
    "field", [("lorashare_stream", [1]), ("relative_error", "0.1"), ("relative_error", {}), ("original_config", [1])]
)
def test_an_adapter_meta_of_wrong_types(
    tmp_path: Path, checkpoint: Path, capsys: Capture, field: tuple[str, Any]
) -> None:
    path = checkpoint / "adapters" / "a00" / "adapter_meta.json"
    meta = json.loads(path.read_text())
    (meta["lorashare_stream"] if field[0] == "relative_error" else meta)[field[0]] = field[1]
    path.write_text(json.dumps(meta))
    for command in (
        ["verify", checkpoint, "-q"],
        ["reconstruct", checkpoint, "--all", "-o", tmp_path / "r", "-q"],
    ):
        call(*command)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["compression_stats"]["lorashare_stream"]["bytes"].update(originals=10**320),
        lambda c: c["compression_stats"]["lorashare_stream"].update(bytes=[1]),
        lambda c: c["compression_stats"].update(mean_explained_variance=10**400),
        lambda c: c["compression_stats"].update(lorashare_stream={"errors": 1}),
        lambda c: c.update(adapter_names=[["x"]]),
        lambda c: c.clear(),
        lambda c: c.update(layer_keys="x"),
    ],
)
def test_a_share_config_of_wrong_values(checkpoint: Path, capsys: Capture, change: Callable[[Any], None]) -> None:
    path = checkpoint / "share_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert call("info", checkpoint) in (0, 1)
    call("info", checkpoint, "--json")
    call("verify", checkpoint, "-q")
    assert "Traceback" not in capsys.readouterr().err


def test_json_holds_no_infinity(checkpoint: Path, capsys: Capture) -> None:
    path = checkpoint / "share_config.json"
    config = json.loads(path.read_text())
    config["compression_stats"]["min_explained_variance"] = float("inf")
    path.write_text(json.dumps(config))
    capsys.readouterr()
    call("info", checkpoint, "--json")
    assert json.loads(capsys.readouterr().out)["min_explained_variance"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["adapters"][0].update(name=5), "adapters.0.name'.*found 5; expected a valid string"),
        (lambda p: p["adapters"][0].update(name="../x"), "adapters.0'.*expected a name of one path component"),
        (lambda p: p["adapters"][0].update(source_id=None), "adapters.0.source_id'.*found None"),
        (lambda p: p["adapters"][0].update(path="\0"), "adapters.0'.*a path without NUL"),
        (lambda p: p["adapters"][0].update(asked="org/a"), "adapters.0'.*a path, or an id of the Hub that is pinned"),
        (lambda p: p["adapters"][0].pop("path"), "adapters.0'.*a path, or an id of the Hub that is pinned"),
        (lambda p: p.update(settings={"bogus": 1}), "unknown setting.*bogus"),
        (lambda p: p.update(adapters=3), "adapters'.*found 3; expected a valid list"),
        (lambda p: p.update(refused=[3]), "refused.0'"),
        (lambda p: p.update(colour=1), "colour'.*expected no field of this name"),
        (lambda p: p.clear(), "fingerprint'.*found nothing; expected a value"),
    ],
)
def test_a_plan_of_wrong_types(
    tmp_path: Path, collection: list[str], capsys: Capture, change: Callable[[Any], None], message: str
) -> None:
    path = tmp_path / "plan.json"
    assert call("plan", *collection, "-o", path, "-q") == 0
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    assert call("compress", "--plan", path, "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert "Traceback" not in told


def test_a_temporary_file_of_a_killed_run_does_not_reach_the_checkpoint(
    tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(resolve(collection), Settings(num_components=4, device="cpu"))
    monkeypatch.setattr("lorashare_stream.pipeline.write_bases", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(plan, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / ".out.staging" / ".0123.tmp").write_bytes(b"half")
    compress(plan, tmp_path / "out")
    compress(plan, tmp_path / "whole")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_a_checkpoint_that_lost_an_adapter_is_made_whole_and_strangers_in_it_are_kept(
    tmp_path: Path, collection: list[str], compressed: Compress
) -> None:
    out = compressed(collection, num_components=4)
    before = tree_digest(out)
    shutil.rmtree(out / "adapters" / "a01")
    (out / "README.md").write_text("mine")
    (out / "notes").mkdir()
    (out / "notes" / "x").write_text("mine too")
    compressed(collection, num_components=4)
    assert tree_digest(out) == before | {k: v for k, v in tree_digest(out).items() if k in ("README.md", "notes/x")}
    assert (out / "notes" / "x").read_text() == "mine too"


def test_a_refused_output_leaves_no_workspace_behind(
    tmp_path: Path, collection: list[str], compressed: Compress
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("x")
    with pytest.raises(UsageError, match="no checkpoint"):
        compressed(collection)
    assert not default_workspace(tmp_path / "out").exists()


def test_saving_beside_other_files_and_into_the_current_folder(
    tmp_path: Path, collection: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = SHAREModel.from_pretrained(compressed(collection, num_components=4))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    monkeypatch.chdir(tmp_path / "mine")
    share.save_pretrained(".")
    assert len(SHAREModel.from_pretrained(".").adapter_names) == 8
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    (tmp_path / "other" / "adapters").mkdir(parents=True)
    with pytest.raises(UsageError, match="of something else"):
        share.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="current folder"):
        compressed(collection, name="mine")


def test_the_types_of_lorashare_where_something_is_missing(tmp_path: Path, collection: list[str]) -> None:
    with pytest.raises(FileNotFoundError):
        SHAREModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        SHAREModel.from_adapters([*collection, str(tmp_path / "nothing")])
    (Path(collection[0]) / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        SHAREModel.from_adapters(collection)
    assert SHAREConfig().num_components == 32


@pytest.mark.parametrize("kind", ["list", "mapping", "manifest"])
def test_sources_that_are_gone_are_skipped_too(tmp_path: Path, collection: list[str], kind: str) -> None:
    gone = str(tmp_path / "gone")
    manifest = tmp_path / "list.txt"
    manifest.write_text("\n".join([*collection, gone]))
    sources: Any = {
        "list": [*collection, gone],
        "mapping": {Path(p).name: p for p in [*collection, gone]},
        "manifest": [str(manifest)],
    }[kind]
    with pytest.raises(FileNotFoundError, match="gone"):
        SHAREModel.from_adapters(sources)
    with pytest.warns(UserWarning, match="left out: gone"):
        share = SHAREModel.from_adapters(sources, 4, on_error="skip")
    assert len(share.adapter_names) == 8


def test_what_lorashare_saved_again_can_be_opened(tmp_path: Path, collection: list[str], compressed: Compress) -> None:
    import lorashare

    out = compressed(collection, num_components=4)
    lorashare.SHAREModel.from_pretrained(out).save_pretrained(tmp_path / "again")
    ours, again = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(tmp_path / "again")
    assert all((again.reconstruct("a00")[k] == v).all() for k, v in ours.reconstruct("a00").items())


def test_comparing_with_the_wrong_original(tmp_path: Path, collection: list[str], compressed: Compress) -> None:
    share = SHAREModel.from_pretrained(compressed(collection, num_components=4))
    other = make_collection(tmp_path / "other", 1, r=2)
    with pytest.raises(UsageError, match="another shape"):
        share.reconstruction_error("a00", original_path=other[0])
    with pytest.raises(FileNotFoundError, match="no such adapter folder"):
        share.reconstruction_error("a00", original_path="nowhere")
    with pytest.raises(UsageError, match="original_path"):
        share.reconstruction_error("a00", collection[0])
    assert repr(share) == "SHAREModel(8 adapters of 'tiny-base', k=4)"
    assert issubclass(CheckpointError, StreamError)


def test_unrelated_adapters_are_called_so(tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    shapes = {"base_model.model.q.lora_A.weight": (4, 128), "base_model.model.q.lora_B.weight": (128, 4)}
    for i in range(40):
        write_adapter(
            tmp_path / "a" / f"{i}", {k: rng.standard_normal(n).astype(np.float32) for k, n in shapes.items()}
        )
    assert call("compress", tmp_path / "a", "-o", tmp_path / "out", "-k", 8, "-q") == 0
    assert "share little" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "out")


def test_a_default_workspace_that_is_a_link_is_refused_and_a_named_one_is_followed(
    tmp_path: Path, collection: list[str], compressed: Compress
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out.workspace").symlink_to(tmp_path / "scratch")
    with pytest.raises(UsageError, match="through a link"):
        compressed(collection, num_components=4)
    assert list((tmp_path / "scratch").iterdir()) == []
    compressed(collection, num_components=4, workspace=tmp_path / "out.workspace")
    assert (tmp_path / "scratch" / "workspace.json").exists()


def test_two_runs_with_workspaces_of_their_own_do_not_meet_in_one_output(
    tmp_path: Path, collection: list[str], compressed: Compress
) -> None:
    from lorashare_stream.checkpoint.staging import Staging
    from lorashare_stream.errors import WorkspaceError

    with Staging.open(tmp_path / "out", "0123"), pytest.raises(WorkspaceError, match="another run is writing"):
        compressed(collection, num_components=4)
    compressed(collection, num_components=4)


def test_a_linked_folder_keeps_the_name_of_the_link(tmp_path: Path) -> None:
    (folder,) = make_collection(tmp_path / "store", 1)
    (tmp_path / "customer").symlink_to(folder)
    (source,) = resolve([tmp_path / "customer"])
    assert (source.wanted_name, source.id) == ("customer", os.path.realpath(folder))


def test_a_plan_knows_the_names_in_a_workspace(tmp_path: Path, capsys: Capture) -> None:
    first, second = make_collection(tmp_path / "x", 2), make_collection(tmp_path / "y", 1, seed=1)
    command = ["compress", *first, "-o", tmp_path / "out", "-k", 4, "-q"]
    assert call(*command) == 0
    workspace = ["--workspace", tmp_path / "out.workspace"]
    assert call("plan", *first, *second, *workspace, "-k", 4, "-o", tmp_path / "p.json", "-q") == 0
    assert call("compress", "--plan", tmp_path / "p.json", "-o", tmp_path / "out", "-q") == 0
    names = SHAREModel.from_pretrained(tmp_path / "out").adapter_names
    assert names[:2] == ["a00", "a01"]
    assert names[2].startswith("a00-")
    capsys.readouterr()


@pytest.mark.parametrize("target", ["folder", "nowhere/plan.json"])
def test_a_plan_that_cannot_be_written_names_the_path_of_the_user(
    tmp_path: Path, collection: list[str], capsys: Capture, target: str
) -> None:
    (tmp_path / "folder").mkdir()
    assert call("plan", *collection, "-o", tmp_path / target) == 1
    assert str(tmp_path / target) in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_header_with_a_key_twice_is_read_in_linear_time(tmp_path: Path) -> None:
    from lorashare_stream.adapters.safetensors import repeated

    names = [f"k{i}" for i in range(300_000)]
    assert repeated(names) is None
    assert repeated([*names, "k299999"]) == "k299999"


def test_layouts_are_shared_whatever_the_metadata(tmp_path: Path) -> None:
    for i, folder in enumerate(make_collection(tmp_path / "a", 3)):
        save_file(load_tensors(folder), Path(folder) / "adapter_model.safetensors", metadata={"run": str(i)})
    entries = plan_for(resolve([tmp_path / "a"]), Settings()).adapters
    assert len({id(e.layout) for e in entries}) == 1


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_collection(tmp_path / "a", 2)
    original = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    (tmp_path / "a" / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        resolve([tmp_path / "a"])


def test_a_reconstruction_overwrites_nothing_but_a_reconstruction(
    tmp_path: Path, collection: list[str], compressed: Compress, capsys: Capture
) -> None:
    out = compressed(collection, num_components=4)
    before = tree_digest(tmp_path / "adapters")
    assert call("reconstruct", out, "--all", "-o", tmp_path / "adapters") == 2
    assert call("reconstruct", out, "--adapter", "a00", "-o", collection[3]) == 2
    assert call("reconstruct", out, "--adapter", "a00", "-o", out) == 2
    assert tree_digest(tmp_path / "adapters") == before
    assert "not reconstructed, an original perhaps" in capsys.readouterr().err
    share = SHAREModel.from_pretrained(out)
    with pytest.raises(UsageError, match="an original perhaps"):
        share.reconstruct("a00", output_dir=collection[0])
    for _ in range(2):  # over its own earlier output it may write
        assert call("reconstruct", out, "--all", "-o", tmp_path / "rec", "-q") == 0
    assert call("verify", out, "-q") == 0


def test_what_became_of_the_output_is_said(
    tmp_path: Path, collection: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["compress", *collection, "-o", tmp_path / "out"]
    for k, text in ((4, ""), (4, "is up to date"), (3, "has replaced")):
        caplog.clear()
        assert call(*command, "-k", k) == 0
        assert text in caplog.text
        assert text or "up to date" not in caplog.text


@pytest.mark.few(4)
@pytest.mark.parametrize("which", ["staging", "replaced"])
@pytest.mark.parametrize("after", range(4))
def test_killed_while_an_old_checkpoint_or_staging_is_removed(
    tmp_path: Path, collection: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch, which: str, after: int
) -> None:
    """What is left of a folder of ours is known as ours, whatever part of it went first."""
    from lorashare_stream.checkpoint import publish as publishing

    out = compressed(collection, num_components=4)
    (out / "README.md").write_text("mine")
    if which == "staging":
        monkeypatch.setattr("lorashare_stream.checkpoint.staging.publish", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compressed(collection, num_components=3)
        monkeypatch.undo()
        (tmp_path / ".out.staging" / "README.md").write_text("copied")
    removed = []
    original, listing = publishing.remove_tree, Path.iterdir
    first = ("share_config.json", "staging.json")  # what a folder is known by goes first, in the worst of orders
    monkeypatch.setattr(
        Path, "iterdir", lambda p: iter(sorted(listing(p), key=lambda q: (q.name not in first, q.name)))
    )

    def kill(path: Path) -> None:
        if len(removed) == after:
            raise KeyboardInterrupt
        removed.append(path)
        original(path)

    monkeypatch.setattr(publishing, "remove_tree", kill)
    with pytest.raises(KeyboardInterrupt):
        compressed(collection, num_components=2)
    monkeypatch.undo()
    compressed(collection, num_components=2)
    assert not list(tmp_path.glob(".*"))
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    assert tree_digest(out) == tree_digest(compressed(collection, name="fresh", num_components=2))
