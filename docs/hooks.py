"""What the site needs of MkDocs: the pages of benchmarks/, the notebooks, links for all names, and doctests as code."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OTHERS = r"benchmarks/[\w/-]+\.md|examples/notebooks/\w+\.ipynb"
NAME = re.compile(rf"(?<!\[)`(?:docs/(?P<page>[\w/-]+\.md)|(?P<other>{OTHERS}))`")


def on_files(files: Any, config: Any) -> Any:
    """Add what benchmarks/ has of pages and reports, and the notebooks, at addresses of the same names."""
    for path in sorted([*(ROOT / "benchmarks").rglob("*"), *(ROOT / "examples/notebooks").glob("*")]):
        if path.suffix in (".md", ".html", ".ipynb"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Link the pages that a page names, such as `docs/runs.md`."""
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        target = found["page"] or found["other"]
        known = files.get_file_from_path(target) is not None
        return f"[`{target}`]({posixpath.relpath(target, here or '.')})" if known else found[0]

    return NAME.sub(link, markdown)


class Doctests(griffe.Extension):
    """Puts the doctests of docstrings into fences: in Markdown their lists would be links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change an object's docstring."""
        if obj.docstring and not obj.is_alias:
            block = re.compile(r"^(?P<indent> *)>>> .*(?:\n[ \t]*\S.*)*", re.MULTILINE)
            obj.docstring.value = block.sub(
                lambda found: f"{found['indent']}```python\n{found[0]}\n{found['indent']}```", obj.docstring.value
            )
