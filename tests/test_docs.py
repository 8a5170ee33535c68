"""The site: it builds strictly, its code runs, and what it quotes of the program is there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dualoptim.command_line import arguments
from dualoptim.losses import LOSSES

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    home = (tmp_path / "site/update_rule/index.html").read_text(encoding="utf-8")
    assert "update_rule.svg" in home
    assert '<a href="../benchmarks/tofu/"' in (tmp_path / "site/choosing/index.html").read_text(encoding="utf-8")
    assert (tmp_path / "site/examples/notebooks/optimizer.ipynb").exists()
    page = (tmp_path / "site/notebooks/index.html").read_text(encoding="utf-8")
    assert '<a href="../examples/notebooks/optimizer.ipynb"' in page
    assert "DualOptimPlus" in (tmp_path / "site/api/index.html").read_text(encoding="utf-8")


def test_every_page_stands_in_the_navigation_once() -> None:
    named = re.findall(r": (\w+\.md)$", text("mkdocs.yml"), re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_of_the_program_is_so(page: Path) -> None:
    said = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docs|benchmarks|examples|src|tests|recipes)/[\w./-]+)`", said):
        assert (ROOT / name).exists(), name
    parsers = arguments.parsers()
    known = {option for made in parsers.values() for action in made._actions for option in action.option_strings}
    for command, rest in re.findall(r"^(?:    )?dualoptim (\w+)(.*)$", said, re.MULTILINE):
        assert command in arguments.COMMANDS, command
        of = {option for action in parsers[command]._actions for option in action.option_strings}
        assert set(re.findall(r" (--[\w-]+)", rest.split("  #")[0])) <= of, rest
    assert set(re.findall(r"`(--[a-z0-9-]+)[ `]", said)) <= known | {"--print-completion", "--no-deps"}


def test_the_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCE)  # sentences that go on in the next line
    tables = text("docs/faq.md").split("## Error messages")[1]
    quoted = [part for row in re.findall(r"^\| (`.*?) \|", tables, re.MULTILINE) for part in re.findall("`(.+?)`", row)]
    assert len(quoted) > 130
    assert [part for part in quoted if part not in joined] == []


def test_every_loss_stands_in_the_list_of_methods_and_every_paper_in_the_index() -> None:
    methods, index = text("docs/methods.md"), text("docs/papers.md")
    assert [name for name in LOSSES if f"`{name}`" not in methods] == []
    papers = set(re.findall(r"arXiv (\d{4}\.\d{5})", "".join(str(cls.__doc__) for cls in LOSSES.values())))
    assert papers
    assert [paper for paper in sorted(papers) if paper not in index] == []
