"""The losses and tasks, with formulas and when to use which, read from docstrings without loading torch.

`dualoptim ls` prints them, and `--help` names the losses, both in a fraction of a second.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]


class Entry(NamedTuple):
    """A loss: what it is for ("forget" or "retain"), its formula, and when to use it, which may be empty."""

    role: str
    formula: str
    use: str


def losses() -> dict[str, Entry]:
    """The losses of `dualoptim.losses`, in the order of its files.

    >>> losses()["KL"].role
    'retain'
    """
    found: dict[str, Entry] = {}
    for tree in _modules("losses"):
        for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            bases = [base.id for base in cls.bases if isinstance(base, ast.Name)]
            inherited = next((found[base].role for base in bases if base in found), "")
            if role := _text(cls, "role") or inherited:
                first, *rest = (ast.get_docstring(cls) or "").split("\n\n")
                use = next((part for part in rest if part.startswith("Use it ")), "")
                found[cls.name] = Entry(role, " ".join(first.split()), " ".join(use.split()))
    return found


def tasks() -> dict[str, str]:
    """The tasks of `dualoptim.tasks` by name, each with the first line of its file.

    >>> "tofu" in tasks()
    True
    """
    found: dict[str, str] = {}
    for tree in _modules("tasks"):
        names = [_text(node, "name") for node in tree.body if isinstance(node, ast.ClassDef)]
        found |= {name: (ast.get_docstring(tree) or "").split("\n", 1)[0] for name in names if name}
    return dict(sorted(found.items()))


def _modules(package: str) -> Iterator[ast.Module]:
    for path in sorted((PACKAGE / package).glob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def _text(cls: ast.ClassDef, name: str) -> str:
    """The text that a class's body assigns to a name; empty where it assigns none."""
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    return ""
