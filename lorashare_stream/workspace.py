"""The folder of resumable state: what is admitted, what is summed, what is fitted.

    workspace.json            what its numbers depend on (objective, centring, quantum, base model, ...)
    lock                      held by one process at a time
    plan.json                 the last plan
    journal.jsonl             admissions, in order, append-only: name, source, digest, energy of dW
    skipped.json              adapters that the last run left out, with the reason
    moments/<module>.json     marker: which generation holds how many admissions
    moments/<module>/<n>/A|B  Zarr arrays of that generation
    bases/<digest>/<module>   components and facts of a basis, for one choice of k and dtype

A marker is written after the data it vouches for is on disk, and only by a rename. So whatever is killed,
a group is either done or it is done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import StreamError, WorkspaceError
from .files import own_folder, read_json, refuse_links, remove_tree, sync_folder, sync_tree, tree_bytes, write_json
from .names import shown, slug

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """What ingest found out about one adapter: an entry of the journal.

    Attributes:
        name, source_id: the adapter.
        digest: SHA-256 of its weight files.
        config_digest: of its configuration's values.
        energy: sum over its shared modules of ||dW||^2, float64.
        sizes, mtimes_ns: of its weight files; while they stay, so did the digest.
        notes: what the user should know of it.
        exact: whether nothing of it is shared.
    """

    name: str
    source_id: str
    digest: str
    config_digest: str
    energy: float
    sizes: tuple[int, ...]
    mtimes_ns: tuple[int, ...]
    notes: tuple[str, ...] = ()
    exact: bool = False


class Workspace:
    """An open workspace; hold it through `Workspace.open`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments = root / "moments"
        self.bases = root / "bases"

    @classmethod
    @contextmanager
    def open(cls, root: Path, binding: Mapping[str, Any]) -> Iterator[Workspace]:
        """Open or make a workspace, locked until the end of the block.

        Args:
            root: its folder.
            binding: what its numbers depend on; it must be what the workspace was made with.

        Raises:
            WorkspaceError: if another process holds it, or it was made with other settings.
        """
        inside = {p.name for p in root.iterdir()} if root.exists() else set()
        if inside - {"lock", "moments", "bases"} and "workspace.json" not in inside:
            raise WorkspaceError(
                "the folder is no workspace, and not empty", found=root, remedy="Choose another --workspace."
            )
        root.mkdir(parents=True, exist_ok=True)
        refuse_links(root, depth=3)
        work = cls(root)
        with _locked(root / "lock"):
            for folder in (work.moments, work.bases):
                own_folder(folder)
            work._bind(dict(binding) | {"format": FORMAT})
            work._clean()
            yield work

    def _bind(self, binding: dict[str, Any]) -> None:
        path = self.root / "workspace.json"
        if not path.exists():
            write_json(path, binding)
            return
        found = _read_mapping(path)
        if not found:
            raise WorkspaceError(
                f"the workspace {shown(self.root)} is damaged",
                found="workspace.json",
                remedy="Delete it, or choose another.",
            )
        differing = sorted(k for k in binding.keys() | found.keys() if binding.get(k) != found.get(k))
        if differing:
            raise WorkspaceError(
                f"the workspace {shown(self.root)} was made with other settings",
                found=", ".join(f"{k}={shown(found.get(k))}" for k in differing),
                expected=", ".join(f"{k}={shown(binding.get(k))}" for k in differing),
                remedy="Choose another workspace, and another output, or delete this one.",
            )

    def _clean(self) -> None:
        """Remove what dead runs left: generations without a marker, and temporary files."""
        for folder in (self.root, self.moments, *self.bases.iterdir()):
            for path in folder.glob(".*.tmp"):
                path.unlink()
        for path in self.moments.iterdir():
            if path.is_dir():
                marker = _read_marker(self.moments / f"{path.name}.json")
                for generation in path.iterdir():
                    if marker is None or generation.name != str(marker["generation"]):
                        remove_tree(generation)

    # -- journal -------------------------------------------------------------------------------------

    def receipts(self) -> list[Receipt]:
        """All admissions, in order. What a crash tore off at the end is cut: it was never vouched for."""
        receipts, whole = self._journal()
        path = self.root / "journal.jsonl"
        if path.exists() and path.stat().st_size != whole:
            os.truncate(path, whole)
        return receipts

    def admissions(self) -> list[Receipt]:
        """All admissions as they stand; reads only, and needs no lock."""
        return self._journal()[0]

    def base_model(self) -> str | None:
        """The base model that it is bound to, if it is there and names one."""
        name = _read_mapping(self.root / "workspace.json").get("base_model")
        return name if isinstance(name, str) and name else None

    def _journal(self) -> tuple[list[Receipt], int]:
        path = self.root / "journal.jsonl"
        receipts: list[Receipt] = []
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                receipts.append(_receipt(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n"):
                receipts.pop()
                break
            whole += len(line)
        return receipts, whole

    def admit(self, receipt: Receipt, *, durable: bool) -> None:
        """Append an admission; `durable` ones survive a power cut, with all before them."""
        with (self.root / "journal.jsonl").open("ab") as f:
            f.write(json.dumps(asdict(receipt)).encode() + b"\n")
            f.flush()
            if durable:
                os.fsync(f.fileno())

    def sync_journal(self) -> None:
        """Make all admissions durable."""
        with (self.root / "journal.jsonl").open("ab") as f:
            os.fsync(f.fileno())
        sync_folder(self.root)

    def skip(self, left_out: list[dict[str, Any]]) -> None:
        """Note which adapters this run leaves out, and why."""
        write_json(self.root / "skipped.json", left_out)

    # -- moments -------------------------------------------------------------------------------------

    def marker(self, module: str) -> dict[str, Any] | None:
        """What is summed of a module: `generation`, `entries` of the journal, facts of sides `A` and `B`."""
        return _read_marker(self.moments / f"{slug(module)}.json")

    def generation(self, module: str, number: int) -> Path:
        """The folder of one generation of a module's moments."""
        return self.moments / slug(module) / str(number)

    @contextmanager
    def new_generation(self, module: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A fresh folder for a module's moments, and its marker to fill in; published at the end of the block."""
        old = self.marker(module)
        number = 0 if old is None else int(old["generation"]) + 1
        folder = self.generation(module, number)
        remove_tree(folder)
        folder.mkdir(parents=True)
        marker: dict[str, Any] = {"module": module, "generation": number}
        yield folder, marker
        sync_tree(folder)
        sync_folder(folder.parent)
        sync_folder(self.moments)
        write_json(self.moments / f"{slug(module)}.json", marker)
        if old is not None:
            remove_tree(self.generation(module, number - 1))

    def discard(self, module: str) -> None:
        """Forget a module's moments: they are summed again."""
        (self.moments / f"{slug(module)}.json").unlink(missing_ok=True)
        remove_tree(self.moments / slug(module))

    # -- bases and outputs ---------------------------------------------------------------------------

    def bases_for(self, digest: str) -> Path:
        """The folder of the bases of one choice of k, dtype and admissions; those of others are dropped."""
        for path in self.bases.iterdir():
            if path.name != digest:
                remove_tree(path)
        return own_folder(self.bases / digest)

    def published(self, out: Path) -> list[str]:
        """Digests of the bases that this workspace has published at `out`."""
        digests = _read_mapping(self.root / "published.json").get(str(out.absolute()), [])
        return digests if isinstance(digests, list) else []

    def publishing(self, out: Path, basis_digest: str) -> None:
        """Note, before it happens, that a checkpoint is published; what was there before stays ours as well."""
        path = self.root / "published.json"
        outputs = _read_mapping(path)
        outputs[str(out.absolute())] = [*self.published(out)[-1:], basis_digest]
        write_json(path, outputs)

    def bytes(self) -> int:
        """Bytes on disk."""
        return tree_bytes(self.root)


def skipped_as_json(errors: Iterable[StreamError]) -> list[dict[str, Any]]:
    """Adapters that were left out, as plain values: name, reason, and the parts of the reason."""
    listing = [{"reason": str(e), "problem": e.problem, **e.details(), "source": e.source} for e in errors]
    return [{k: v for k, v in item.items() if v is not None} for item in listing]


def _read_marker(path: Path) -> dict[str, Any] | None:
    """A marker; None if there is none, or it was changed by something else than us: the module is summed again."""
    marker = _read_mapping(path)
    whole = all(isinstance(marker.get(name), int) for name in ("generation", "entries"))
    return marker if whole and all(isinstance(marker.get(side), dict) for side in ("A", "B")) else None


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, or what is there is none."""
    try:
        value = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _receipt(values: dict[str, Any]) -> Receipt:
    for name in ("sizes", "mtimes_ns", "notes"):
        values[name] = tuple(values[name])
    return Receipt(**values)


def digest_of(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when the process dies, however it dies."""
    with path.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise WorkspaceError(
                f"another run holds the workspace {shown(path.parent)}",
                found=f.read() or "a process that has just started",
                remedy="Wait for it, or choose another --workspace.",
            ) from None
        f.truncate(0)
        f.write(f"host {platform.node()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}")
        f.flush()
        try:
            yield
        finally:
            f.truncate(0)
