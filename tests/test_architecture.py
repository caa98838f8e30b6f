"""Imports point one way, compressing stays light, and the numbers of the house are kept."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lorashare_stream

ROOT = Path(lorashare_stream.__file__).parent

# The rooms, bottom to top: a module imports only from rows above its own, or from earlier in its row.
ROOMS = {
    "pure": [
        "version", "names", "hubid", "errors", "dtypes", "settings", "keys", "lapack", "moments", "deltas", "patterns",
        "peftconfig", "krylov", "solvers", "subspace", "forms", "offers",
        "allotment", "measuring", "spectra", "outlook",
    ],
    "bytes": [
        "files", "tensorfile", "stacks", "picklecheck", "picklefile", "shards", "adapterfiles", "zarrfile",
        "momentstore", "locks", "journal", "shapes", "workspace", "huberrors", "patience", "hub",
    ],
    "facts": [
        "sources.source", "sources.manifest", "sources.local", "sources", "sources.pins", "layout", "entry",
        "agreement", "ledger", "survey", "catalog", "budget", "planning", "planfile", "sampling", "copies",
    ],
    "doing": [
        "forks", "executors", "calls", "probing", "cluster", "connecting", "devices", "fetching", "running",
        "measurement", "remote", "shareformat", "records", "publishing", "checkpoint",
        "shareconfig", "summary", "hubreader", "tasks.job", "tasks.ingest", "tasks.accumulate", "tasks.clean",
        "tasks.fit", "tasks.components", "tasks.forming", "tasks.project", "tasks.appraise", "tasks", "reader",
    ],
    "story": [
        "summing", "basefiles", "stages", "allotting", "growing", "pipeline", "discovery", "means", "adding",
        "shrinking", "slicing", "refitting", "report", "summarytext", "analysis", "analysistext", "comparison",
        "restoring", "scrubbing", "markup", "axes", "findings", "charts", "pagestyle", "pageparts", "page",
        "modelcard", "pusherrors", "pushfiles", "pushtarget", "pushing", "opened", "model", "verification",
    ],
    "shell": [
        "progress", "choices", "output", "edits", "hubcommands", "commands", "arguments", "cli", "__main__", "__init__",
    ],
}  # fmt: skip
ORDER = [module for room in ROOMS.values() for module in room]
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


def test_every_module_has_a_room() -> None:
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module: str) -> None:
    if module == "__init__":
        return
    later = {i for i in own_imports(MODULES[module]) if ORDER.index(i) >= ORDER.index(module)}
    assert not later, f"{module} imports {later} from its own level or below"


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
import sys
from lorashare_stream.cli import main
assert main(["compress", *sys.argv[2:], "-o", sys.argv[1], "-k", "4", "-q", "--device", "cpu"]) == 0
print({"peft", "transformers", "torch", "huggingface_hub", "dask", "zarr", "scipy.linalg"} & set(sys.modules))
"""
    assert run(code, str(tmp_path / "out"), *collection).endswith("set()\n")


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from lorashare_stream.cli import main
try:
    main(["--help"])
except SystemExit:
    print({"torch", "numpy", "scipy", "zarr", "yaml", "tqdm"} & set(sys.modules))
"""
    assert run(code).endswith("set()\n")


def test_scipys_linear_algebra_can_be_imported_after_ours() -> None:
    code = """
import sys
import lorashare_stream.lapack
assert "scipy.linalg" not in sys.modules
import scipy.linalg, scipy.sparse.linalg
from scipy.linalg import cython_blas
from scipy.linalg.cython_lapack import __pyx_capi__
print(len(scipy.linalg.eigh([[2.0, 1.0], [1.0, 2.0]])[0]))
"""
    assert run(code) == "2\n"


def test_modules_and_functions_stay_small() -> None:
    for module, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 300, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 45, f"{module}.{node.name} has {lines} lines"


def test_the_public_names_are_few_and_all_there() -> None:
    assert all(hasattr(lorashare_stream, name) for name in lorashare_stream.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lorashare_stream.nothing  # noqa: B018
