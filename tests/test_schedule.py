from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dualoptim import resolve
from dualoptim.config import RunConfig
from dualoptim.one_run import train
from dualoptim.schedule import by_turns, jointly, parse_ratio


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 200))
def test_each_turn_serves_one_objective_and_every_cycle_keeps_the_ratio(a: int, b: int, c: int, steps: int) -> None:
    turns = by_turns({"x": a, "y": b, "z": c}, 4, steps)
    assert len(turns) == steps
    assert all(len(turn) == 1 and sum(turn.values()) == 4 for turn in turns)
    cycle = a + b + c
    for start in range(steps - cycle + 1):
        assert Counter(next(iter(turn)) for turn in turns[start : start + cycle]) == {"x": a, "y": b, "z": c}


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(4, 64), st.integers(1, 20))
def test_joint_batches_are_full_and_over_a_run_near_the_ratio_with_nobody_left_out(
    shares: list[int], batch: int, steps: int
) -> None:
    ratio = dict(zip("wxyz", shares, strict=False))
    turns = jointly(ratio, batch, steps)
    assert len(turns) == steps
    assert all(list(turn) == list(ratio) and sum(turn.values()) == batch for turn in turns)
    assert min(min(turn.values()) for turn in turns) >= 1
    if all(batch * share >= sum(shares) for share in shares):  # else one in each step is more than its share
        for name, share in ratio.items():
            exact = batch * steps * share / sum(shares)
            assert abs(sum(turn[name] for turn in turns) - exact) < len(ratio)


@pytest.mark.parametrize(
    ("ratio", "batch", "steps"), [("1:2", 4, 36), ("1:2", 8, 48), ("1:1:1:1", 4, 48), ("1:5", 8, 60)]
)
def test_joint_and_alternating_runs_see_the_same_rows(ratio: str, batch: int, steps: int) -> None:
    shares = parse_ratio(ratio, "abcd"[: ratio.count(":") + 1])
    joint, alternating = (
        sum((Counter(turn) for turn in plan(shares, batch, steps)), Counter()) for plan in (jointly, by_turns)
    )
    assert joint == alternating


@pytest.mark.parametrize("text", ["", "1", "1:0", "1:2:3", "a:b", "1:-5", "1.5:2"])
def test_a_ratio_that_means_nothing_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as '1:1'"):
        parse_ratio(text, ["forget", "retain"])


def test_a_joint_batch_smaller_than_the_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 1"):
        jointly({"x": 1, "y": 1}, 1, 1)


def test_settings_that_are_equal_make_up_for_the_schedule() -> None:
    config = RunConfig(task="facts", lr_scales="equal", base_weights="equal")
    made: Any = SimpleNamespace(config=config, optimizer=resolve.optimizer_of(config, ["forget", "retain"]))
    turns = by_turns({"forget": 1, "retain": 2}, 4, 9)
    cls, arguments = train._optimizer(made, turns)
    assert arguments["lr_scales"] == arguments["base_weights"] == {"forget": 1.5, "retain": 0.75}
    (group,) = cls([nn.Parameter(torch.zeros(1))], **arguments).param_groups
    assert group["lr_scales"] == {"forget": 1.5, "retain": 0.75}
    config = config.replace(lr_scales={"forget": 2.0}, base_weights={})
    made = SimpleNamespace(config=config, optimizer=resolve.optimizer_of(config, ["forget", "retain"]))
    assert train._optimizer(made, turns)[1]["lr_scales"] == {"forget": 2.0}
