"""Valid inputs with a thing or two changed: each works, or is one sentence and leaves all as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from . import fuzz

EXAMPLES = {
    "rows": 12,
    "recipes": 12,
    "command lines": 12,
    "state dicts": 60,
    "checkpoints": 2,
    "results.json": 12,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Place]:
    made = fuzz.Place(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.WARNING)
    with made.entered():
        yield made
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("area", fuzz.AREAS)
def test_an_input_works_or_is_one_sentence(area: str, place: fuzz.Place) -> None:
    strategy, attempt = fuzz.AREAS[area]

    @settings(
        max_examples=EXAMPLES[area],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(case: Any) -> None:
        outcome = attempt(place, case)
        assert outcome.fine, outcome

    check()
