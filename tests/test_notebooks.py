"""The notebooks run, and print what stands in their files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from . import notebooks

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
VARIES = "varies"  # tag of cells whose output depends on the machine: rounding decides what a trained model says


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def same(stood: str, came: str) -> bool:
    """Whether two texts differ by no more than rounding."""
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (stood, came)]
    return NUMBER.sub("#", stood).split() == NUMBER.sub("#", came).split() and all(
        math.isclose(a, b, rel_tol=0.02, abs_tol=0.02) for a, b in zip(*numbers, strict=True)
    )


def test_texts_are_compared_up_to_rounding() -> None:
    assert same("loss 0.97 of 393240 bytes", "loss  0.96 of 393240 bytes")
    assert not same("loss 0.97", "loss 0.90")
    assert not same("loss 0.97", "lost 0.97")
    assert not same("1 2", "1")


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_is_well_formed_and_of_no_machine(path: Path) -> None:
    notebook = notebooks.read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {"language_info": {"name": "python"}}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "pip install" in "".join(first["source"])
    for i, cell in enumerate(notebooks.code_cells(notebook), 1):
        assert cell["execution_count"] == i
        assert len(cell["source"]) <= 26
    for cell in notebook["cells"]:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", "".join(cell["source"])):
            assert (path.parent / target).exists() or target.startswith("runs/"), target
    said = path.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/root/|/tmp/|/Users/|site-packages|Warning", said)
    assert len(said) < 150_000


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_prints_what_stands_in_it(place: Path, path: Path) -> None:
    notebook = notebooks.read(path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    made = notebooks.executed(notebook, path.name, namespace)
    for cell, came in zip(notebooks.code_cells(notebook), made, strict=True):
        stood = cell["outputs"]
        assert [each["output_type"] for each in stood] == [each["output_type"] for each in came], cell["id"]
        if VARIES not in cell["metadata"].get("tags", ()):
            for old, new in zip(stood, came, strict=True):
                assert same("".join(old.get("text", "")), "".join(new.get("text", ""))), (cell["id"], new)
    if path.name == "forget_my_rows.ipynb":
        was, now = namespace["run"]["before"], namespace["run"]["after"]
        assert was["forget_answered"] == was["nearby_answered"] == 1
        assert now["forget_answered"] <= 0.5
        assert now["nearby_answered"] >= 0.5
        assert now["forget_probability"] < was["forget_probability"]
        assert namespace["plt"].get_backend() == "agg"  # which the report leaves alone
        assert (place / "runs/mine/report.html").stat().st_size > 10_000
