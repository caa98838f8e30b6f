"""The pages: links and names of files lead somewhere, and what GitHub and pre-commit read is what they can read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
OF_A_WORKSPACE = {"hub/facts.jsonl", "hub/files"}  # which has a folder that is called as a room
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_of_the_repository_that_are_named_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it tells of what was
        return
    for name in re.findall(r"`((?:\.ci|configs|docs|scripts|tests)/[\w./-]*)", page.read_text()):
        assert (ROOT / name).exists(), name
    package = ROOT / "lorashare_stream"
    rooms = "|".join(p.name for p in package.iterdir() if p.is_dir() and p.name != "adapters")
    for name in re.findall(rf"`((?:{rooms})/[\w.]+)`", page.read_text()):
        module = package / f"{name.partition('.')[0]}.py"  # `stages/ingest.py`, `stages/ingest`, or a name in it
        assert (package / name).exists() or module.exists() or name in OF_A_WORKSPACE, name


def test_hooks_are_programs_of_the_environment() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["entry"].split()[0] for hook in hooks] == ["ruff", "ruff", "mypy"]
    assert {hook["language"] for hook in hooks} == {"system"}


def test_the_workflow_runs_the_test_command_of_the_readme() -> None:
    workflow = read(".github/workflows/ci.yml")
    assert workflow.keys() >= {"name", "jobs", "permissions"} | {True}  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]  # text: 3.10 would be 3.1
    script = job["steps"][-1]["run"].split()[-1]
    assert os.access(ROOT / script, os.X_OK)
    assert f"\n{script} " in (ROOT / "README.md").read_text()


def test_a_bug_comes_with_its_plan_and_versions() -> None:
    form = read(".github/ISSUE_TEMPLATE/bug.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    asked = {field["id"]: field for field in form["body"]}
    demanded = [name for name, field in asked.items() if field.get("validations", {}).get("required")]
    assert demanded == ["what", "plan", "versions"]
    assert "plan SOURCES ... --json" in asked["plan"]["attributes"]["description"]
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in asked.values())
