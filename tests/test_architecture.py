"""Imports point one way, compressing stays light, and the numbers of the house are kept."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lorashare_stream

ROOT = Path(lorashare_stream.__file__).parent

# The rooms, top to bottom: a file imports from its own room, and from rooms below it.
ROOMS = [
    "cli", "__main__", "__init__", "model", "serving", "edits", "report", "pipeline", "stages", "plan", "hub",
    "checkpoint", "workspace", "codec", "linalg", "adapters", "runtime", "schema", "files", "settings", "machine",
    "errors", "text", "version",
]  # fmt: skip
BESIDE = 12  # files beside the rooms
HEAVY = {"peft", "transformers"}


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {name_of(p): p for p in ROOT.rglob("*.py")}


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    package = ("lorashare_stream", *path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*package[1 : len(package) - node.level + 1], *(node.module or "").split(".")]
        name = ".".join(part for part in base if part)
        inner = {f"{name}.{alias.name}".lstrip(".") for alias in node.names}
        found |= {i if i in MODULES else name for i in inner}
    return found - {""}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_has_a_room_and_few_lie_beside_them() -> None:
    assert {room_of(m) for m in MODULES} == set(ROOMS)
    assert len([m for m, path in MODULES.items() if path.parent == ROOT]) <= BESIDE


@pytest.mark.parametrize("room", [r for r in ROOMS if r not in ("__init__", "__main__")])
def test_imports_point_to_rooms_below(room: str) -> None:
    for module, path in MODULES.items():
        if room_of(module) == room:
            above = {i for i in own_imports(path) if ROOMS.index(room_of(i)) < ROOMS.index(room)}
            assert not above, f"{module} imports {above} from rooms above its own"


@pytest.mark.parametrize(
    ("room", "never"), [("checkpoint", "hub"), ("hub", "plan"), ("stages", "cli"), ("linalg", "files")]
)
def test_a_room_does_not_know_another(room: str, never: str) -> None:
    assert not {m for m, path in MODULES.items() if room_of(m) == room and never in map(room_of, own_imports(path))}


def test_what_libraries_do_is_not_done_by_system_calls() -> None:
    """BLAS is of SciPy, processes are of `concurrent.futures`, files are mapped, or written by zarr."""
    for path in MODULES.values():
        tree = ast.parse(path.read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not names & {"ctypes", "fork", "preadv", "pwritev", "readv", "writev"}, path


def test_peft_and_transformers_are_imported_where_they_are_used() -> None:
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {n.split(".")[0] for n in names} & HEAVY, module


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compressing_imports_neither_peft_nor_transformers_nor_torch(tmp_path: Path, collection: list[str]) -> None:
    code = """
import sys, threading
from lorashare_stream.cli.app import main
assert main(["plan", *sys.argv[2:], "-k", "4", "--device", "cpu"]) == 0
assert "zarr" not in sys.modules
assert main(["compress", *sys.argv[2:], "-o", sys.argv[1], "-k", "4", "-q", "--device", "cpu", "--workers", "2"]) == 0
print([t.name for t in threading.enumerate() if t.name.startswith(("zarr", "asyncio"))])  # else it could not fork
print({"peft", "transformers", "torch", "huggingface_hub", "dask", "jinja2", "matplotlib"} & set(sys.modules))
"""
    assert run(code, str(tmp_path / "out"), *collection).endswith("[]\nset()\n")


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["--version"], ["compress", "--colour"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from lorashare_stream.cli.app import main
main({words})
heavy = {{"torch", "numpy", "scipy", "zarr", "yaml", "tqdm", "jinja2", "matplotlib"}}
print((heavy | ({{"pydantic"}} if "--help" in {words} else set())) & set(sys.modules))
"""
    assert run(code).endswith("set()\n")


def test_functions_stay_small() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 45, f"{module}.{node.name} has {lines} lines"


def test_the_public_names_are_few_and_all_there() -> None:
    assert all(hasattr(lorashare_stream, name) for name in lorashare_stream.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lorashare_stream.nothing  # noqa: B018
