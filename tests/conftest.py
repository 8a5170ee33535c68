"""What several test files read: the golden numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"


def golden_metrics() -> dict[str, Any]:
    return json.loads((GOLDEN / "metrics" / "metrics.json").read_text(encoding="utf-8"))
