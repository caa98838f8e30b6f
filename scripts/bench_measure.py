"""Runs one command and measures it: a small parent for scripts/bench.py, standard library only.

    python -I -S scripts/bench_measure.py '{"command": [...], "log": FILE, "seconds": S, "memory": BYTES, "files": N}'

Linux carries the peak of the memory that a process gives up at exec, its parent's after vfork, into its ru_maxrss: so
the parent must be small, and this one, at about 10 MB, is. Of a command that has processes of its own, all are looked
at five times a second, and their proportional sizes summed, in which a page that several have counts once. Bytes are
those of /proc/PID/io of the zombie, when all threads and processes have ended and nothing is reaped yet. A command over
its limits is killed. Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time

POLL = 0.2  # seconds; a look at three processes takes some milliseconds of a core


def measure(command: list[str], log: str, seconds: float, memory: int, files: int | None) -> dict[str, object]:
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # the command inherits it
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    actions = [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
    asked_by, begun = os.getppid(), time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    ended, status, together = os.pidfd_open(pid), "ok", 0
    try:
        while not select.select([ended], [], [], POLL)[0]:
            size = _resident(pid)
            together = max(together, size)
            if time.perf_counter() - begun > seconds:
                status = "time"
            elif size > memory:
                status = "memory"
            elif os.getppid() != asked_by:
                status = "orphaned"
            else:
                continue
            os.kill(pid, signal.SIGKILL)
            select.select([ended], [], [])
            break
    except BaseException:  # told to stop
        os.kill(pid, signal.SIGKILL)
        raise
    wall = time.perf_counter() - begun
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with open(f"/proc/{pid}/io") as f:
        io = {key: int(value) for key, value in (line.split(":") for line in f)}
    _, code, usage = os.wait4(pid, 0)
    exit_code = os.waitstatus_to_exitcode(code)
    if status == "ok" and exit_code != 0:
        status = "memory" if exit_code == -signal.SIGKILL else "failed"  # not our kill: the kernel's
    return {
        "status": status, "exit_code": exit_code, "wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": max(together, usage.ru_maxrss * 1024), "rchar": io["rchar"], "wchar": io["wchar"],
        "read_bytes": io["read_bytes"], "write_bytes": io["write_bytes"],
    }  # fmt: skip


def _resident(pid: int) -> int:
    """Bytes of a process, or of it and its descendants, if it has some."""
    pids = _tree(pid)
    return sum(_size(p, "Pss:", "smaps_rollup") for p in pids) if len(pids) > 1 else _size(pid, "VmRSS:", "status")


def _tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as f:
                found += [p for child in f.read().split() for p in _tree(int(child))]
    except OSError:  # it has just ended
        pass
    return found


def _size(pid: int, key: str, file: str) -> int:
    try:
        with open(f"/proc/{pid}/{file}") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith(key)), 0)
    except OSError:
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
