"""Digests of the tensors that four small collections give: what no change of structure may change.

python tests/golden.py          prints them, computed by one kernel on every x86-64 machine (see `environment`)
python tests/golden.py --write  replaces tests/golden.json; say why in the commit
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT = Path(__file__).with_suffix(".json")
CHOICES: dict[str, dict[str, object]] = {
    "delta": {"num_components": 6},
    "factors, centred": {
        "num_components": "auto", "variance_threshold": 0.9, "objective": "factors", "center": True,
        "moment_dtype": "float64",
    },
    "factors, bfloat16": {"num_components": 5, "objective": "factors", "dtype": "bfloat16"},
    "coded within an error": {"max_error": 0.1},
}  # fmt: skip
MODULES = {
    "layers.0.q": (96, 64), "layers.0.v": (96, 32), "layers.1.q": (96, 64),
    "layers.1.v": (96, 32), "layers.0.down": (400, 200),
}  # fmt: skip


def environment() -> dict[str, str]:
    """One OpenBLAS kernel, and NumPy without AVX-512: other kernels give other last bits."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    extra = [f for f in __cpu_dispatch__ if __cpu_features__[f] and f != "X86_V3"]
    return os.environ | {
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": " ".join(extra),
    }


def computed() -> dict[str, dict[str, str]]:
    """Collection -> file of its checkpoint -> digest of its tensors, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--here"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


def tensors_digest(path: Path) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of the tensors of a safetensors file, whatever its metadata."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        start, stop = header[name]["data_offsets"]
        digest.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
        digest.update(raw[end + start : end + stop])
    return digest.hexdigest()[:16]


def _compress_here() -> dict[str, dict[str, str]]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lorashare_stream import Settings, compress, plan_for, resolve
    from tests.conftest import make_collection

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, choice) in enumerate(CHOICES.items()):
            root = Path(folder, str(number))
            sources = make_collection(root / "adapters", 24, MODULES, r=12, seed=number)
            compress(plan_for(resolve(sources), Settings.from_mapping({"device": "cpu", **choice})), root / "out")
            files = sorted((root / "out").rglob("*.safetensors"))
            found[name] = {str(f.relative_to(root / "out")): tensors_digest(f) for f in files}
    return found


if __name__ == "__main__":
    if "--here" in sys.argv:
        print(json.dumps(_compress_here()))
    elif "--write" in sys.argv:
        KEPT.write_text(json.dumps(computed(), indent=1) + "\n")
    else:
        print(json.dumps(computed(), indent=1))
