"""The documentation points at things that exist."""

import re
from pathlib import Path

import pytest

from tests.server import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def prose(page: Path) -> str:
    """The page without fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", prose(page), re.MULTILINE)
    for link in (inline or reference for inline, reference in links):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_make_target_in_the_documentation_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|\$ )make ([a-z]+)", prose(page)))
        assert named <= targets, f"{page.name}: no target {named - targets}"


def test_the_readme_lists_every_make_target() -> None:
    described = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    listed = set(re.findall(r"`make ([a-z]+)`", (ROOT / "README.md").read_text()))
    assert described - {"help"} == listed


def test_every_script_in_the_documentation_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"script/(\w+)", prose(page)):
            assert (ROOT / "script" / name).is_file(), f"{page.name}: no script/{name}"


def test_the_changelogs_newest_version_is_the_packages() -> None:
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "lmtp" / "__init__.py").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version
    assert newest
    assert newest[1] == version[1]


def test_the_workflow_runs_what_ci_runs() -> None:
    assert "- run: bash .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert {"make lint", "make test"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
