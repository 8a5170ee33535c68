"""Benchmarks and examples: what they take from the package is there, though few of them run in the tests."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks.families import forgetting_and_keeping

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def lacking(text: str) -> list[str]:
    """The names that a script takes from `dualoptim`, or from a module of it, and that are not there."""
    tree, modules, found = ast.parse(text), dict[str, ModuleType](), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "dualoptim":
                    modules[name.asname or name.name] = importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dualoptim":
            module = importlib.import_module(str(node.module))
            for name in node.names:
                value = getattr(module, name.name, None)
                if value is None:
                    try:
                        value = importlib.import_module(f"{node.module}.{name.name}")
                    except ModuleNotFoundError:
                        found.append(f"{node.module}.{name.name}")
                if isinstance(value, ModuleType):
                    modules[name.asname or name.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                found.append(f"{module.__name__}.{node.attr}")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_takes_from_the_package_is_there(path: Path) -> None:
    assert lacking(path.read_text(encoding="utf-8")) == []


def test_a_name_that_has_moved_is_found() -> None:
    assert (
        lacking("from dualoptim.grid import Shard\nfrom dualoptim import runs, losses as of\nof.NPO, runs.slug") == []
    )
    assert lacking("from dualoptim.unlearn import _Watch\nfrom dualoptim import plan as p\np.size_texts()") == [
        "dualoptim.unlearn._Watch",
        "dualoptim.plan.size_texts",
    ]


def test_the_rates_for_real_people_are_chosen_by_what_is_lost_and_left_relative_to_before() -> None:
    before = {"forget_known_probability": 0.4, "held_out_probability": 0.5, "facts_accuracy": 0.8}
    assert forgetting_and_keeping(before, before) == 0
    assert forgetting_and_keeping(before, {**before, "forget_known_probability": 0.5}) == 0
    half = {**before, "forget_known_probability": 0.2}
    assert forgetting_and_keeping(before, half) == pytest.approx(3 / (1 / 0.5 + 1 + 1))
    assert forgetting_and_keeping(before, {**half, "held_out_probability": 0.9}) == pytest.approx(0.75)
    less = {**half, "held_out_probability": 0.125, "facts_accuracy": 0.4}
    assert forgetting_and_keeping(before, less) == pytest.approx(3 / (2 + 4 + 2))
