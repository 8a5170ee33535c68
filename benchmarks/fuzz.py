"""Ten thousand inputs, each a valid one with a thing or two changed: does each work, or end in one sentence?

    python -m benchmarks.fuzz [--out runs/fuzz] [--inputs 10000] [--area NAME]

Outcomes are kept as they come, so that a second call goes on where the first stopped; benchmarks/fuzz.md is written at
the end of each. The inputs are those of tests/fuzz.py, from fixed seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from dualoptim.reading import json_lines

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import fuzz

SHARES = {
    "rows": 0.25,
    "recipes": 0.1,
    "command lines": 0.15,
    "state dicts": 0.37,
    "checkpoints": 0.03,
    "results.json": 0.1,
}
CHUNK = 50
KINDS = (fuzz.WORKS, fuzz.SENTENCE, fuzz.TRACEBACK, fuzz.LINES, fuzz.HALF)


def chunk(area: str, number: int, count: int, place: fuzz.Place) -> list[dict[str, object]]:
    """The outcomes of some inputs of an area; the same number, the same inputs."""
    strategy, attempt = fuzz.AREAS[area]
    found: list[dict[str, object]] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def inputs(case: object) -> None:
        if len(found) >= count:
            return
        began = time.perf_counter()
        outcome = attempt(place, case)
        entry = {"kind": outcome.kind, "detail": outcome.detail, "seconds": round(time.perf_counter() - began, 3)}
        found.append(entry if outcome.fine else {**entry, "input": repr(case)[:6000]})

    with contextlib.suppress(Flaky):  # of what the generator takes for the same input twice
        inputs()
    return found


def table(out: Path) -> str:
    """The outcomes by area."""
    lines = [
        "| area | inputs | works | one sentence | traceback | two lines | half-written | seconds |",
        "|---|" + "--:|" * 7,
    ]
    total: Counter[str] = Counter()
    seconds = 0.0
    for area in SHARES:
        entries = _read(out, area)
        counts = Counter(entry["kind"] for entry in entries)
        spent = sum(entry["seconds"] for entry in entries)
        total, seconds = total + counts, seconds + spent
        lines.append(
            f"| {area} | {len(entries):,} | {' | '.join(f'{counts[kind]:,}' for kind in KINDS)} | {spent:.0f} |"
        )
    lines.append(f"| all | {total.total():,} | {' | '.join(f'{total[kind]:,}' for kind in KINDS)} | {seconds:.0f} |")
    return "\n".join(lines)


def _read(out: Path, area: str) -> list[dict[str, Any]]:
    path = _file(out, area)
    return json_lines(path.read_text(encoding="utf-8")) if path.exists() else []


def _file(out: Path, area: str) -> Path:
    return out / f"{area.replace(' ', '-')}.jsonl"


def main() -> None:
    """Try what is still to be tried, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--area", choices=SHARES, action="append")
    given_ = parser.parse_args()
    out = given_.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))  # what asks for all memory is told, and no more
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        place = fuzz.Place(Path(folder).resolve())
        with place.entered():
            for area in given_.area or SHARES:
                wanted = round(SHARES[area] * given_.inputs)
                known = _read(out, area)
                done, number = len(known), max((entry["chunk"] for entry in known), default=-1)
                while done < wanted:
                    number += 1
                    entries = chunk(area, number, min(CHUNK, wanted - done), place)
                    done += len(entries)
                    with _file(out, area).open("a") as opened:
                        opened.writelines(json.dumps({**entry, "chunk": number}) + "\n" for entry in entries)
    command = f"python -m benchmarks.fuzz --inputs {given_.inputs}"
    text = f"# Inputs at random\n\n{datetime.date.today()}, `{command}`, 2 CPU cores.\n\n{table(out)}\n"
    (Path(__file__).parent / "fuzz.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
