"""Whether what stands here can be released: `make release-check`.

A clean tree and a changelog that says what the version is; a wheel and a source distribution with all that belongs in
them; and the wheel installed where there is torch, what torch needs, and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALONE = """
import importlib.util
for name in ("transformers", "numpy", "yaml"):
    assert importlib.util.find_spec(name) is None, f"{name} is there, so that nothing is shown"
import dualoptim
from dualoptim import DualOptim, DualOptimPlus
import torch
for cls in (DualOptimPlus, DualOptim):
    weight = torch.nn.Parameter(torch.ones(2))
    opt = cls([weight], lr=0.1, weight_decay=0.0, backend="plain")
    weight.sum().backward()
    opt.step(objective="forget")
    assert torch.allclose(weight.detach(), torch.full((2,), 0.9)), weight
try:
    dualoptim.UnlearnTrainer
except ModuleNotFoundError as error:
    assert "pip install 'dualoptim[unlearn]'" in str(error), error
else:
    raise AssertionError("the trainer came without transformers")
print(dualoptim.__version__)
"""


def run(*command: object, cwd: Path = ROOT) -> str:
    """What a command says; where it fails, all of it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def told(sentence: str, failed: object) -> None:
    """Say what was looked at; if it failed, end with what was found."""
    if failed:
        sys.exit(f"release-check: not {sentence}: {failed}")
    print(f"release-check: {sentence}", flush=True)


def with_torch(folder: Path) -> Path:
    """A folder of links to torch and what it requires, as they are installed for this interpreter."""
    folder.mkdir()
    names, done = ["torch"], set()
    while names:
        name = names.pop()
        if name in done:
            continue
        done.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                names.append(re.split(r"[^\w.-]", requirement)[0].lower())
        for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link, target = folder / top, Path(str(distribution.locate_file(top)))
            if target.exists() and not link.exists():
                link.symlink_to(target)
    return folder


def interpreter(folder: Path, beside: Path | None = None, pip: bool = False) -> Path:
    """A fresh environment's Python, with what stands in `beside`."""
    venv.create(folder, with_pip=pip)
    python = folder / "bin" / "python"
    if beside is not None:
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(site) / "beside.pth").write_text(f"{beside}\n")
    return python


def main() -> None:
    """Look at one thing after the other, and end at the first that is wrong."""
    told("a clean tree", run("git", "status", "--porcelain").strip())
    version = re.findall(r'^__version__ = "(.*)"$', (ROOT / "src/dualoptim/__init__.py").read_text(), re.M)[0]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M)
    told(f"a dated entry of {version} in CHANGELOG.md", not dated and "add ## [VERSION] - YYYY-MM-DD")
    cited = f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    told(f"version {version} in CITATION.cff", not cited and "set version there")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tools = interpreter(folder / "tools", pip=True)
        run(tools, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build", "twine")
        run(tools, "-m", "build", "--outdir", folder / "dist", ROOT)  # the wheel is made from the sdist
        built = sorted((folder / "dist").iterdir())
        names = [f"dualoptim-{version}-py3-none-any.whl", f"dualoptim-{version}.tar.gz"]
        told(f"built {' and '.join(names)}", [path.name for path in built] != names and built)
        run(tools, "-m", "twine", "check", "--strict", *built)
        told("metadata that an index takes", False)

        tracked = run("git", "ls-files", "src/dualoptim", "recipes").split()
        with zipfile.ZipFile(built[0]) as wheel:
            inside = set(wheel.namelist())
        wanted = [f"dualoptim/{path}" if path.startswith("recipes") else path.removeprefix("src/") for path in tracked]
        told(f"all {len(wanted)} files of the package in the wheel", sorted(set(wanted) - inside))
        with tarfile.open(built[1]) as sdist:
            inside = {name.partition("/")[2] for name in sdist.getnames()}
        tracked += run("git", "ls-files", "tests", "docs", "examples", "CHANGELOG.md", "LICENSE", "NOTICE").split()
        told("the tests, pages and examples in the source distribution", sorted(set(tracked) - inside))

        torch = with_torch(folder / "torch")
        python = interpreter(folder / "alone", beside=torch)
        run(tools, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built[0])
        said = run(python, "-W", "ignore:Failed to initialize NumPy", "-c", ALONE, cwd=folder).strip()
        told(f"version {version} installed beside torch alone, and it steps", said != version and json.dumps(said))


if __name__ == "__main__":
    main()
