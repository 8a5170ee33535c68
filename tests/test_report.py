from __future__ import annotations

from typing import Any

import pytest

from dualoptim import report


def results(**after: list[float]) -> dict[str, Any]:
    """Results of methods A, B, …, one number each for every metric."""
    count = len(next(iter(after.values())))
    return {
        "schema": 1,
        "task": "facts",
        "model": "<b>tiny</b>",
        "followed": "facts answered",
        "metrics": {
            "forget_accuracy": {"label": "to forget", "better": "lower", "format": ".0%"},
            "perplexity": {"label": "perplexity", "better": "lower", "format": ".1f"},
        },
        "counts": {"forget_accuracy": 40},
        "runs": [
            {
                "method": "ABC"[i],
                "seed": 0,
                "config": {"lr": 1e-5, "optimizer": "ABC"[i]},
                "before": dict.fromkeys(after, 1.0),
                "after": {name: values[i] for name, values in after.items()},
                "curve": [{"step": 0, "forget": 1.0, "retain": 1.0}, {"step": 2, "forget": 0.5, "retain": 1.0}],
                "losses": [],
                "samples": [{"set": "forget", "question": "Q <i>", "answer": "A", "before": "b", "after": "x & y"}],
                "seconds": 1.0,
                "step_seconds": 0.5,
                "optimizer_state_bytes": 2**20,
                "peak_memory_bytes": 2**30,
            }
            for i in range(count)
        ],
    }


def test_what_was_seen_tells_apart_only_what_the_questions_can() -> None:
    said = report.seen(results(forget_accuracy=[0.05, 0.10, 0.60], perplexity=[10.0, 11.0, 12.0]))
    assert said[0].startswith("To forget: A is lowest; not told apart on 40 questions: B (")
    assert said[1].startswith("Perplexity: A is lowest (")
    alone = report.seen(results(forget_accuracy=[0.9, 0.0, 0.6], perplexity=[10.0, 11.0, 12.0]))
    assert alone[0].startswith("To forget: B is lowest, and alone there (")


def test_equal_values_are_no_lead() -> None:
    said = report.seen(results(forget_accuracy=[0.0, 0.0, 0.0], perplexity=[10.01, 10.02, 10.0]))
    assert said[0].endswith(": 0% for all.")
    assert said[1].endswith(": 10.0 for all."), "what looks alike to the reader is called alike"
    said = report.seen(results(forget_accuracy=[0.0, 0.0, 0.025], perplexity=[10.0, 11.0, 12.0]))
    assert said[0].startswith("To forget: A and B are lowest; not told apart on 40 questions: C (")


def test_the_page_is_whole_and_escapes_what_models_say() -> None:
    page = report.page(results(forget_accuracy=[0.05, 0.10], perplexity=[10.0, float("nan")]))
    assert "&lt;b&gt;tiny&lt;/b&gt;" in page
    assert "Q &lt;i&gt;" in page
    assert "x &amp; y" in page
    assert "<svg" in page
    assert "—" in page
    assert "http://www.w3.org" in page  # the SVG's namespaces are the only addresses
    assert 'href="http' not in page.replace("xlink:href", "")


def test_the_page_of_one_run_compares_nothing() -> None:
    page = report.page(results(forget_accuracy=[0.05], perplexity=[10.0]))
    assert "Findings" not in page


def test_several_runs_share_a_page_a_chapter_each() -> None:
    one = results(forget_accuracy=[0.05, 0.10], perplexity=[10.0, 11.0])
    other = {**results(forget_accuracy=[0.5], perplexity=[9.0]), "task": "other", "curves": {"a": "A ↑", "b": "B ↑"}}
    for entry in other["runs"]:
        entry["curve"] = [{"step": 0, "a": 0.1, "b": 0.2}, {"step": 1, "a": 0.3, "b": 0.4}]
    page = report.page(one, other)
    assert page.count("<h1>") == page.count("<h2>During training</h2>") == 2
    assert page.index("What was forgotten, and what was kept") < page.index("What each objective came to")
    assert "&lt;section" not in page, "chapters are not escaped twice"
    assert "<b>tiny</b>" not in page


def test_what_mixing_costs_is_the_change_against_each_objective_alone() -> None:
    made = results(forget_accuracy=[0.5, 0.75, 0.25], perplexity=[10.0, 8.0, 6.0])
    made["scores"] = {"a": "forget_accuracy", "b": "perplexity"}
    made["runs"][1]["config"]["alone"], made["runs"][2]["config"]["alone"] = "a", "b"
    assert report.against_alone(made) == [
        ["a ↑", "", "-0.250", "+0.000", "-0.500"],
        ["b ↑", "", "+4.000", "+2.000", "+0.000"],
        ["mean ↑", "", "+1.875", "+1.000", "-0.250"],
    ]
    made["runs"][2]["config"]["alone"] = None
    assert report.against_alone(made) == []


@pytest.mark.parametrize(("columns", "across"), [(80, True), (200, False)])
def test_a_terminal_shows_every_number_whole(
    columns: int, across: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    made = results(forget_accuracy=[0.125], perplexity=[10.5])
    for i in range(5):
        made["metrics"][f"m{i}"] = {"label": f"Measured{i} unabridged{i}", "better": "higher", "format": ".3f"}
        made["runs"][0]["before"][f"m{i}"] = made["runs"][0]["after"][f"m{i}"] = i + 0.125
    report.terminal(made)
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(f"{i}.125" in out and f"unabridged{i}" in out for i in range(5))
    assert ("before ┃" in out) == across, "a column for each run where a row for each would not fit"


def test_a_terminal_shows_many_methods_in_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = results(forget_accuracy=[0.1, 0.2, 0.3], perplexity=[1.0, 2.0, 3.0])
    for name in ("a", "b", "c"):
        made["metrics"][name] = {"label": f"something-measured-of-{name}", "better": "higher", "format": ".3f"}
    for entry in made["runs"]:
        entry["method"] = f"{entry['method']}-with-a-long-name"
        entry["before"] |= dict.fromkeys("abc", 0.125)
        entry["after"] |= dict.fromkeys("abc", 0.125)
    report.terminal(made)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("perplexity") == 2, "each part has the names"
    assert all(f"{letter}-with-a-long-name ┃" in out for letter in "ABC")


def test_a_curve_of_one_point_is_not_drawn() -> None:
    made = results(forget_accuracy=[0.1], perplexity=[1.0])
    made["runs"][0]["curve"] = made["runs"][0]["curve"][:1]
    assert "During training" not in report.page(made)
