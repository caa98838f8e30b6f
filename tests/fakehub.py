"""A Hugging Face Hub on 127.0.0.1, in memory: what the real client asks of it, and the faults that a test wants.

with FakeHub() as hub:
    sha = hub.add("alice/a", {"adapter_config.json": b"{}"}, base_model="org/base")
    hub.fault(kind="resolve", status=429, headers={"RateLimit": '"resolvers";r=0;t=1'})
    patched(monkeypatch, hub, tmp_path)  # calls in this process; environment(hub, tmp_path) for subprocesses
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import importlib
import json
import os
import re
import socket
import struct
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlencode

import pytest

ALICE = "hf_test_token_of_alice"
CHUNK = 1 << 18  # bytes sent at once
TREE_PAGE = 1000
Gated = Literal[False, "auto", "manual"]
Files = dict[str, bytes]


@dataclass
class Request:
    """One request; dropped without an answer if `status` is 0."""

    method: str
    path: str
    query: str
    kind: str = "other"
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    status: int = 0
    range: str | None = None
    sent: int = 0  # bytes of the body
    whole: bool = False  # whether all of the announced body was sent
    token: str | None = None
    body: bytes = field(default=b"", repr=False)  # what was received, until it is answered

    def values(self, key: str) -> list[str]:
        return parse_qs(self.query).get(key, [])

    def value(self, key: str, default: str = "") -> str:
        return (self.values(key) or [default])[0]

    def true(self, key: str) -> bool:
        return self.value(key).lower() in ("true", "1")

    def fits(self, kind: str | None, method: str | None, repo: str | None, file: str | None) -> bool:
        wanted = ((self.kind, kind), (self.method, method), (self.repo, repo), (self.file, file))
        return all(want is None or fnmatchcase(has or "", want) for has, want in wanted)


@dataclass
class Repo:
    """One repository: commits by sha, and refs ("main", branches, "refs/pr/1") to them."""

    id: str
    gated: Gated = False
    private: bool = False
    base_models: list[str] = field(default_factory=list)
    license: str | None = None
    downloads: int = 0
    likes: int = 0
    tags: list[str] = field(default_factory=list)
    peft: dict[str, Any] | None = None  # what the Hub says of the adapter's config
    created: str = ""
    commits: dict[str, Files] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: Files = field(default_factory=dict)  # by SHA-256
    pulls: int = 0

    def all_tags(self) -> list[str]:
        tags = [*self.tags, *(f"base_model:{base}" for base in self.base_models)]
        if self.peft:
            tags += ["peft", *(f"base_model:adapter:{base}" for base in self.base_models)]
            tags += ["lora"] if self.peft.get("peft_type") == "LORA" else []
        return list(dict.fromkeys(tags + ([f"license:{self.license}"] if self.license else [])))


@dataclass(kw_only=True)
class Fault:
    """See `FakeHub.fault`."""

    kind: str | None = None
    method: str | None = None
    repo: str | None = None
    file: str | None = None
    times: int | None = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    reset: bool = True
    delay: float = 0
    drop: bool = False
    ignore_range: bool = False

    def fits(self, request: Request) -> bool:
        nothing_to_do = (self.cut_after is not None and request.method == "HEAD") or (
            self.ignore_range and request.range is None
        )
        return self.times != 0 and not nothing_to_do and request.fits(self.kind, self.method, self.repo, self.file)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str) -> None:
        super().__init__(message or code or HTTPStatus(status).phrase)
        named = {"X-Error-Code": code} if code else {}
        self.answer = _json({"error": str(self)}, status, named | {"X-Error-Message": str(self)} | headers)


class FakeHub:
    """The server; a context manager.

    `requests` are what was served; one is listed before its client can have all of the answer. `users` are the tokens
    that may read and write: what is after the last "_" is the user's name, which is the namespace they own, and the
    set names the gated and private repositories of others that they may read.
    """

    def __init__(self, page_size: int = 100) -> None:
        self.page_size = page_size
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, set[str]] = {ALICE: set()}
        self._faults: list[Fault] = []
        self._down = False
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._digests: dict[bytes, tuple[str, str]] = {}
        self._n_commits = 0
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.hang_up()

    # What is in it

    def add(
        self, repo_id: str, files: Mapping[str, bytes], *, gated: Gated = False, private: bool = False,
        base_model: str | Sequence[str] | None = None, license: str | None = None,  # noqa: A002
        downloads: int = 0, likes: int = 0, tags: Iterable[str] = (), peft_type: str | None = "LORA",
    ) -> str:  # fmt: skip
        """Make a repository, and give its commit; `peft_type=None` is a config the Hub names no type for."""
        bases = [base_model] if isinstance(base_model, str) else list(base_model or ())
        peft: dict[str, Any] = {"base_model_name_or_path": bases[0] if bases else None, "task_type": None}
        peft |= {"peft_type": peft_type} if peft_type else {}
        with self._lock:
            if repo_id in self.repos:
                raise ValueError(f"{repo_id} exists: update() it")
            repo = Repo(repo_id, gated, private, bases, license, downloads, likes, list(tags), peft)
            return self._make(repo, files)

    def update(self, repo_id: str, files: Mapping[str, bytes | None]) -> str:
        """A new commit on main; None deletes a file. Old commits stay."""
        with self._lock:
            repo = self.repos[repo_id]
            changed = {**repo.commits[repo.refs["main"]], **files}
            return self._commit(repo, {k: v for k, v in changed.items() if v is not None}, "main", repo.refs["main"])

    def files(self, repo_id: str, revision: str = "main") -> Files:
        repo = self.repos[repo_id]
        return dict(repo.commits[repo.refs.get(revision, revision)])

    def _make(self, repo: Repo, files: Mapping[str, bytes]) -> str:
        sha = self._commit(repo, dict(files), "main", None)
        repo.created = repo.dates[sha]
        self.repos[repo.id] = repo
        return sha

    def _commit(self, repo: Repo, files: Files, ref: str, parent: str | None) -> str:
        lines = [f"{repo.id} {parent}", *(f"{path} {self._digest(files[path])[0]}" for path in sorted(files))]
        sha = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        self._n_commits += 1
        when = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=self._n_commits)
        repo.commits[sha], repo.refs[ref] = files, sha
        repo.dates.setdefault(sha, when.strftime("%Y-%m-%dT%H:%M:%S.000Z"))
        repo.lfs |= {self._digest(data)[1]: data for path, data in files.items() if _is_lfs(path, len(data))}
        return sha

    def _digest(self, data: bytes) -> tuple[str, str]:
        """SHA-1 as a git blob, and SHA-256."""
        if data not in self._digests:
            self._digests[data] = _git_sha(data), hashlib.sha256(data).hexdigest()
        return self._digests[data]

    # What was asked of it, and what goes wrong

    def count(
        self, kind: str | None = None, *, method: str | None = None, repo: str | None = None, file: str | None = None
    ) -> int:
        """How many requests there were; all may be patterns."""
        with self._lock:
            return sum(request.fits(kind, method, repo, file) for request in self.requests)

    def fault(self, **what: Any) -> None:
        """Let the next `times` requests that fit (1; None: all from now on) go wrong; the first fault that fits counts.

        Args:
            what: the fields of `Fault`. Which requests: `kind`, `method`, `repo`, `file`; patterns. `delay`: seconds
                before what else happens. `status`, with `headers` and `body`: this answer. `cut_after`: the connection
                ends after so many bytes of the body, by a reset, or with `reset=False` orderly; HEAD is passed over.
                `drop`: the connection is closed without an answer. `ignore_range`: 200, and the whole file; what has
                no Range is passed over.
        """
        with self._lock:
            self._faults.append(Fault(**what))

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """While it holds, every request is dropped without an answer; they are listed, with status 0."""
        self._down = True
        try:
            yield
        finally:
            self._down = False

    def _fault_for(self, request: Request) -> Fault:
        with self._lock:
            if self._down:
                return Fault(drop=True)
            fault = next((fault for fault in self._faults if fault.fits(request)), Fault(times=None))
            fault.times = fault.times and fault.times - 1
            return fault

    # Who may what

    def _name(self, token: str | None) -> str | None:
        return token.rpartition("_")[2] if token in self.users else None  # type: ignore[union-attr]

    def _may_read(self, token: str | None, repo: Repo) -> bool:
        return token in self.users and (repo.id in self.users[token] or self._owns(token, repo.id))

    def _owns(self, token: str | None, repo_id: str) -> bool:
        return self._name(token) == repo_id.partition("/")[0]

    def _writer(self, request: Request, repo_id: str | None = None) -> str:
        name = self._name(request.token)
        if name is None:
            raise Refused(401, None, "Invalid credentials in Authorization header" if request.token else "Unauthorized")
        if repo_id and not self._owns(request.token, repo_id):
            raise Refused(403, None, "You don't have the rights to write to this repository")
        return name

    def _repo(self, request: Request) -> Repo:
        repo = self.repos.get(request.repo or "")
        if repo is None or (repo.private and not self._may_read(request.token, repo)):
            raise Refused(404 if repo is None or request.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _revision(self, repo: Repo, revision: str | None) -> str:
        name = (revision or "main").removeprefix("refs/heads/")
        sha = repo.refs.get(name, name)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Answers

    def _answer(self, request: Request, answer: Callable[[FakeHub, Request], Answer] | None) -> Answer:
        try:
            if answer is None:
                raise Refused(404, None, "Not found")
            return answer(self, request)
        except Refused as e:
            return e.answer
        except Exception:
            return Answer(500, traceback.format_exc().encode(), {"Content-Type": "text/plain"})

    def resolve(self, request: Request) -> Answer:
        repo = self._repo(request)
        if repo.gated and not self._may_read(request.token, repo):
            raise Refused(403 if request.token else 401, "GatedRepo", f"Access to model {repo.id} is restricted")
        sha = self._revision(repo, request.revision)
        data = repo.commits[sha].get(request.file or "")
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        lfs = _is_lfs(request.file or "", len(data))
        etag = f'"{self._digest(data)[lfs]}"'
        headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": sha, "ETag": etag}
        headers |= {"Accept-Ranges": "bytes"} | (
            {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))} if lfs else {}
        )
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
        if request.method == "HEAD" or not wanted or wanted[0] == "bytes=-":
            return Answer(200, data, headers)
        first, last = (int(x) if x else None for x in wanted.groups())
        if first is None:
            first, last = max(0, len(data) - (last or 0)), None
        end = len(data) if last is None else min(len(data), last + 1)
        if first >= end:
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        return Answer(206, data[first:end], headers | {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"})

    def about(self, repo: Repo, sha: str, *, blobs: bool = False) -> dict[str, Any]:
        """All that the Hub says of a model."""
        files, bases = repo.commits[sha], repo.base_models
        card = {"license": repo.license, "base_model": bases[0] if len(bases) == 1 else bases or None}
        siblings = [{"rfilename": path} | (self._blob(path, files[path]) if blobs else {}) for path in sorted(files)]
        return {
            "id": repo.id, "modelId": repo.id, "author": repo.id.rpartition("/")[0] or None, "sha": sha,
            "createdAt": repo.created, "lastModified": repo.dates[sha], "private": repo.private, "gated": repo.gated,
            "disabled": False, "downloads": repo.downloads, "likes": repo.likes, "trendingScore": repo.likes,
            "library_name": "peft" if repo.peft else None, "tags": repo.all_tags(),
            "cardData": {key: value for key, value in card.items() if value is not None},
            "config": {"peft": repo.peft} if repo.peft else {}, "siblings": siblings,
            "baseModels": {"relation": "adapter", "models": [{"id": base} for base in bases]} if bases else None,
            "usedStorage": sum(map(len, repo.lfs.values())),
        }  # fmt: skip

    def _blob(self, path: str, data: bytes) -> dict[str, Any]:
        sha1, sha256 = self._digest(data)
        if not _is_lfs(path, len(data)):
            return {"blobId": sha1, "size": len(data)}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        lfs = {"sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
        return {"blobId": _git_sha(pointer), "size": len(data), "lfs": lfs}

    def list_models(self, request: Request) -> Answer:
        with self._lock:
            repos = list(self.repos.values())
        wanted, author, search = set(request.values("filter")), request.value("author"), request.value("search").lower()
        found = [
            repo
            for repo in repos
            if (not repo.private or self._may_read(request.token, repo))
            and (not author or repo.id.startswith(f"{author}/"))
            and (not request.value("gated") or request.true("gated") == bool(repo.gated))
            and search in repo.id.lower()
            and wanted <= set(repo.all_tags())
        ]
        if sort := request.value("sort"):
            keys = {"createdAt": "created", "trendingScore": "likes"}
            last = sort == "lastModified"
            found.sort(
                key=lambda r: r.dates[r.refs["main"]] if last else getattr(r, keys.get(sort, sort)), reverse=True
            )
        full = ["author", "gated", "lastModified", "sha", "siblings"] if request.true("full") else []
        keys_wanted = request.values("expand") or [
            "modelId", "likes", "downloads", "private", "tags", "createdAt", "library_name", "trendingScore",
            *full, *(key for key in ("cardData", "config") if request.true(key)),
        ]  # fmt: skip
        size = min(self.page_size, int(request.value("limit") or self.page_size))
        return self._page(request, found, size, lambda repo: _only(self.about(repo, repo.refs["main"]), keys_wanted))

    def _page(
        self, request: Request, rows: Sequence[Any], size: int, printable: Callable[[Any], Any] = lambda row: row
    ) -> Answer:
        start = int(request.value("cursor", "0"))
        headers = {}
        if start + size < len(rows):
            query = urlencode(parse_qs(request.query) | {"cursor": [start + size]}, doseq=True)
            headers["Link"] = f'<{self.url}{request.path}?{query}>; rel="next"'
        return _json([printable(row) for row in rows[start : start + size]], headers=headers)

    def info(self, request: Request) -> Answer:
        repo = self._repo(request)
        about = self.about(repo, self._revision(repo, request.revision), blobs=request.true("blobs"))
        return _json(_only(about, request.values("expand") or list(about)))

    def tree(self, request: Request) -> Answer:
        repo = self._repo(request)
        sha = self._revision(repo, request.revision)
        files, folder = repo.commits[sha], f"{request.file.strip('/')}/" if request.file else ""
        below = sorted(path for path in files if path.startswith(folder))
        if not below and folder:
            raise Refused(404, "EntryNotFound", f"{request.file} does not exist on {request.revision}")
        rows: dict[str, dict[str, Any]] = {}
        for path in below:
            parents = [folder + str(p) for p in reversed(Path(path.removeprefix(folder)).parents) if str(p) != "."]
            for parent in parents if request.true("recursive") else parents[:1]:
                oid = hashlib.sha1(f"{sha} {parent}".encode()).hexdigest()
                rows.setdefault(parent, {"type": "directory", "oid": oid, "size": 0, "path": parent})
            if not parents or request.true("recursive"):
                blob = self._blob(path, files[path])
                rows[path] = {"type": "file", "oid": blob["blobId"], "size": blob["size"], "path": path}
                if lfs := blob.get("lfs"):
                    rows[path]["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        if request.true("expand"):
            last = {"id": sha, "title": "a commit", "date": repo.dates[sha]}
            rows = {path: row | {"lastCommit": last} for path, row in rows.items()}
        return self._page(request, list(rows.values()), TREE_PAGE)

    def whoami(self, request: Request) -> Answer:
        name = self._writer(request)
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": access})

    def create(self, request: Request) -> Answer:
        asked = json.loads(request.body)
        request.repo = f"{asked.get('organization') or self._writer(request)}/{asked['name']}"
        self._writer(request, request.repo)
        if asked.get("type") not in (None, "model"):
            raise Refused(400, None, "Models only")
        made = {"url": f"{self.url}/{request.repo}", "id": request.repo, "name": request.repo}
        with self._lock:
            if request.repo in self.repos:
                return _json(made | {"error": "You already created this model repo"}, 409)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            lfs = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in _LFS_SUFFIXES)
            self._make(Repo(request.repo, private=private), {".gitattributes": lfs.encode()})
        return _json(made)

    def preupload(self, request: Request) -> Answer:
        repo = self._writable(request)
        present = repo.commits[self._revision(repo, request.revision)]
        files = []
        for asked in json.loads(request.body)["files"]:
            path, lfs = asked["path"], _is_lfs(asked["path"], asked["size"])
            oid = self._digest(present[path])[lfs] if path in present else None
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": files})

    def lfs_batch(self, request: Request) -> Answer:
        repo = self._writable(request, pull=True)  # the client does not say here whether it is for a pull request
        objects = []
        for asked in json.loads(request.body)["objects"]:
            href = f"{self.url}/lfs-objects/{repo.id}/{asked['oid']}"
            actions: dict[str, Any] = (
                {} if asked["oid"] in repo.lfs else {"actions": {"upload": {"href": href, "header": {}}}}
            )
            objects.append({"oid": asked["oid"], "size": asked["size"], "authenticated": True} | actions)
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != request.file or request.repo not in self.repos:
            raise Refused(400, None, "not the announced object")
        with self._lock:
            self.repos[request.repo].lfs[request.file] = request.body
        return Answer()

    def commit(self, request: Request) -> Answer:
        pull = request.true("create_pr")
        with self._lock:
            repo = self._writable(request)
            parent, ref = self._revision(repo, request.revision), request.revision or "main"
            files = dict(repo.commits[parent])
            for line in filter(None, request.body.splitlines()):
                self._apply(repo, files, parent, **json.loads(line))
            if pull:
                repo.pulls += 1
                ref = f"refs/pr/{repo.pulls}"
            elif ref not in repo.refs:
                raise Refused(400, None, "A commit needs a branch")
            sha = self._commit(repo, files, ref, parent)
        made = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo.id}/commit/{sha}", "hookOutput": ""}
        url = f"{self.url}/{repo.id}/discussions/{repo.pulls}"
        return _json(made | ({"pullRequestUrl": url} if pull else {}))

    def _apply(self, repo: Repo, files: Files, parent: str, key: str, value: dict[str, Any]) -> None:
        """One line of a commit."""
        path = value.get("path", "")
        if key == "header":
            if value.get("parentCommit", parent) != parent:
                raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = repo.lfs[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(folder))]
            if not gone:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            for one in gone:
                del files[one]
        else:
            raise Refused(400, None, f"No such operation: {key}")

    def branch(self, request: Request) -> Answer:
        with self._lock:
            repo, name = self._writable(request), request.revision or ""
            start = self._revision(repo, json.loads(request.body or b"{}").get("startingPoint"))
            if name in repo.refs:
                raise Refused(409, None, f"Reference already exists: {name}")
            if name.startswith("refs/"):
                raise Refused(400, None, f"Invalid reference for a branch: {name}")
            repo.refs[name] = start
        return _json({"success": True})

    def _writable(self, request: Request, *, pull: bool = False) -> Repo:
        self._writer(request)
        repo = self._repo(request)
        self._writer(request, None if pull or request.true("create_pr") else repo.id)
        return repo


_LFS_SUFFIXES = (".safetensors", ".bin")
_REPO, _REV = r"(?P<repo>[^/]+/[^/]+?|[^/]+?)", r"(?P<rev>refs/(?:pr|heads)/[^/]+|[^/]+)"
_API = f"/api/models/{_REPO}"
_ROUTES: list[tuple[str, re.Pattern[str], str, Callable[[FakeHub, Request], Answer]]] = [
    (methods, re.compile(pattern), kind, answer)
    for methods, pattern, kind, answer in [
        ("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<file>.+)", "resolve", FakeHub.resolve),
        ("GET", "/api/models", "list", FakeHub.list_models),
        ("GET", f"{_API}/tree/{_REV}(?:/(?P<file>.*))?", "tree", FakeHub.tree),
        ("GET", f"{_API}(?:/revision/{_REV})?", "info", FakeHub.info),
        ("GET", "/api/whoami-v2", "whoami", FakeHub.whoami),
        ("POST", "/api/repos/create", "create", FakeHub.create),
        ("POST", "/api/validate-yaml", "validate-yaml", lambda *_: _json({"errors": [], "warnings": []})),
        ("POST", f"{_API}/preupload/{_REV}", "preupload", FakeHub.preupload),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs-batch", FakeHub.lfs_batch),
        ("PUT", f"/lfs-objects/{_REPO}/(?P<file>[0-9a-f]{{64}})", "lfs-put", FakeHub.lfs_put),
        ("POST", f"{_API}/commit/{_REV}", "commit", FakeHub.commit),
        ("POST", f"{_API}/branch/{_REV}", "branch", FakeHub.branch),
    ]
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, hub: FakeHub) -> None:
        self.hub = hub
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.open.discard(request)

    def hang_up(self) -> None:
        """End what is still connected, and wait for its threads to close it."""
        deadline = time.monotonic() + 5
        while self.open and time.monotonic() < deadline:
            for connection in list(self.open):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            time.sleep(0.001)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is none
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def serve(self) -> None:
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        request = Request(self.command, path, query, range=self.headers.get("Range"), body=self._body())
        request.token = token if scheme.lower() == "bearer" and token else None
        answer = None
        for methods, pattern, kind, one in _ROUTES:
            if self.command in methods.split() and (match := pattern.fullmatch(path)):
                named = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                request.repo, request.file, request.revision = map(named.get, ("repo", "file", "rev"))
                request.kind, answer = kind, one
                break
        fault = hub._fault_for(request)
        if fault.delay:
            hub._stopping.wait(fault.delay)
        if fault.drop or hub._down:
            self._record(request)
            self.close_connection = True
        elif fault.status is not None:
            self._send(request, Answer(fault.status, fault.body, fault.headers), fault)
        else:
            asked = replace(request, range=None) if fault.ignore_range else request
            self._send(request, hub._answer(asked, answer), fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = serve

    def _record(self, request: Request) -> None:
        request.body = b""
        with self.server.hub._lock:
            self.server.hub.requests.append(request)

    def _body(self) -> bytes:
        """All of it, so that the connection can be used again."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or "").lower():
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            if len(body) < length:
                raise ConnectionError("the client went away")
            return body
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _send(self, request: Request, answer: Answer, fault: Fault) -> None:
        reason = HTTPStatus(answer.status).phrase
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        head = f"HTTP/1.1 {answer.status} {reason}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        body = memoryview(b"" if request.method == "HEAD" else answer.body)
        end = len(body) if fault.cut_after is None else min(len(body), fault.cut_after)
        request.status, sent, recorded = answer.status, 0, False
        try:
            for at in range(0, max(1, end), CHUNK):
                part = body[at : min(end, at + CHUNK)]
                if at + CHUNK >= end:  # recorded before the client can have it all
                    request.sent, request.whole = end, end == len(body)
                    self._record(request)
                    recorded = True
                self.connection.sendall(part if at else head.encode("latin-1", "replace") + part)
                sent += len(part)
        except OSError:
            self.close_connection = True
            request.sent, request.whole = sent, False
            if not recorded:
                self._record(request)
        if fault.cut_after is not None:
            self.close_connection = True
            if fault.reset:
                self._reset()

    def _reset(self) -> None:
        """Reset the connection, once the client's side has what was sent."""
        deadline = time.monotonic() + 5
        while struct.unpack("i", fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))[0]:
            if time.monotonic() > deadline or self.server.hub._stopping.wait(0.001):
                break
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(_LFS_SUFFIXES) or size > 10 << 20


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _only(about: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {"id": about["id"], **{key: about[key] for key in keys if key in about}}


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


# The client

_UNSET = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE",
    "HF_ASSETS_CACHE", "HF_XET_CACHE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN",
)  # fmt: skip
_COPIES = ("cli.auth", "hf_api", "utils._cache_assets", "utils._cache_manager", "utils._git_credential", "utils.tqdm")
_ON = {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")}
_PLACES = {
    "HF_HUB_CACHE": "hub", "HUGGINGFACE_HUB_CACHE": "hub", "HF_ASSETS_CACHE": "assets", "HF_XET_CACHE": "xet",
    "HUGGINGFACE_ASSETS_CACHE": "assets", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens",
    "AGENT_HARNESSES_PATH": ".agent_harnesses.json", "CHECK_FOR_UPDATE_DONE_PATH": ".check_for_update_done",
}  # fmt: skip


def _settings(hub: FakeHub, home: Path, token: str | None) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return own | _ON | ({"HF_TOKEN": token} if token else {})


def environment(hub: FakeHub, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a subprocess whose Hub this is."""
    return {k: v for k, v in os.environ.items() if k not in _UNSET} | _settings(hub, home, token)


def patched(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, home: Path, token: str | None = None) -> None:
    """Let the client in this process, imported before or not, take `hub` for the Hub until `monkeypatch` is undone."""
    from huggingface_hub import close_session, hf_api
    from huggingface_hub.utils import _detect_agent, _http

    close_session()
    for name in _COPIES:  # now, or they would copy what is changed here for good
        importlib.import_module(f"huggingface_hub.{name}")
    for name in _UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in _settings(hub, home, token).items():
        monkeypatch.setenv(name, value)
    changes: dict[str, Any] = dict.fromkeys(_ON, True) | {"ENDPOINT": hub.url}
    changes |= {"HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}"}
    changes |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_IMPLICIT_TOKEN": False, "HF_HOME": str(home)}
    changes |= {key: str(home / place) for key, place in _PLACES.items()}
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "huggingface_hub"]:
        for key in vars(module).keys() & changes.keys():
            monkeypatch.setattr(module, key, changes[key])
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(_detect_agent, "_registry", _detect_agent._EMPTY_REGISTRY)  # else one request more
    brief = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.01)))
    monkeypatch.setattr(_http, "time", brief)  # its own pauses are 23 s before ours begin
    undone = type("Undone", (dict,), {"__delitem__": lambda *_: close_session()})  # what monkeypatch does at its end
    monkeypatch.setitem(undone(), "session", None)


def main(folder: str, base_model: str) -> None:
    """python -m tests.fakehub FOLDER BASE_MODEL: serve the adapters in a folder, as org/NAME, to try things by hand."""
    with FakeHub() as hub:
        for config in sorted(Path(folder).rglob("adapter_config.json")):
            files = {p.name: p.read_bytes() for p in config.parent.iterdir() if p.is_file()}
            hub.add(f"org/{config.parent.name.replace('--', '-')}", files, base_model=base_model, license="mit")
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ALICE}
        print(f"{len(hub.repos)} adapters; a user alice, who may push to alice/NAME", flush=True)
        print("export", *(f"{key}={value}" for key, value in own.items()), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:3])
