from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dualoptim import report, resolve
from dualoptim.command_line import arguments, rerun
from dualoptim.config import METHODS, RunConfig
from dualoptim.points import points_of
from dualoptim.report import html
from dualoptim.report import points as report_points
from dualoptim.schema import misfit


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


def test_a_reply_stands_under_its_own_question_whatever_parts_the_runs_are_of() -> None:
    made = results(forget_accuracy=[0.5, 0.75], perplexity=[10.0, 8.0])
    for number, entry in enumerate(made["runs"], 1):
        entry["part"] = number
        own, common = (
            {
                "set": "forget",
                "question": name,
                "answer": "A",
                "before": f"before {name}",
                "after": f"part {number}, {name}",
            }
            for name in (f"Q{number}", "both")
        )
        entry["samples"] = [own, common][::-1] if number == 2 else [own, common]
    page = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", report.page(made)))
    shown = page[page.index("Answers before and after") : page.index("Cost")]
    replies = {part.split()[0]: part for part in re.split(r"(?= (?:Q1|Q2|both) forget)", shown)[1:]}
    assert list(replies) == ["Q1", "both", "Q2"]
    assert "before Q1" in replies["Q1"]
    assert "part 1, Q1" in replies["Q1"]
    assert "part 1, both" in replies["both"]
    assert "part 2, both" in replies["both"]
    assert "part 2, Q2" in replies["Q2"]
    assert [name for name, part in replies.items() if "—" in part] == ["Q1", "Q2"]


def test_what_mixing_costs_is_how_much_worse_each_objective_is_met_than_alone() -> None:
    made = results(forget_accuracy=[0.5, 0.75, 0.25], perplexity=[10.0, 8.0, 6.0])
    made["scores"] = {"a": "forget_accuracy", "b": "perplexity"}
    made["runs"][1]["config"]["alone"], made["runs"][2]["config"]["alone"] = "a", "b"
    assert report.against_alone(made) == [
        ["a ↑", "", "+0.250", "+0.000", "+0.500"],
        ["b ↑", "", "-4.000", "-2.000", "+0.000"],
        ["mean ↑", "", "-1.875", "-1.000", "+0.250"],
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


def test_a_curve_of_which_nothing_was_asked_is_not_drawn() -> None:
    made = results(forget_accuracy=[0.5], perplexity=[9.0])
    assert len(report.curves(made)) == 2
    for point in made["runs"][0]["curve"]:
        point["retain"] = None
    assert misfit(made) is None
    assert [title for title, _ in report.curves(made)] == ["To forget ↓"]
    assert "During training: To keep ↑, of which nothing could be asked." in report.page(made)


def test_a_curve_of_one_point_is_not_drawn() -> None:
    made = results(forget_accuracy=[0.1], perplexity=[1.0])
    made["runs"][0]["curve"] = made["runs"][0]["curve"][:1]
    page = report.page(made)
    assert "<h2>During training</h2>" not in page
    assert "During training: the curve was measured at its start alone" in page


def planed(forget: list[float], keep: list[float], seeds: int = 1) -> dict[str, Any]:
    """Results whose plane has these points, each run's seeds 0.1 of what is kept apart."""
    made = results(forget_accuracy=forget, perplexity=keep)
    runs = made["runs"]
    made["runs"] = [
        {**run, "seed": seed, "after": {**run["after"], "perplexity": run["after"]["perplexity"] + 0.1 * seed}}
        for run in runs
        for seed in range(seeds)
    ]
    made["plane"] = ["forget_accuracy", "perplexity"]
    made["points"] = points_of([(entry, {}, Path()) for entry in made["runs"]], made["plane"], made["counts"])
    return made


@pytest.mark.parametrize(
    ("forget", "keep", "seeds", "said"),
    [
        ([0.1, 0.2, 0.3], [1.0, 2.0, 1.5], 1, "Nothing beats A and B in both forgetting and keeping, on one seed; C is "
         "beaten in both."),
        ([0.1, 0.2], [1.0, 2.0], 2, "None of A and B beats another in both forgetting and keeping, by the means of 2 "
         "seeds."),
        ([0.1, 0.2, 0.3], [3.0, 2.0, 1.0], 1, "A forgets and keeps at least as much as B and C, on one seed."),
        ([0.1], [1.0], 3, ""),
    ],
)  # fmt: skip
def test_several_runs_have_one_sentence_at_the_top(forget: Any, keep: Any, seeds: int, said: str) -> None:
    made = planed(forget, keep, seeds)
    assert report.headline(made) == said
    assert (said in report.page(made)) or not said


REFUSED = {
    "over_refusal": {"label": "harmless, refused", "better": "lower", "format": ".0%"},
    "refusal_rate": {"label": "harmful, refused", "better": "higher", "format": ".0%"},
}


def refusing(over: list[float], refused: list[float], forgets: bool | None = False) -> dict[str, Any]:
    """Results of a task as `safety`, or of an earlier version, which do not say whether it forgets."""
    made = results(over_refusal=over, refusal_rate=refused)
    for entry in made["runs"]:
        entry["curve"] = [{"step": step, "safe": 0.5, "helpful": 0.5} for step in (0, 2)]
    made |= {"metrics": REFUSED, "plane": list(REFUSED), "curves": {"safe": "Safe ↑", "helpful": "Helpful ↑"}}
    made |= {} if forgets is None else {"forgets": forgets}
    made["counts"] = dict.fromkeys(REFUSED, 50)
    made["points"] = points_of([(e, {}, Path()) for e in made["runs"]], made["plane"], made["counts"], REFUSED)
    return made


BOTH = 'both "harmless, refused" ↓ and "harmful, refused" ↑'


@pytest.mark.parametrize(
    ("over", "refused", "said"),
    [
        ([0.1, 0.3], [0.9, 0.8], f"A is at least as good as B in {BOTH}, on one seed."),
        ([0.1, 0.3], [0.8, 0.9], f"None of A and B beats another in {BOTH}, on one seed."),
        ([0.1, 0.3, 0.4], [0.8, 0.9, 0.9], f"Nothing beats A and B in {BOTH}, on one seed; C is beaten in both."),
    ],
)
@pytest.mark.parametrize("forgets", [False, None])
def test_of_a_task_that_forgets_nothing_the_page_names_its_two_numbers(
    over: list[float], refused: list[float], said: str, forgets: bool | None
) -> None:
    made = refusing(over, refused, forgets)
    assert misfit(made) is None
    assert report.headline(made) == said
    where = 'Up and left is better: "harmless, refused" ↓ and "harmful, refused" ↑. On the dashed line'
    assert report_points.how_to_read(made).startswith(where)
    every = {**made, "planned": len(over), "grid": {}}
    assert f"On the front (●) is what no other point beats: as good in {BOTH}, or better." in report_points.remarks(
        every
    )
    assert "Attacks: nothing was to be forgotten that could come back." in report.not_shown(made)
    for shown, title in ((made, "What each objective came to"), (every, "What each point came to")):
        page = report.page(shown)
        assert f"<h1>{title}</h1>" in page
        assert "<h2>harmless, refused ↓ against harmful, refused ↑</h2>" in page
        assert not re.findall(r"forgotten against|what was kept|forgetting|forgets", page)
    assert report.not_shown({**made, "plane": None})[0].startswith("One number against another: the task names no two")


def test_a_task_forgets_whatever_it_follows_if_its_results_say_so() -> None:
    made = refusing([0.1, 0.3], [0.9, 0.8], forgets=True)
    assert report.headline(made) == "A forgets and keeps at least as much as B, on one seed."
    assert "<h1>What was forgotten, and what was kept</h1>" in report.page(made)


@pytest.mark.parametrize(
    ("across", "up", "way", "front"),
    [
        ("higher", "higher", "Up and right is better", [False, True, True]),
        ("higher", "lower", "Down and right is better", [False, False, True]),
        ("chance", "neither", "Better is", [False, True, False]),
    ],
)
def test_the_plane_has_the_ways_of_its_metrics(across: str, up: str, way: str, front: list[bool]) -> None:
    metrics = {"x": {"better": across, "label": "x"}, "y": {"better": up, "label": "y"}}
    made = results(x=[0.1, 0.4, 0.8], y=[0.8, 0.9, 0.7]) | {"metrics": metrics, "plane": ["x", "y"], "forgets": False}
    made["points"] = points_of([(entry, {}, Path()) for entry in made["runs"]], ["x", "y"], {}, metrics)
    assert [point["front"] for point in made["points"]] == front
    assert report_points.how_to_read(made).startswith(f"{way}: ")


LEAKAGE = {"label": "leakage", "better": "zero", "format": ".2f"}


def leaking(better: str = "zero", **by_seed: list[float]) -> dict[str, Any]:
    """Results of methods, each with a metric's value for every seed."""
    made = results(leakage=[0.0])
    made["metrics"] = {"leakage": {**LEAKAGE, "better": better}}
    made["runs"] = [
        {**made["runs"][0], "method": method, "seed": seed, "after": {"leakage": value}}
        for method, values in by_seed.items()
        for seed, value in enumerate(values)
    ]
    return made


@pytest.mark.parametrize(
    ("better", "by_seed", "said"),
    [
        ("zero", {"A": [5.0], "B": [-5.0]}, "all are equally near to 0 (A 5.00, B -5.00)."),
        ("zero", {"A": [5.0], "B": [5.0]}, "5.00 for all."),
        ("zero", {"A": [5.0], "B": [-5.001], "C": [7.0]}, "A and B are nearest to 0 (A 5.00, B -5.00, C 7.00)."),
        ("zero", {"A": [-50.0, 50.0], "B": [4.0, 6.0]}, "B is nearest to 0 (A 50.00 away, B 5.00 away)."),
        ("zero", {"A": [-50.0, 50.0], "B": [4.0, 60.0]},
         "B is nearest to 0; not told apart over seeds: A (A 50.00 away, B 32.00 away)."),
        ("zero", {"A": [-5.0, 5.0], "B": [5.0, 5.0]}, "5.00 away for all."),
        ("chance", {"A": [0.25, 0.75], "B": [0.6, 0.6]}, "B is nearest to 0.5 (A 0.25 away, B 0.10 away)."),
        ("chance", {"A": [0.25], "B": [0.75]}, "all are equally near to 0.5 (A 0.25, B 0.75)."),
    ],
)  # fmt: skip
def test_what_is_best_near_a_number_is_compared_by_distances(better: str, by_seed: Any, said: str) -> None:
    assert report.seen(leaking(better, **by_seed))[0] == f"Leakage: {said}"


def test_shares_best_at_chance_are_told_apart_by_their_distances_from_it() -> None:
    made = leaking("chance", A=[0.25], B=[0.76]) | {"counts": {"leakage": 1000}}
    assert report.seen(made)[0] == "Leakage: A is nearest to 0.5; not told apart on 1000 questions: B (A 0.25, B 0.76)."


def test_the_front_is_of_mean_distances_where_a_number_is_best() -> None:
    made = leaking(A=[-50.0, 50.0], B=[4.0, 6.0])
    for entry in made["runs"]:
        entry["after"]["kept"] = 0.5
    metrics = {"leakage": LEAKAGE, "kept": {**LEAKAGE, "better": "higher"}}
    found = points_of([(entry, {}, Path()) for entry in made["runs"]], ["leakage", "kept"], {}, metrics)
    assert [point["front"] for point in found] == [False, True]


def of_two_models() -> dict[str, Any]:
    """Results of a grid: the methods A and B from each of two models, whose numbers before differ."""
    made = results(forget_accuracy=[0.25, 0.5], perplexity=[9.0, 8.0])
    entries, given = [], []
    for model, was in (("m", 1.0), ("n", 0.125)):
        for entry in made["runs"]:
            after = {name: value * was for name, value in entry["after"].items()}
            config = {**entry["config"], "model": model}
            entries.append({**entry, "config": config, "before": dict.fromkeys(after, was), "after": after})
            given.append((entries[-1], {"model": model}, Path()))
    made |= {"model": "m", "runs": entries, "plane": ["forget_accuracy", "perplexity"], "planned": 4, "grid": {}}
    made["points"] = points_of(given, made["plane"], made["counts"])
    return made


def test_each_start_of_many_runs_has_its_own_before_front_and_sentence() -> None:
    made = of_two_models()
    _, body = report_points.table(made)
    assert [(row[0], row[1].partition(" ")[0], row[3]) for row in body] == [
        ("before, model m", "100%", ""), ("A, model m", "25%", "●"), ("B, model m", "50%", ""),
        ("before, model n", "12%", ""), ("A, model n", "3%", "●"), ("B, model n", "6%", ""),
    ]  # fmt: skip
    said = "A forgets and keeps at least as much as B, on one seed."
    assert report.headline(made) == f"Model m: {said} Model n: {said}"
    page = report.page(made)
    assert "<title>dualoptim · facts · m, n</title>" in page
    assert "There are 2 starts (model m; model n)" in page
    assert page.count('<tr class="before">') == page.count('class="plane"') == 2
    made["plane"] = None
    assert report.headline(made) == ""


def test_parts_have_a_before_each_and_are_not_compared() -> None:
    made = results(forget_accuracy=[0.25, 0.5, 0.75], perplexity=[9.0, 8.0, 7.0])
    made["metrics"]["more"] = {"label": "more", "better": "lower", "format": ".1f", "group": "More"}
    made["metrics"]["leak_at_1"] = {"label": "leak", "better": "lower", "format": ".1f", "group": "Attacks"}
    places = [("A", 1, "m"), ("A", 2, "A/part1/model"), ("B", 2, "B/part1/model")]
    for i, (method, part, model) in enumerate(places):
        numbers = {"forget_accuracy": 1.0 - i / 8, "perplexity": 1.0 + i, "more": 10.0 + i, "leak_at_1": 20.0 + i}
        entry = made["runs"][i]
        entry |= {"method": method, "part": part, "before": numbers, "after": {**numbers, **entry["after"]}}
        entry |= {"config": {**entry["config"], "model": model}, "counts": {"forget_accuracy": 8 * (i + 1)}}
        entry["samples"][0]["before"] = f"reply {i}"
    names = ["before, part 1", "A, part 1", "before, A, part 2", "A, part 2", "before, B, part 2", "B, part 2"]
    assert [of.name for of in report.columns(made)] == names
    _, body = report.rows(made)
    assert [row[0] for row in body] == names
    assert [row[1] for row in body[::2]] == ["100% (68–100)", "88% (64–97)", "75% (55–88)"], "each of its own count"
    assert [row[2] for row in body[::2]] == ["1.0", "2.0", "3.0"]
    assert report.details(made)["More"] == [["more ↓", "10.0", "10.0", "11.0", "11.0", "12.0", "12.0"]]
    assert report.attacks(made) == [["leak ↓", "20.0", "20.0", "21.0", "21.0", "22.0", "22.0"]]
    assert report.seen(made) == []
    assert "Findings: there are 3 starts, and runs of different starts are not compared." in report.not_shown(made)
    assert [title for title, _ in report.curves(made)] == [
        f"{title}, {name}" for name in ("part 1", "A, part 2", "B, part 2") for title in ("To forget ↓", "To keep ↑")
    ]
    (asked,) = html._questions(made)
    assert asked["befores"] == {names[0]: "reply 0", names[2]: "reply 1", names[4]: "reply 2"}
    made["scores"] = {"a": "forget_accuracy"}
    made["runs"][0]["config"]["alone"] = "a"
    assert report.against_alone(made) == [], "what was trained alone forgot another part"


def test_numbers_that_one_run_alone_measured_stand_before_all_runs_of_its_start() -> None:
    made = results(forget_accuracy=[0.25, 0.5], perplexity=[9.0, 8.0])
    made["runs"][1]["config"]["attacks"] = ["leak"]
    made["runs"][0]["before"]["perplexity"] = None
    (start,) = report.starts(made)
    assert (start.title, start.before) == ("before", {"forget_accuracy": 1.0, "perplexity": 1.0})


def test_a_task_without_a_verdict_says_the_two_numbers_of_its_plane() -> None:
    made = planed([0.25], [2.0])
    assert report.verdicts(made) == ["to forget 100% → 25%; perplexity 1.0 → 2.0."]
    made["runs"][0]["verdict"] = "Forgotten."
    assert report.verdicts(made) == ["Forgotten."]


def test_several_seeds_are_compared_by_their_means_and_told_apart_by_their_ranges() -> None:
    made = planed([0.1, 0.2], [1.0, 1.12], seeds=3)  # 1.0 to 1.2, and 1.12 to 1.32
    heads, body = report.over_seeds(made)
    assert heads == ["", "A", "B"]
    assert body[1] == ["perplexity ↓", "1.1 (1.0–1.2)", "1.2 (1.1–1.3)"]
    said = report.seen(made)
    assert said[0] == "To forget: A is lowest (A 10%, B 20%)."
    assert said[1] == "Perplexity: A is lowest; not told apart over seeds: B (A 1.1, B 1.2)."
    assert len(said) == 2
    assert report.over_seeds(planed([0.1], [1.0])) == ([], [])


def test_attacks_and_cost_stand_in_tables_of_their_own() -> None:
    made = results(forget_accuracy=[0.1, 0.2], perplexity=[1.0, 2.0])
    for name, group, values in (("relearn_probability", "", (0.5, 0.25)), ("leak_at_1", "Attacks", (None, None))):
        made["metrics"][name] = {"label": name, "better": "lower", "format": ".3f", "group": group}
        for entry, value in zip(made["runs"], values, strict=True):
            entry["before"][name], entry["after"][name] = None, value
    assert report.attacks(made) == [["relearn_probability ↓", "—", "0.500", "0.250"]]
    made["runs"][1] |= {"seconds": 61.26, "peak_memory_bytes": 2**31}
    assert report.cost(made)[0] == ["training", "1.0 s", "61.3 s"]
    assert report.cost(made)[-1] == ["peak memory", "1.0 GiB", "2.0 GiB"]
    assert not any(sentence.startswith("Attacks") for sentence in report.not_shown(made))


def test_what_a_page_lacks_it_gives_a_reason_for() -> None:
    said = report.not_shown(results(forget_accuracy=[0.1], perplexity=[1.0]))
    assert [sentence.partition(":")[0] for sentence in said] == [
        "What was forgotten against what was kept", "Conflict by layer", "Attacks", "Spread over seeds",
    ]  # fmt: skip
    assert [s.partition(":")[0] for s in report.not_shown(planed([0.1], [1.0], seeds=2))] == [
        "Conflict by layer", "Attacks",
    ]  # fmt: skip


# The command that does it again


def parsed(command: list[str]) -> Any:
    name, *told = shlex.split(" ".join(command).removeprefix("dualoptim "))
    return name, arguments.parse(arguments.parser(name), told)


@pytest.mark.parametrize(
    ("given", "methods", "seeds"),
    [
        ({"task": "tofu", "task_args": {"split": "forget01"}, "lr": 3e-4, "attacks": ["relearn"]}, [*METHODS], [0, 2]),
        (
            {"task": "facts", "multiplier_start": 100.0, "multiplier_warmup": 0.5, "steps": 7},
            ["DualOptim+", "PDU"],
            [1],
        ),
        ({"task": "tofu", "fast": True, "save_model": False, "betas": (0.8, 0.9)}, ["DualOptim", "GRU"], [0]),
        ({"task": "facts", "base_weights": "equal", "max_update": None}, ["DualOptim+", "Joint AdamW"], [3]),
    ],
)
def test_the_command_of_a_comparison_makes_the_same_settings(given: Any, methods: list[str], seeds: list[int]) -> None:
    configs = resolve.methods_of(RunConfig(**given, out="elsewhere"), methods, seeds)
    entries = [{"method": c.method, "seed": c.seed, "config": c.as_dict()} for c in configs]
    name, found = parsed(rerun.command({"runs": entries}))
    again = resolve.methods_of(arguments.config_of(found), found.methods, found.seeds)
    assert name == "compare"
    assert [c.replace(out="").as_dict() for c in again] == [c.replace(out="").as_dict() for c in configs]


def test_texts_that_look_like_numbers_come_back_from_the_command() -> None:
    config = RunConfig(task="x.py", task_args={"s": "007", "b": "null", "n": 7, "l": ["1", None]}, out="elsewhere")
    _, found = parsed(rerun.command({"runs": [{"method": config.method, "seed": 0, "config": config.as_dict()}]}))
    assert arguments.given_of(found)["task_args"] == config.task_args


def test_values_that_begin_with_a_dash_come_back_from_the_command() -> None:
    given = {"forget": "-x.jsonl", "retain": "--lr=1.jsonl", "until": -1e-5, "model": "-m n", "steps": -1}
    config = RunConfig(**given, out="elsewhere")
    entry = {"method": config.method, "seed": 0, "config": config.as_dict()}
    name, found = parsed(rerun.command({"runs": [entry]}))
    assert name == "unlearn"
    assert RunConfig(**arguments.given_of(found), out="elsewhere") == config


def test_the_command_of_one_run_and_of_a_grid() -> None:
    config = RunConfig(task="facts", optimizer="AdamW", joint=True, seed=4, lr=1e-3, until=0.1, out="elsewhere")
    entry = {"method": config.method, "seed": 4, "config": config.as_dict()}
    name, found = parsed(rerun.command({"runs": [entry]}))
    assert name == "unlearn"
    assert arguments.config_of(found).replace(out="elsewhere") == config
    name, found = parsed(rerun.command({"runs": [entry], "planned": 2, "grid": {"lr": [1e-3, 1e-2]}}))
    assert (name, found.grid, found.seeds) == ("compare", {"lr": [1e-3, 1e-2]}, [4])
    plan = {"methods": ["DualOptim+", "Joint AdamW"], "seeds": [0, 1]}  # of which one run is finished
    name, found = parsed(rerun.command({"runs": [entry], "planned": 4, "plan": plan, "grid": {}}))
    assert (name, found.methods, found.seeds) == ("compare", plan["methods"], plan["seeds"])
    assert rerun.command({"runs": [{**entry, "part": 1}]}) == rerun.command({"runs": [entry], "chosen": {}}) == []
