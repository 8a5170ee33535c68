from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualoptim.schedule import by_turns, jointly, parse_ratio


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 200))
def test_each_turn_serves_one_objective_and_every_cycle_keeps_the_ratio(a: int, b: int, c: int, steps: int) -> None:
    turns = by_turns({"x": a, "y": b, "z": c}, 4, steps)
    assert len(turns) == steps
    assert all(len(turn) == 1 and sum(turn.values()) == 4 for turn in turns)
    cycle = a + b + c
    for start in range(steps - cycle + 1):
        assert Counter(next(iter(turn)) for turn in turns[start : start + cycle]) == {"x": a, "y": b, "z": c}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 64))
def test_joint_batches_are_full_and_near_the_ratio_with_nobody_left_out(a: int, b: int, batch: int) -> None:
    (turn,) = jointly({"x": a, "y": b}, batch, 1)
    assert sum(turn.values()) == batch
    assert min(turn.values()) >= 1
    exact = batch * a / (a + b)
    assert abs(turn["x"] - exact) < 1 or turn["x"] == 1 or turn["y"] == 1


@pytest.mark.parametrize("text", ["", "1", "1:0", "1:2:3", "a:b", "1:-5", "1.5:2"])
def test_a_ratio_that_means_nothing_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as '1:1'"):
        parse_ratio(text, ["forget", "retain"])


def test_a_joint_batch_smaller_than_the_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 1"):
        jointly({"x": 1, "y": 1}, 1, 1)
