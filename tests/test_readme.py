from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_runs(example: Path) -> None:
    runpy.run_path(str(example), run_name="__main__")


def test_the_readme_speaks_of_commands_options_and_losses_that_exist() -> None:
    from dualoptim import cli
    from dualoptim.losses import LOSSES

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^dualoptim (\w+)", text, re.MULTILINE))
    assert commands
    assert commands <= set(cli.COMMANDS)
    assert all(f"`{name}`" in text for name in LOSSES)
    for line in re.findall(r"^dualoptim .*$", text, re.MULTILINE):
        known = {option for action in cli._parsers()[line.split()[1]]._actions for option in action.option_strings}
        assert set(re.findall(r"--[\w-]+", line)) <= known
