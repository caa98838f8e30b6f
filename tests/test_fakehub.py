"""The fake Hub, by the real client."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    list_models,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .fakehub import ALICE, FakeHub, environment, patched

BASE = "org/base"
CONFIG = b'{"r": 4}'
WEIGHTS = bytes(range(256)) * 64
pytestmark = pytest.mark.slow  # the tests with a Hub would not pass without it
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the client, of its own PUT


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home")
        yield hub


def add(hub: FakeHub, repo: str = "bob/a", **options: object) -> str:
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
    return hub.add(repo, files, base_model=BASE, **options)  # type: ignore[arg-type]


def test_listing_goes_page_by_page(hub: FakeHub) -> None:
    hub.page_size = 10
    shas = {f"bob/m{i:03}": add(hub, f"bob/m{i:03}", downloads=i, license="mit") for i in range(25)}
    hub.add("org/base", {}, peft_type=None)
    add(hub, "eve/secret", private=True)
    expand = ["sha", "siblings", "gated", "config", "cardData", "baseModels", "usedStorage", "downloads"]
    found = list(HfApi().list_models(filter=[f"base_model:adapter:{BASE}", "lora"], sort="downloads", expand=expand))
    assert [m.id for m in found] == sorted(shas, reverse=True)
    assert all(m.sha == shas[m.id] and m.gated is False for m in found)
    assert found[0].downloads == 24
    assert [(s.rfilename, s.size) for s in found[0].siblings] == [
        ("adapter_config.json", None),
        ("adapter_model.safetensors", None),
    ]
    assert found[0].config == {"peft": {"base_model_name_or_path": BASE, "task_type": None, "peft_type": "LORA"}}
    assert (found[0].card_data.license, found[0].card_data.base_model) == ("mit", BASE)
    assert hub.count("list") == 3
    assert len(list(list_models(author="bob", limit=12))) == 12  # the module's own client
    assert hub.count("list") == 5
    assert {m.id for m in HfApi(token=ALICE).list_models(search="SECRET")} == set()
    hub.users[ALICE].add("eve/secret")
    assert {m.id for m in HfApi(token=ALICE).list_models(search="SECRET")} == {"eve/secret"}


def test_info(hub: FakeHub) -> None:
    old = add(hub, gated="manual")
    new = hub.update("bob/a", {"adapter_config.json": None, "x/y.txt": b"1"})
    info = HfApi().model_info("bob/a", files_metadata=True)
    assert (info.sha, info.gated, info.private) == (new, "manual", False)
    assert [(s.rfilename, s.size, bool(s.lfs)) for s in info.siblings] == [
        ("adapter_model.safetensors", len(WEIGHTS), True),
        ("x/y.txt", 1, False),
    ]
    assert HfApi().model_info("bob/a", revision=old).sha == old
    assert HfApi().model_info("bob/a", expand=["sha"]).siblings is None
    assert HfApi().whoami(token=ALICE)["name"] == "alice"


def test_downloads_of_a_pinned_revision(hub: FakeHub) -> None:
    sha = add(hub)
    hub.update("bob/a", {"adapter_config.json": b"{}"})
    path = hf_hub_download("bob/a", "adapter_config.json", revision=sha)
    assert Path(path).read_bytes() == CONFIG
    assert Path(path).is_relative_to(constants.HF_HUB_CACHE)
    assert [(r.method, r.kind, r.file, r.revision, r.sent, r.whole) for r in hub.requests] == [
        ("HEAD", "resolve", "adapter_config.json", sha, 0, True),
        ("GET", "resolve", "adapter_config.json", sha, len(CONFIG), True),
    ]
    hf_hub_download("bob/a", "adapter_config.json", revision=sha)
    assert len(hub.requests) == 2
    folder = Path(snapshot_download("bob/a"))
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "adapter_config.json").read_bytes() == b"{}"
    assert hub.count("info") == hub.count("tree") == 1


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10]),
        (f"bytes={len(WEIGHTS) - 5}-", 206, WEIGHTS[-5:]),
        ("bytes=-7", 206, WEIGHTS[-7:]),
        (f"bytes={len(WEIGHTS)}-", 416, b""),
        ("lines=1-2", 200, WEIGHTS),
    ],
)
def test_ranges(hub: FakeHub, wanted: str, status: int, part: bytes) -> None:
    url = hf_hub_url("bob/a", "adapter_model.safetensors", revision=add(hub))
    hub.fault(ignore_range=True)
    assert get_session().get(url).content == WEIGHTS
    assert get_session().get(url, headers={"Range": wanted}).content == WEIGHTS
    answer = get_session().get(url, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (status, part)
    assert hub.requests[-1].range == wanted


def test_what_is_missing_or_not_allowed(hub: FakeHub) -> None:
    sha = add(hub)
    add(hub, "bob/gated", gated="auto")
    add(hub, "bob/private", private=True)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("bob/a", "none.json", revision=sha)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("bob/a", "adapter_config.json", revision="none")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("bob/a", revision="none")
    for token, status in ((None, 401), (ALICE, 403)):
        with pytest.raises(GatedRepoError) as gated:
            hf_hub_download("bob/gated", "adapter_config.json", token=token)
        assert gated.value.response.status_code == status
    assert HfApi().model_info("bob/gated").gated == "auto"
    for repo in ("bob/private", "bob/none"):
        with pytest.raises(RepositoryNotFoundError) as missing:
            HfApi().model_info(repo)
        assert not isinstance(missing.value, GatedRepoError)
    hub.users[ALICE] |= {"bob/gated", "bob/private"}
    for repo in hub.users[ALICE]:
        assert Path(hf_hub_download(repo, "adapter_config.json", token=ALICE)).read_bytes() == CONFIG
    assert hub.requests[-1].token == ALICE


def test_a_rate_limit_is_waited_out(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time", time)  # whose pauses `patched` cuts
    add(hub)
    hub.fault(kind="list", status=429, headers={"RateLimit": '"api";r=0;t=1'})
    start = time.monotonic()
    assert [m.id for m in HfApi().list_models()] == ["bob/a"]
    assert time.monotonic() - start > 1
    assert [r.status for r in hub.requests] == [429, 200]
    hub.fault(kind="info", repo="bob/*", status=503, times=None)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError):
            HfApi().model_info("bob/a")
    hub.clear_faults()
    assert HfApi().model_info("bob/a")


def test_a_cut_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = add(hub)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a cut body are whole chunks
    hub.fault(cut_after=2500, reset=False)
    path = hf_hub_download("bob/a", "adapter_model.safetensors", revision=sha)
    assert Path(path).read_bytes() == WEIGHTS
    gets = [(r.range, r.sent, r.whole) for r in hub.requests if r.method == "GET"]
    assert gets == [(None, 2500, False), ("bytes=2000-", len(WEIGHTS) - 2000, True)]


def drain(answer: httpx2.Response, into: bytearray) -> None:
    for part in answer.iter_raw():
        into.extend(part)


def test_a_reset_is_an_error_of_the_client(hub: FakeHub) -> None:
    data = bytes(20 << 20)
    sha = hub.add("bob/big", {"big.bin": data})
    hub.fault(method="GET", cut_after=15 << 20)
    with get_session().stream("GET", hf_hub_url("bob/big", "big.bin", revision=sha)) as answer:
        got = bytearray()
        with pytest.raises(httpx2.ReadError):
            drain(answer, got)
    assert len(got) == 15 << 20
    hub.fault(cut_after=5)
    with pytest.raises(httpx2.ReadError):
        hf_hub_download("bob/big", "big.bin", revision=sha)
    assert Path(hf_hub_download("bob/big", "big.bin", revision=sha)).read_bytes() == data


def test_an_outage_and_a_delay(hub: FakeHub) -> None:
    add(hub)
    with hub.outage(), pytest.raises(httpx2.RemoteProtocolError):
        HfApi().model_info("bob/a")
    hub.fault(drop=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        HfApi().model_info("bob/a")
    assert [r.status for r in hub.requests] == [0, 0]
    hub.fault(delay=0.2)
    start = time.monotonic()
    assert HfApi().model_info("bob/a")
    assert time.monotonic() - start > 0.2


@uploads
def test_uploads(hub: FakeHub) -> None:
    api = HfApi(token=ALICE)
    with pytest.raises(HfHubHTTPError):
        HfApi().create_repo("alice/new")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("bob/new")
    assert api.create_repo("new", private=True).repo_id == "alice/new"
    with pytest.raises(HfHubHTTPError):
        api.create_repo("alice/new")
    api.create_repo("alice/new", exist_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("alice/new")
    files = {"README.md": b"---\nlicense: mit\n---\n", "a/b/w.safetensors": WEIGHTS, "a/c.json": CONFIG}
    made = api.create_commit(
        "alice/new", [CommitOperationAdd(path, data) for path, data in files.items()], commit_message="all"
    )
    assert {k: v for k, v in hub.files("alice/new", made.oid).items() if k != ".gitattributes"} == files
    assert hub.count("lfs-put") == 1
    tree = {f.path: f for f in api.list_repo_tree("alice/new", recursive=True, revision=made.oid)}
    assert set(tree) == {*files, ".gitattributes", "a", "a/b"}
    assert tree["a/b/w.safetensors"].lfs.size == len(WEIGHTS)
    assert {f.path for f in api.list_repo_tree("alice/new", "a")} == {"a/b", "a/c.json"}

    same = api.create_commit("alice/new", [CommitOperationAdd("a/c.json", CONFIG)], commit_message="same")
    assert same.oid == made.oid  # nothing was sent
    api.create_commit("alice/new", [CommitOperationAdd("v.bin", WEIGHTS)], commit_message="known object")
    assert hub.count("lfs-put") == 1
    gone = [CommitOperationDelete("a/"), CommitOperationDelete("README.md")]
    with pytest.raises(HfHubHTTPError):
        api.create_commit("alice/new", gone, commit_message="late", parent_commit=made.oid)
    api.create_commit("alice/new", gone, commit_message="gone")
    assert set(hub.files("alice/new")) == {".gitattributes", "v.bin"}
    api.create_branch("alice/new", branch="dev/x", revision=made.oid)
    assert hub.files("alice/new", "dev/x") == hub.files("alice/new", made.oid)


@uploads
def test_a_pull_request(hub: FakeHub) -> None:
    sha = add(hub)
    api = HfApi(token=ALICE)
    adds = [CommitOperationAdd("new.bin", b"data" * 100), CommitOperationAdd("new.txt", b"text")]
    with pytest.raises(HfHubHTTPError):
        api.create_commit("bob/a", adds, commit_message="not mine")
    made = api.create_commit("bob/a", adds, commit_message="please", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert HfApi().model_info("bob/a", revision="refs/pr/1").sha == made.oid
    assert HfApi().model_info("bob/a").sha == sha
    assert Path(hf_hub_download("bob/a", "new.txt", revision="refs/pr/1")).read_bytes() == b"text"


def test_a_subprocess(hub: FakeHub, tmp_path: Path) -> None:
    sha = add(hub, private=True)
    hub.users[ALICE].add("bob/a")
    program = "import json, huggingface_hub as h; print(json.dumps([h.model_info('bob/a').sha, h.whoami()['name']]))"
    env = environment(hub, tmp_path / "other", ALICE)
    done = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout) == [sha, "alice"]


def test_many_clients_at_once(hub: FakeHub) -> None:
    url = hf_hub_url("bob/a", "adapter_model.safetensors", revision=add(hub))
    before = threading.active_count()
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: get_session().get(url).content == WEIGHTS, range(800))) == {True}
    assert hub.count("resolve", method="GET") == 800
    assert threading.active_count() - before <= 200  # connections are kept: not one thread a request


def test_everything_is_put_back(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        from huggingface_hub.utils import _cache_manager

        return constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, _cache_manager.HF_HUB_CACHE

    before = state()
    assert constants.HF_HUB_OFFLINE  # as conftest has it, and the client was imported with it
    with pytest.MonkeyPatch.context() as monkeypatch, FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path)
        assert state() == (hub.url, str(tmp_path / "hub"), False, str(tmp_path / "hub"))
    assert state() == before
