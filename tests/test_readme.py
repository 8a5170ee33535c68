from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# Blocks headed "python" run, each by itself; those headed "py" are parts of a script, or need what tests have not.
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python\n" in page.read_text(encoding="utf-8")
]


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, page, "exec"), {})


OTHERS = ("plain_trainer.py", "trl_sft.py")  # trainers that are not ours
EXAMPLES = [example for example in sorted((ROOT / "examples").glob("*.py")) if example.name not in OTHERS]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(example: Path) -> None:
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers_take_the_optimizer_in_five_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "trl_sft.py":
        pytest.importorskip("trl", reason="TRL is not installed")
        pytest.importorskip("datasets", reason="datasets is not installed")
    whole = runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    state = whole["opt"].state[whole["model"].lm_head.weight]
    assert {objective: state[f"delta_step/{objective}"] for objective in ("forget", "retain")} == {
        "forget": 20,
        "retain": 40,
    }
    assert capsys.readouterr().out.count("as it was taught: True") == 2
    lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()
    added = [line for line in lines if re.search(r"\bopt\b|\bTurn\b|def on_step", line) and "print" not in line]
    assert len([line for line in added if not line.startswith(('"', "pip"))]) == 5


def test_the_readme_speaks_of_commands_and_options_that_exist() -> None:
    from dualoptim.command_line import arguments

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^dualoptim (\w+)", text, re.MULTILINE))
    assert commands
    assert commands <= set(arguments.COMMANDS)
    for line in re.findall(r"^dualoptim .*$", text, re.MULTILINE):
        known = {option for action in arguments.parser(line.split()[1])._actions for option in action.option_strings}
        assert set(re.findall(r"--[\w-]+", line)) <= known
