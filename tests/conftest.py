from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_metrics() -> dict[str, Any]:
    return json.loads((GOLDEN / "metrics" / "metrics.json").read_text(encoding="utf-8"))
