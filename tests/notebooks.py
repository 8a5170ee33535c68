"""Runs notebooks as Jupyter would: `python -m tests.notebooks` writes the outputs of those in examples/ anew.

Their cells need a namespace, a place to print to and to draw on, and nothing else of a kernel, which would be some
twenty-five packages.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
Outputs = list[dict[str, Any]]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(notebook: dict[str, Any], name: str, namespace: dict[str, Any]) -> list[Outputs]:
    """The outputs of each code cell, all run in one namespace: what it prints, and the figures it leaves open."""
    return [
        _outputs("".join(cell["source"]), f"{name}, cell {i}", namespace)
        for i, cell in enumerate(code_cells(notebook), 1)
    ]


def _outputs(source: str, where: str, namespace: dict[str, Any]) -> Outputs:
    last = ast.parse(source).body[-1]
    if isinstance(last, ast.Expr) and ast.unparse(last.value).partition("(")[0] != "print":
        raise AssertionError(f"{where}: Jupyter would show the value of its last line; print it, or assign it")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(source, where, "exec"), namespace)
    text = said.getvalue().splitlines(keepends=True)
    printed = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    return printed + _figures()


def _figures() -> Outputs:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    plt = sys.modules["matplotlib.pyplot"]
    found: Outputs = []
    for number in plt.get_fignums():
        out = io.BytesIO()
        plt.figure(number).savefig(out, format="png", dpi=72, metadata={"Software": None})
        picture = {"image/png": base64.b64encode(out.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
        found.append({"data": picture, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return found


def write(path: Path) -> None:
    """Run a notebook in an empty folder, and put its outputs into its file."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        outputs = executed(notebook, path.name, {})
        os.chdir(FOLDER)
    for i, (cell, made) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["outputs"], cell["execution_count"] = made, i
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"
    for each in NOTEBOOKS:
        write(each)
