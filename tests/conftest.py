"""What several test files read, the golden numbers, and what makes all of them cheaper."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

# As the command line does, before torch is loaded: tiny models beside other work otherwise spin their time away.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Nothing here is on the hub, and where there is no network each try would wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish() -> None:
    """Spare what is loaded by now, which stays to the end: every training collects garbage, and would search it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the tests of a file whose runs begin with the same model and rows, scored once."""
    return tmp_path_factory.mktemp("cache")


def golden_metrics() -> dict[str, Any]:
    return json.loads((GOLDEN / "metrics" / "metrics.json").read_text(encoding="utf-8"))


collect_ignore = ["open_unlearning"]  # a stub that test_open_unlearning.py imports as it would be
