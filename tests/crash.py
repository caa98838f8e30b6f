"""A crash at every call that changes the disk, in a process that is forked for each.

    python -m tests.crash FOLDER SCENARIO MODE [STRIDE [FIRST]]

Runs a command once to count its calls at the level of `os`: opening for writing, write, rename, replace, link, unlink,
rmdir, mkdir, truncate, fsync, in all threads. That none slips past is checked by the audit events of the
interpreter and by the kernel's count of written bytes. Then the command is run once for each call, with a fault at it:

    kill    the process ends before the call; of a write, half is done
    full    this call and all later ones that take disk fail: ENOSPC (EIO where that cannot be)
    power   the process ends, and all that was not synced is lost: content of files, and names in folders
    names   the process ends, and the content of files that were not synced is lost, but the names are there

and run again, without a fault. The result must be, byte for byte, that of a run that nothing happened to.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lorashare_stream.cli.app
import lorashare_stream.cli.commands
import lorashare_stream.cli.edit
import lorashare_stream.cli.hub  # imported once, before the forks
import lorashare_stream.cli.options
from lorashare_stream.checkpoint import staging as checkpoint
from lorashare_stream.runtime import executors
from lorashare_stream.settings import Settings

from .conftest import make_akin, make_collection

KILLED = 99
TAKES_NO_DISK = {"unlink", "rmdir", "fsync"}
real = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
real_open = io.open
lorashare_stream.cli.options.parsed(["info", "x"])  # has typer and pydantic imported before the forks, too
Settings()


# -- a model of what is durable ----------------------------------------------------------------------


@dataclass
class Node:
    """A file, with its content as of its last sync; or a folder, with its names now, and as of its last sync."""

    content: bytes | None = None
    now: dict[str, Node] | None = None
    durable: dict[str, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Node:
        """What lies at a path, all of it durable."""
        if not path.is_dir():
            return cls(content=path.read_bytes())
        now = {p.name: cls.of(p) for p in path.iterdir()}
        return cls(now=now, durable=dict(now))

    def write(self, path: Path, names: str, blank: bool, current: Path) -> None:
        """Make `path` what a power cut would leave of this node, which was at `current`."""
        if self.now is None:
            size = current.stat().st_size if current.is_file() else 0
            path.write_bytes(self.content if self.content is not None else b"\0" * size if blank else b"")
            return
        path.mkdir()
        for name, node in (self.now if names == "names" else self.durable).items():
            node.write(path / name, names, blank, current / name)


class Disk:
    """The tree under `root`: which calls change it, the fault at one of them, and what of it is durable."""

    def __init__(self, root: Path, mode: str, at: int) -> None:
        self.root, self.mode, self.at = root, mode, at
        self.calls: list[str] = []
        self.opened = self.bytes = 0
        self.lock = threading.RLock()
        self.top = Node.of(root)

    def inside(self, path: Any, dir_fd: int | None = None) -> Path | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        full = Path(os.path.abspath(path))
        return full if full.is_relative_to(self.root) else None

    def node(self, path: Path) -> Node:
        found = self.top
        for part in path.relative_to(self.root).parts:
            assert found.now is not None
            found = found.now[part]
        return found

    def call(self, kind: str, path: Path, half: Callable[[], Any] = lambda: None) -> None:
        """Count a call; at its number, fail."""
        self.calls.append(f"{kind} {path.relative_to(self.root)}")
        number = len(self.calls)
        if self.mode == "full" and number >= self.at:
            if kind in TAKES_NO_DISK and number > self.at:
                return
            half()
            code = errno.EIO if kind in TAKES_NO_DISK else errno.ENOSPC
            raise OSError(code, os.strerror(code), None if kind in ("write", "fsync") else str(path))
        if number == self.at and self.mode != "count":
            half()
            if self.mode in ("power", "names"):
                self.cut()
            real["_exit"](KILLED)

    def cut(self) -> None:
        """Leave on disk what a power cut would."""
        for name, function in real.items():
            setattr(os, name, function)
        builtins.open = io.open = real_open  # type: ignore[assignment]
        aside = self.root.parent / f"{self.root.name}.before"
        os.rename(self.root, aside)
        self.top.write(self.root, self.mode, self.at % 2 == 0, aside)
        shutil.rmtree(aside)


def install(disk: Disk) -> None:
    """Put the disk between Python and the system."""

    def parent(path: Path) -> dict[str, Node]:
        now = disk.node(path.parent).now
        assert now is not None
        return now

    def changed(kind: str, act: Callable[[Path], None]) -> Any:
        def wrapped(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
            inside = disk.inside(path, dir_fd)
            if dir_fd is not None:
                kwargs["dir_fd"] = dir_fd
            if inside is None:
                return real[kind](path, *args, **kwargs)
            with disk.lock:
                if kind in ("unlink", "rmdir", "mkdir") and os.path.lexists(inside) == (kind == "mkdir"):
                    return real[kind](path, *args, **kwargs)  # fails, and changes nothing
                disk.call(kind, inside)
                result = real[kind](path, *args, **kwargs)
                act(inside)
                return result

        return wrapped

    os.mkdir = changed("mkdir", lambda p: parent(p).update({p.name: Node(now={})}))
    os.rmdir = changed("rmdir", lambda p: void(parent(p).pop(p.name)))
    os.unlink = os.remove = changed("unlink", lambda p: void(parent(p).pop(p.name)))
    os.truncate = changed("truncate", lambda p: None)
    os.ftruncate = changed("ftruncate", lambda p: None)

    def moved(kind: str) -> Any:
        def wrapped(source: Any, target: Any, **kwargs: Any) -> None:
            a, b = disk.inside(source), disk.inside(target)
            if a is None or b is None:
                assert a is b is None, (source, target)
                real[kind](source, target, **kwargs)
                return
            with disk.lock:
                disk.call(kind, b)
                real[kind](source, target, **kwargs)
                parent(b)[b.name] = parent(a).pop(a.name) if kind != "link" else parent(a)[a.name]

        return wrapped

    os.rename, os.replace, os.link = moved("rename"), moved("replace"), moved("link")

    def synced(kind: str) -> Any:
        def wrapped(fd: Any) -> None:
            path = disk.inside(fd if isinstance(fd, int) else fd.fileno())
            if path is None:
                real[kind](fd)
                return
            with disk.lock:
                disk.call("fsync", path)
                real[kind](fd)
                node = disk.node(path)
                if node.now is None:
                    node.content = path.read_bytes()
                else:
                    node.durable = dict(node.now)

        return wrapped

    os.fsync, os.fdatasync = synced("fsync"), synced("fdatasync")

    checkpoint.MANY = 2  # as many as are compressed: one sync, whenever it ends

    shutil._USE_CP_SENDFILE = False  # copies go through `open` and `write`, which are watched

    def forbidden(name: str) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"os.{name} is not watched")

        return wrapped

    for name in ("pwrite", "pwritev", "sendfile", "copy_file_range", "symlink", "mknod", "removedirs"):
        setattr(os, name, forbidden(name))

    def created(path: Path) -> None:
        parent(path).setdefault(path.name, Node())
        disk.opened += 1

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        inside = disk.inside(path, kwargs.get("dir_fd"))
        if inside is None or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return real["open"](path, flags, *args, **kwargs)
        with disk.lock:
            disk.call("open", inside)
            try:
                fd: int = real["open"](path, flags, *args, **kwargs)
            except FileExistsError:  # with O_EXCL: seen, though nothing is changed
                disk.opened += 1
                raise
            created(inside)
            return fd

    def os_write(fd: int, data: Any) -> int:
        inside = disk.inside(fd) if fd > 2 else None
        if inside is None:
            return int(real["write"](fd, data))
        with disk.lock:
            disk.call("write", inside, lambda: real["write"](fd, bytes(data)[: len(data) // 2]))
            count: int = real["write"](fd, data)
            disk.bytes += count
            return count

    def os_writev(fd: int, buffers: Any) -> int:
        return os_write(fd, b"".join(buffers))

    os.open, os.write, os.writev = os_open, os_write, os_writev

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            with disk.lock:
                data = bytes(data)
                path = disk.inside(self.fileno())
                if path is not None:
                    disk.call("write", path, lambda: io.FileIO.write(self, data[: len(data) // 2]))
                    disk.bytes += len(data)
                return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            path = disk.inside(self.fileno())
            if path is not None:
                with disk.lock:
                    disk.call("truncate", path)
            return super().truncate(size)

    def watched_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        inside = disk.inside(file) if set(mode) & set("wax+") else None
        if inside is None:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        with disk.lock:
            if isinstance(file, int):  # a file without a name, open already
                raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            else:
                disk.call("open", inside)
                raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
                created(inside)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = watched_open  # type: ignore[assignment]


def void(value: object) -> None:
    """Nothing of it."""


# -- runs --------------------------------------------------------------------------------------------


def forked(root: Path, command: list[str], mode: str, at: int) -> tuple[int, Path]:
    """Run a command of the program in a process of its own, with a fault; its exit code, and what it said.

    Without a command, it is looked what of all that is vouched for is not there.
    """
    said = root.parent / "said.txt"
    child = os.fork()
    if child == 0:
        try:
            fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            from lorashare_stream.cli.app import main

            disk = None
            if mode != "none":
                disk = Disk(root, mode, at)
                seen = audited(disk)
                before = written()
                install(disk)
            code = main(command) if command else kept_promises(root)
            if disk is not None and mode == "count":
                # Nothing slipped past: the interpreter saw as many files opened, the kernel as many bytes written.
                sys.stdout.flush()
                kernel = written() - before - os.fstat(1).st_size
                counts = [disk.calls, disk.opened, seen[0], disk.bytes, kernel]
                real["write"](1, f"@{json.dumps(counts)}\n".encode())
        except BaseException:
            import traceback

            real["write"](2, traceback.format_exc().encode())
            code = 98
        real["_exit"](code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


def audited(disk: Disk) -> list[int]:
    """Counts the files under the root that the interpreter opens for writing."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and not isinstance(arguments[0], int):
            writing = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            seen[0] += bool(writing and disk.inside(arguments[0]))

    sys.addaudithook(hook)
    return seen


def written() -> int:
    """Bytes that this process has written, by the kernel's count."""
    with real_open("/proc/self/io") as f:
        return int(next(line for line in f if line.startswith("wchar")).split()[1])


def tree(root: Path) -> dict[str, bytes]:
    """Path -> content of all files."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def torn(out: Path) -> str | None:
    """Why what a reader finds is half a checkpoint; None if it is whole, or none."""
    try:
        return torn_part(out)
    except (OSError, ValueError, KeyError) as e:
        return f"{type(e).__name__}: {e}"


def torn_part(out: Path) -> str | None:
    """See `torn`."""
    try:
        config = json.loads((out / "share_config.json").read_bytes())
    except FileNotFoundError:
        return f"no configuration in {sorted(os.listdir(out))}" if out.exists() and os.listdir(out) else None
    if config.get("coded"):
        return torn_pack(out, config["coded"])
    ours = config["compression_stats"]["lorashare_stream"]
    for name in config["adapter_names"]:
        folder = out / "adapters" / name
        meta = json.loads((folder / "adapter_meta.json").read_bytes())["lorashare_stream"]
        if meta["basis_digest"] != ours["basis_digest"] or not (folder / "loadings.safetensors").stat().st_size:
            return f"{name} does not belong to its basis"
    return None


def torn_pack(out: Path, coded: dict[str, Any]) -> str | None:
    """Why a coded checkpoint is not whole."""
    from lorashare_stream.checkpoint.index import index_of
    from lorashare_stream.checkpoint.packs import check_pack
    from lorashare_stream.errors import CheckpointError

    try:
        for pack in index_of(out, coded).packs:
            check_pack(out / pack.file, pack)
    except CheckpointError as e:
        return str(e)
    return None


def kept_promises(root: Path) -> int:
    """0 if all that is vouched for is there, whole; else 1, and it is said."""
    fault = broken_promise(root)
    if fault is not None:
        print(fault, flush=True)
    return fault is not None


def left_over(root: Path) -> list[str]:
    """Temporary files, ours and those of zarr."""
    return sorted(map(str, (*root.rglob(".*"), *root.rglob("*.partial"))))


def broken_promise(root: Path) -> str | None:
    """What is vouched for, by a marker or a configuration, and is not there, whole."""
    from lorashare_stream.adapters.folder import digest_files
    from lorashare_stream.checkpoint.format import SHARED
    from lorashare_stream.checkpoint.records import admission_in, is_whole, metas_of
    from lorashare_stream.files import read_sealed
    from lorashare_stream.workspace import moments as momentstore
    from lorashare_stream.workspace.moments import DamagedMoment
    from lorashare_stream.workspace.workspace import Workspace

    work, out = Workspace(root / "out.workspace"), root / "out"
    for module, marker in work.markers.items():
        try:
            for record in marker.sides.values():
                momentstore.load(work.moments, record)
        except DamagedMoment as e:
            return f"the moments of {module}: {e}"
    for facts in work.bases.glob("*/*.json"):
        of, known = facts.with_suffix("" if facts.stem == SHARED else ".safetensors"), read_sealed(facts)
        if known and digest_files([of]) != known["digest"]:
            return f"the components of {facts}"
    if (out / "share_config.json").exists():
        config = json.loads((out / "share_config.json").read_bytes())
        if config.get("coded"):
            return torn_pack(out, config["coded"])
        for meta in metas_of(out, config["adapter_names"]):
            if not is_whole(out, admission_in(meta), meta.ours.basis_digest):
                return f"adapter {meta.adapter_name}"
    return None


def scenario(name: str, root: Path) -> tuple[list[list[str]], list[str]]:
    """Commands that prepare a folder, and the one that is interrupted."""
    a, b, out = str(root / "a"), str(root / "b"), str(root / "out")
    quiet = ["-q", "--device", "cpu", "--workers", "1"]
    fresh = ["compress", a, "-o", out, "-k", "3", *quiet]
    coded = ["compress", a, "-o", out, "--max-error", "0.3", *quiet]
    on = ["compress", a, "-o", out, "--max-error", "0.2", "--directions", *quiet]
    return {
        "directions": ([], on),
        "directions-bytes": ([], ["compress", a, "-o", out, "--ratio", "2.5", "--directions", *quiet]),
        "directions-add": ([on], ["add", out, b, *quiet]),
        "directions-remove": ([on], ["remove", out, "a01", "--refit", *quiet]),
        "directions-refit": ([on, ["add", out, b, *quiet]], ["refit", out, "-o", out, *quiet]),
        "code": ([], coded),
        "code-bytes": ([], ["compress", a, "-o", out, "--ratio", "2.5", *quiet]),
        "code-add": ([coded], ["add", out, b, *quiet]),
        "code-remove": ([coded], ["remove", out, "a01", *quiet]),
        "code-refit": ([coded], ["refit", out, "--max-error", "0.1", "-o", out, *quiet]),
        "code-share": ([fresh], ["refit", out, "--max-error", "0.1", "-o", out, *quiet]),
        "compress": ([], fresh),
        "replace": ([fresh], ["compress", a, "-o", out, "-k", "2", *quiet]),
        "project": ([fresh], ["add", out, b, "--variance", "0.01", *quiet]),
        "recompute": ([fresh], ["add", out, b, "--variance", "1.0", *quiet]),
        "remove": ([fresh], ["remove", out, "a01", *quiet]),
        "remove-refit": ([fresh], ["remove", out, "a01", "--refit", *quiet]),
        "slice": ([fresh], ["refit", out, "-k", "2", "-o", out, *quiet]),
        "discard": ([], [*fresh, "--discard-moments"]),
    }[name]


def crashes(folder: Path, name: str, mode: str, stride: int = 1, first: int = 1) -> Iterator[str]:
    """What went wrong, of a scenario with a fault at every call, or every few from the first."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    executors.local_executor = lambda processes: executors.SerialExecutor()  # calls are counted in one process
    root, start = folder / "root", folder / "start"
    modules = {"q": (20, 6)}  # of 8 vectors: A is kept as stacked columns, B as a second moment
    if name == "code-bytes":  # what is recorded is not most of the bytes
        modules = {"q": (400, 300)}
    if name.startswith("directions"):  # which pay
        make_akin(root / "a", 4, {"q": (200, 150)})
        make_akin(root / "b", 1, {"q": (200, 150)}, seed=1)
    else:
        make_collection(root / "a", 2, modules)
        make_collection(root / "b", 1, modules, seed=1)
    prepare, command = scenario(name, root)
    for earlier in prepare:
        code, said = forked(root, earlier, "none", 0)
        assert code == 0, said.read_text()
        (root / "out" / "README.md").write_text("of the user\n")
    shutil.copytree(root, start)
    code, said = forked(root, command, "count", 0)
    text = said.read_text()
    assert code == 0, text
    calls, opened, seen, wrote, kernel = json.loads(text[text.index("@") + 1 :])
    expected = tree(root / "out")
    beside = sorted(p.name for p in root.iterdir())
    if (opened, wrote) != (seen, kernel):
        yield f"calls slipped past: {opened} of {seen} files opened, {wrote} of {kernel} bytes written"
    tried = range(first, len(calls) + 1, stride)
    for at in tried:
        shutil.rmtree(root)
        shutil.copytree(start, root)
        code, said = forked(root, command, mode, at)
        where = f"{mode} at call {at} of {len(calls)}, {calls[at - 1]}"
        if code != (75 if mode == "full" else KILLED) and not (mode == "full" and code == 0):
            yield f"{where}: exit code {code}: {said.read_text()[-500:]}"
        if mode == "full" and code == 75 and not 0 < len(said.read_text().splitlines()) <= 1:
            yield f"{where}: not one sentence: {said.read_text()}"
        if (fault := torn(root / "out")) is not None:
            yield f"{where}: a reader finds {fault}"
        code, said = (0, said) if mode == "full" else forked(root, [], "none", 0)
        if code != 0:
            yield f"{where}: vouched for, and not there: {said.read_text()[-500:]}"
        code, said = forked(root, command, "none", 0)
        if code != 0:
            yield f"{where}: the next run ends with {code}: {said.read_text()[-1500:]}"
        elif tree(root / "out") != expected:
            now = tree(root / "out")
            other = [n for n in expected.keys() | now.keys() if now.get(n) != expected.get(n)]
            yield f"{where}: other bytes in {other}"
        elif sorted(p.name for p in root.iterdir()) != beside or left_over(root):
            yield f"{where}: left over {left_over(root)}"
    print(json.dumps({"scenario": name, "mode": mode, "calls": len(calls), "tried": len(tried)}))


def report(folder: str, name: str, mode: str, stride: str = "1", first: str = "1") -> int:
    """Print what went wrong; 1 if anything did."""
    faults = list(crashes(Path(folder), name, mode, int(stride), int(first)))
    print("\n".join(faults[:40]), flush=True)
    return bool(faults)


def serve() -> None:
    """Answer lines of arguments, each by a fork of this process, which has imported all of it already."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 98
            try:
                code = report(*json.loads(line))
            finally:
                real["_exit"](code)
        print(f"@{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    sys.exit(report(*sys.argv[1:]) if sys.argv[1:] else serve())
