"""Collections to test on: small ones made here, and the real ones beside the repository; and the two tiers of tests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime import executors
from lorashare_stream.settings import Settings

from .tiers import COMMIT

executors.local_executor = lambda processes: executors.SerialExecutor()  # a patch is not seen in another process
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
settings.register_profile("full", deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("fast", settings.get_profile("full"), max_examples=10)
FAST_SECONDS = 3.0

REAL = Path(__file__).resolve().parents[2] / "shared" / "adapters"
REQUIRE_REAL = "LORASHARE_STREAM_REQUIRE_REAL"


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real adapters; absent in a clone that stands alone."""
    if not REAL.is_dir():
        if os.environ.get(REQUIRE_REAL):
            pytest.fail(f"{REQUIRE_REAL} is set, and there are no real adapters at {REAL}")
        pytest.skip(f"no real adapters at {REAL}")
    return REAL


CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": "tiny-base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q", "v"],
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
}


def factor_keys(module: str) -> tuple[str, str]:
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def make_tensors(
    rng: np.random.Generator, modules: Mapping[str, tuple[int, int]], r: int = 4, latent: int = 6
) -> dict[str, np.ndarray]:
    """Factors with a planted shared subspace of `latent` directions, and a full-rank tail."""
    tensors = {}
    for module, (d_in, d_out) in modules.items():
        planted = np.random.default_rng(int(hashlib.sha256(module.encode()).hexdigest()[:8], 16))
        for key, d in zip(factor_keys(module), (d_in, d_out), strict=True):
            basis = np.linalg.qr(planted.standard_normal((d, min(latent, d))))[0]
            strength = rng.standard_normal((basis.shape[1], r)) / (1 + np.arange(basis.shape[1]))[:, None]
            vectors = basis @ strength + 0.05 * rng.standard_normal((d, r)) / np.sqrt(d)
            tensors[key] = np.ascontiguousarray(vectors.T if "lora_A" in key else vectors, np.float32)
    return tensors


MODULES = {"layers.0.q": (40, 24), "layers.0.v": (40, 12), "layers.1.q": (40, 24)}


def make_collection(
    root: Path, n: int = 8, modules: Mapping[str, tuple[int, int]] = MODULES, r: int = 4, seed: int = 0, **config: Any
) -> list[str]:
    rng = np.random.default_rng(seed)
    folders = []
    for i in range(n):
        tensors = make_tensors(rng, modules, r)
        tensors["base_model.model.head.weight"] = rng.standard_normal((3, 5)).astype(np.float32)
        folders.append(str(write_adapter(root / f"a{i:02}", tensors, r=r, lora_alpha=2 * r, **config)))
    return folders


def akin_tensors(
    rng: np.random.Generator, modules: Mapping[str, tuple[int, int]], r: int = 4, own: float = 0.05
) -> dict[str, np.ndarray]:
    """Factors whose lora_A is the first r rows of one that all have in common, but for a part `own` of its length."""
    tensors = {}
    for module, (d_in, d_out) in modules.items():
        planted = np.random.default_rng(int(hashlib.sha256(module.encode()).hexdigest()[:8], 16))
        a, b = factor_keys(module)
        common = planted.standard_normal((r, d_in))
        tensors[a] = (common + own * rng.standard_normal((r, d_in))).astype(np.float32)
        tensors[b] = rng.standard_normal((d_out, r)).astype(np.float32)
    return tensors


def make_akin(
    root: Path, n: int = 12, modules: Mapping[str, tuple[int, int]] = MODULES, r: int = 4, seed: int = 0, **config: Any
) -> list[str]:
    """Adapters that were trained from one initial lora_A, as it were."""
    rng = np.random.default_rng(seed)
    folders = (root / f"a{i:02}" for i in range(n))
    return [str(write_adapter(f, akin_tensors(rng, modules, r), r=r, lora_alpha=2 * r, **config)) for f in folders]


@pytest.fixture
def collection(tmp_path: Path) -> list[str]:
    return make_collection(tmp_path / "adapters")


@pytest.fixture
def compressed(tmp_path: Path) -> Callable[..., Path]:
    """Compress some sources under `tmp_path` and give the checkpoint's folder."""

    def run(
        sources: Any, name: str = "out", executor: Any = None, workspace: Path | None = None, **options: Any
    ) -> Path:
        out = tmp_path / name
        settings = Settings.from_mapping({"device": "cpu"} | options)
        plan = plan_for(resolve(sources), settings, workspace or default_workspace(out))
        compress(plan, out, executor=executor, workspace=workspace)
        return out

    return run


@pytest.fixture(scope="session")
def compressed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of eight adapters, k = 4, beside its workspace."""
    root = tmp_path_factory.mktemp("once")
    plan = plan_for(resolve(make_collection(root / "adapters")), Settings(num_components=4, device="cpu"))
    compress(plan, root / "out")
    return root / "out"


@pytest.fixture
def checkpoint(tmp_path: Path, compressed_once: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(default_workspace(compressed_once), default_workspace(tmp_path / "out"))
    return Path(shutil.copytree(compressed_once, tmp_path / "out"))


def tree_digest(root: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file under `root`."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def load_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


# -- two tiers: `scripts/test.sh` runs what is not slow, `scripts/test_all.sh` everything ------------------------------


def is_fast_tier(config: pytest.Config) -> bool:
    """Whether slow tests are left out: then properties are tried on fewer examples, too."""
    return "not slow" in config.option.markexpr


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run an Nth of the tests, by the commit's hash")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("fast" if is_fast_tier(config) else "full")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    cases: Counter[str] = Counter()
    for item in items:
        if "real" in getattr(item, "fixturenames", ()):
            item.add_marker("on_real_data")
        few, function = item.get_closest_marker("few"), item.nodeid.partition("[")[0]
        if few is not None and (cases[function] - COMMIT) % few.args[0]:
            item.add_marker("slow")
        cases[function] += 1
    yield  # -m and -k
    parts = config.getoption("--one-in")
    chosen = items[COMMIT % parts :: parts]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != COMMIT % parts])
    items[:] = chosen


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for: no other load, and no waiting, is in it."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    before = cpu_seconds()
    result = yield
    took = cpu_seconds() - before
    if took > FAST_SECONDS and is_fast_tier(item.config):  # told, never a failure: another machine is slower
        item.user_properties.append(("told", f"{took:.1f} s of CPU time, and not marked slow"))
    return result


# Where real adapters are required, a skipped test on them is a failure, whatever skipped it.
_skipped_on_real_data: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "on_real_data" in report.keywords:
        _skipped_on_real_data.append(report.nodeid)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "told":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped_on_real_data and os.environ.get(REQUIRE_REAL):
        print(f"\n{REQUIRE_REAL} is set, and tests on real data were skipped: {_skipped_on_real_data}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
