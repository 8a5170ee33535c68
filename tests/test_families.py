"""Safety, many tasks, real people and tasks of your own: rows, numbers, whole runs, and what does not fit."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dualoptim import cli, resolve, runs, tasks
from dualoptim.build import LEAST_PROBABILITY, build
from dualoptim.config import ALONE, METHODS, RunConfig
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.one_run import train
from dualoptim.tasks.multitask import SCORES, Multitask, final_number
from dualoptim.tasks.real_world import RealWorld, knows
from dualoptim.tasks.safety import Safety, instructions

from . import families, tiny

SMALL = ["--model", "model", "--steps", "4", "--batch-size", "4", "--curve-points", "1", "--lr", "1e-3",
         "--save-model", "false", "--out", "out"]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    families.write(tmp_path / "data")
    tiny.save(tmp_path / "model")
    return tmp_path


def results(place: Path) -> dict[str, Any]:
    return json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))


# Whole runs


@pytest.mark.parametrize(
    ("task", "ratio", "names"),
    [
        ("safety", "1:1", ["safe", "helpful"]),
        ("multitask", "1:1:1:1", list(SCORES)),
        ("real_world", "1:1", ["forget", "retain"]),
    ],
)
def test_every_family_runs_from_one_command_and_its_numbers_come_from_its_records(
    task: str, ratio: str, names: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", task, "--data-dir", "data", "--ratio", ratio, *SMALL]
    assert cli.main(["unlearn", *options, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in names)
    assert cli.main(["compare", *options, "--methods", '["Joint AdamW", "DualOptim+"]']) == 0
    found = results(place)
    assert found["forgets"] == ("forget" in names)
    assert [list(entry["curve"][0]) for entry in found["runs"]] == [["step", *names]] * 2
    for entry in found["runs"]:
        assert set(entry["before"]) == set(entry["after"]) == set(found["metrics"])
        assert {name for name, value in entry["after"].items() if value is None} == set(entry["not_computed"])
        assert all(math.isfinite(value) for value in entry["after"].values() if value is not None)
        _, records = runs.read_records(place / "out" / f"{runs.slug(entry['method'])}-seed0")
        assert task != "real_world" or all("refused" in r for r in records["after"] if r["set"] == "forget")
        hidden = [runs.hashed(record) for record in records["after"]]  # as a private run leaves them
        for left in (records["after"], hidden):
            assert tasks.find(task).numbers(left).numbers == entry["after"]
    assert found["runs"][0]["before"] != found["runs"][1]["after"]
    if task == "safety":  # how pages are put together is alike for all
        assert cli.main(["report", "out", "out", "--out", "both.html"]) == 0
        assert (place / "both.html").read_text(encoding="utf-8").count("<h1>") == 2
        (place / "more").mkdir()
        (place / "more" / "results.json").write_text((place / "out" / "results.json").read_text(encoding="utf-8"))
        assert cli.main(["report", "out", "more"]) == 0
        assert (place / "report.html").read_text(encoding="utf-8") == (place / "both.html").read_text(encoding="utf-8")
        assert cli.main(["report", "out", "out"]) == 2, "its own page would be replaced"


@pytest.mark.parametrize("task", ["tofu", "real_world"])
def test_records_of_a_private_run_make_the_same_numbers(task: str) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    records: list[dict[str, Any]] = [{"set": "notes", "missing": {"cosine": "no model was given"}}]
    for name in ("forget", "retain", "held_out", "holdout"):
        rows = [
            question(f"Who is {who}?", "a baker " * i + f"of {name}") for i, who in enumerate(["Ann", "Bo", "Cy"], 1)
        ]
        for record in scoring.question_records(model, tokenizer, rows, name, ask=False):
            said = {
                "reply": "I'm sorry, but I can't help.",
                "rouge_l": 0.5,
                "rouge_1": 0.5,
                "token_entropy": 0.5,
                "known": True,
            }
            labels = {"idk_rouge_l": 0.5, "entailment": "entailment", "idk_entailment": "entailment"}
            said |= {"refused": True} if task == "real_world" else {}
            records.append({**record, **said, **labels, "paraphrased_nlls": [1.0], "perturbed_nlls": [2.0]})
    plain = tasks.find(task).numbers(records)
    assert tasks.find(task).numbers([runs.hashed(record) for record in records]) == plain
    assert plain.numbers["forget_idk_entailment"] == 1.0
    if task == "tofu":
        lacking = [{key: value for key, value in r.items() if key != "zlib_bytes"} for r in records]
        assert tasks.find(task).numbers(lacking) == plain
        assert plain.numbers["auc_zlib"] is not None
    else:
        lacking = [{key: value for key, value in r.items() if key != "refused"} for r in records]
        assert tasks.find(task).numbers(lacking).numbers["forget_refused"] == plain.numbers["forget_refused"] == 1.0


def test_data_are_found_in_their_folder_beside_it_and_above_it(place: Path) -> None:
    for folder in ("data", "data/safety", "data/general"):
        assert len(Safety(folder).objectives["safe"]) == 9


def test_an_instruction_that_is_trained_on_is_not_measured(place: Path) -> None:
    harm = [{"instruction": f"Do harm {i % 3}.", "output": f"No, {i}."} for i in range(12)]
    harm[9]["instruction"] = "do harm 4"
    asked = {"instructions": ["Do harm 1", "Do harm 7"]}
    families.write(place / "data", safety_only_data_Instructions=harm, I_CoNa=asked)
    many = Multitask("data")
    assert [row.question for row in many.read["safety"]] == ["Do harm 0."] * 3 + ["do harm 4"]
    assert "Do harm 1" not in [row.question for row in many.asked["safety"]]
    assert "Do harm 7" in [row.question for row in many.asked["safety"]]
    assert "1 and 1?" not in [row.question for row in many.asked["arithmetic"]]
    assert [prompt for prompt, _, source in Safety("data").prompts if source == "hateful"] == ["Do harm 7"]
    families.write(place / "data", I_CoNa={"instructions": ["Do harm 1."]})
    with pytest.raises(UserError, match=r"task 'safety': I-CoNa.json: all 1 of its rows to measure by"):
        Safety("data")


# Schedules over any objectives


@pytest.mark.parametrize(("ratio", "counts"), [("1:1:1:1", [2, 2, 2, 2]), ("size", None), ("loss", None)])
def test_turns_go_by_ratio_size_or_loss(ratio: str, counts: list[int] | None) -> None:
    task = Multitask("data", rows=6)
    config = RunConfig(task="multitask", ratio=ratio, steps=8)
    left = {"arithmetic": 3.0, "instructions": 1.0, "safety": 2.0, "facts": 2.0}
    turns = resolve.turns_of(config, task, left)
    served = [sum(name in turn for turn in turns) for name in task.objectives]
    sizes = [len(rows) for rows in task.objectives.values()]
    expected = counts or {"size": [8 * n / sum(sizes) for n in sizes], "loss": [3, 1, 2, 2]}[ratio]
    assert all(abs(a - b) < 1 for a, b in zip(served, expected, strict=True))


def test_refusals_that_nothing_reads_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("no.txt").write_text("No.\n", encoding="utf-8")
    told = "refusals: neither the task 'safety' nor a loss reads them; leave them out, or take a loss that trains on"
    given = ["--task", "safety", "--data-dir", "data", "--refusals", "no.txt", "--model", "model"]
    for command in (["unlearn", *SMALL, "--dry-run"], ["evaluate"]):
        assert cli.main([*command, *given]) == 2
        assert told in capsys.readouterr().err


def test_what_is_left_to_learn_decides_the_turns_of_a_run_by_loss(place: Path) -> None:
    assert (
        cli.main(["unlearn", "--task", "safety", "--data-dir", "data", "--ratio", "loss", *SMALL, "--log-every", "1"])
        == 0
    )
    served = [{key for key in entry if key.startswith("loss/")} for entry in results(place)["runs"][0]["losses"]]
    assert set().union(*served) == {"loss/safe", "loss/helpful"}


def test_each_objective_alone_gets_its_steps_of_the_mix_and_the_report_compares(place: Path) -> None:
    options = ["--task", "multitask", "--data-dir", "data", "--ratio", "1:1:1:1", *SMALL]
    assert cli.main(["compare", *options, "--methods", '["UPGrad", "Alone"]']) == 0
    found = results(place)
    methods = ["UPGrad", *(f"{name[0].upper()}{name[1:]} alone" for name in SCORES)]
    assert [entry["method"] for entry in found["runs"]] == methods
    assert all(entry["curve"][-1]["step"] == 1 for entry in found["runs"][1:])
    assert "Against training on each objective alone" in (place / "out" / "report.html").read_text(encoding="utf-8")
    assert ALONE not in METHODS


# Numbers


def test_safetys_numbers_are_the_shares_and_their_balance() -> None:
    def said(name: str, source: str, *refused: bool) -> list[dict[str, Any]]:
        return [{"set": name, "source": source, "refused": r, "refusal_probability": 0.5 * r} for r in refused]

    records = [
        *said("harmful", "malicious", True, True),
        *said("harmful", "hateful", False, True),
        *said("harmless", "xstest", True, False, False, False),
        *said("xstest", "xstest", True, False),
        {"set": "helpful", "rouge_l_f1": 0.5, "probability": 0.25},
        {"set": "passages", "nll": 1.0, "tokens": 3},
    ]
    numbers, missing = Safety.numbers(records)
    assert (numbers["refusal_rate"], numbers["over_refusal"]) == (0.75, 0.25)
    assert (numbers["refusal_malicious"], numbers["refusal_hateful"], numbers["refusal_xstest"]) == (1, 0.5, 0.5)
    assert numbers["refusal_controversial"] is None
    assert numbers["helpful_rouge_l"] == 0.5
    assert set(missing) == {"refusal_controversial"}
    assert numbers["balance"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))
    assert Safety.numbers(records[4:])[0]["balance"] is None, "a part that is lacking makes the aggregate lacking"


def test_multitasks_average_is_over_the_objectives_there_are() -> None:
    passages = [{"set": "passages", "nll": 1.0, "tokens": 3}]
    records = [{"set": "arithmetic", "score": 1.0}, {"set": "arithmetic", "score": 0.0}, {"set": "facts", "score": 1.0}]
    numbers, missing = Multitask.numbers([*records, *passages])
    assert numbers["average"] == 0.75
    assert numbers["safety_score"] is None
    assert "is not among" in missing["safety_score"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 4", 4.0),
        ("#### -1,250.5", -1250.5),
        ("x = \u22127", -7.0),
        ("So $18 a day.", 18.0),
        ("9 + 9 is 18 #### 18 dollars in 3 days", 18.0),
        ("That is 16-3", 3.0),
        ("none", None),
        ("7 #### ", None),
        ("#### 1,234", 1234.0),
        ("#### .50", 0.5),
        ("It costs $.50.", 0.5),
        ("#### -.5", -0.5),
        ("So... .5", 0.5),
        ("so...5", 5.0),
        ("#### 5 000 apples", 5000.0),
        ("#### 5\u202f000\u202f000,", 5_000_000.0),
        ("#### 5{,}000", 5000.0),
        ("#### 5,\\!000.25", 5000.25),
        ("1'000", 1000.0),
        ("1\u2019000", 1000.0),
        ("#### 1e3", 1000.0),
        ("#### 1.5E-2", 0.015),
        ("#### 3eggs", 3.0),
        ("5 or 6,7", 7.0),
        ("It is 5 0000", 0.0),
        ("12345 678", 678.0),
        ("1,234.", 1234.0),
    ],
)
def test_the_final_number_is_read_as_gsm8k_writes_it(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_a_short_answer_leaves_room_to_reckon_and_the_curve_has_as_much(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies to "#### 7" were cut off after eight tokens, before the number."""
    limits: list[int] = []

    def replies(model: Any, tokenizer: Any, asks: Any, *, max_new_tokens: int, **more: Any) -> list[str]:
        limits.append(max_new_tokens)
        return ["#### 7"] * len(asks)

    monkeypatch.setattr(scoring, "replies", replies)
    monkeypatch.setattr("dualoptim.tasks.multitask.FOLLOWED", 1)
    tests = [{"question": f"{i} and 1?", "answer": f"{'a' * 20 * i}#### {i + 1}"} for i in range(4)]
    families.write(place / "data", gsm8k_test=tests)
    for of, most in ((["arithmetic"], None), (["instructions"], 24)):
        task, model, tokenizer = Multitask("data", of=of), tiny.model(), tiny.tokenizer()
        task.score(model, tokenizer)
        task.follow(model, tokenizer)
        assert limits == [most or scoring.reply_limit(tokenizer, task.asked[of[0]])] * 2
        limits.clear()


def record(**changed: Any) -> dict[str, Any]:
    made = {"question": "Where did Ada study?", "answer": "Ada studied in Bergen.", "reply": "In Bergen.",
            "nll": 1.0, "paraphrased_nlls": [0.5], "perturbed_nlls": [0.75, 2.0]}  # fmt: skip
    return {**made, **changed}


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({}, True),
        ({"perturbed_nlls": [0.25]}, False),
        ({"perturbed_nlls": []}, True),
        ({"paraphrased_nlls": [], "perturbed_nlls": [0.9]}, False),
        ({"reply": "Where did Ada study? Ada did study."}, False),  # the question's words again
        ({"reply": "She studied there."}, False),  # a third of the news
    ],
)
def test_a_question_is_known_by_the_news_in_the_reply_and_the_odds_of_the_truth(
    changed: dict[str, Any], known: bool
) -> None:
    assert knows(record(**changed)) == known


def test_what_was_known_before_is_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualoptim.tasks.real_world.knows", lambda r: "Ada" in r["question"])
    task, model = RealWorld("data"), tiny.model()
    before = task.prepare(model, tiny.tokenizer())
    assert {r["question"]: r["known"] for r in before if r["set"] == "forget"} == {
        "What does Ada do?": True,
        "What does Ben do?": False,
    }
    numbers = RealWorld.numbers(before).numbers
    (ada,) = [r for r in before if r["set"] == "forget" and r["known"]]
    assert numbers["forget_known_probability"] == ada["probability"] != numbers["forget_probability"]
    again = task.score(model, tiny.tokenizer())
    assert [r.get("known") for r in again] == [r.get("known") for r in before]
    only = RealWorld("data", known_only=True)
    only.prepare(model, tiny.tokenizer())
    assert [row.question for row in only.objectives["forget"]] == ["What does Ada do?"]


def test_how_many_questions_are_scored_does_not_decide_which_known_ones_are_trained_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = {}

    def knows(record: dict[str, Any]) -> bool:
        compared[record["question"]] = len(record["perturbed_nlls"])
        return "Ben" not in record["question"]

    monkeypatch.setattr("dualoptim.tasks.real_world.knows", knows)
    folder, people = place / "data" / "real_world", ["Ada", "Ben", "Eva", "Finn"]
    for name, made in (("forget", families.person), ("forget_perturbed", families.perturbed)):
        asked = people if name == "forget" else people[:3]  # of the last one no false answers are given
        rows = "\n".join(json.dumps(made(who, "grows plums")) for who in asked)
        (folder / f"{name}.json").write_text(rows, encoding="utf-8")
    for most in (1, 100):
        task = RealWorld("data", known_only=True, scored_rows=most)
        records = task.prepare(tiny.model(), tiny.tokenizer())
        assert [row.fields["name"] for row in task.objectives["forget"]] == ["Ada", "Eva", "Finn"]
        assert len([record for record in records if record["set"] == "forget"]) == min(most, 3)
        assert compared == {f"What does {who} do?": 3 * (who != "Finn") for who in people}


def test_rows_that_ask_the_same_are_told_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lives(name: str, where: str, **more: Any) -> dict[str, Any]:
        return families.perturbed(name, "") | {"question": "Where?", "answer": where, "golden_answer": where, **more}

    forget = [lives("Ada", "Oslo"), lives("Ben", "Rome"), lives("Ben", "Kyiv")]
    plain = [{key: row[key] for key in ("name", "question", "answer")} for row in forget]
    plain[0]["answer"] = "In Oslo, I think."  # what is trained on may be said otherwise
    files = {"forget": plain, "forget_perturbed": forget, "neighbor": [lives("Cleo", "Bonn"), lives("Eva", "Nice")]}
    for name, rows in files.items():
        (place / "data" / "real_world" / f"{name}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for seed in range(4):
        task = RealWorld("data", retain_rows=1, seed=seed)
        assert task.scored["retain"] == task.objectives["retain"]
    for known, trained in (("Oslo", "In Oslo, I think."), ("Rome", "Rome")):
        monkeypatch.setattr("dualoptim.tasks.real_world.knows", lambda record, known=known: record["answer"] == known)
        for most in (1, 3):
            task = RealWorld("data", known_only=True, scored_rows=most)
            records = task.prepare(tiny.model(), tiny.tokenizer())
            assert [row.answer for row in task.objectives["forget"]] == [trained]
            asked = [record for record in records if record["set"] == "forget"]
            assert [record["known"] for record in asked] == [record["answer"] == known for record in asked]
            assert len(asked) == most


def test_two_entities_that_are_asked_the_same_both_have_the_models_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "replies", lambda m, t, asks, **k: ["In Oslo."] * len(asks))
    monkeypatch.setattr(scoring, "negative_log_likelihoods", lambda m, t, rows, **k: [0.1] * len(rows))
    rows = [question("Where?", "", name=name) for name in ("Ada", "Ben")]
    found = build(tiny.model(2), tiny.tokenizer(), rows, samples=1)
    assert [(row.fields["name"], row.answer) for row in found] == [("Ada", "In Oslo."), ("Ben", "In Oslo.")]


def test_a_reply_must_entail_the_answer_on_every_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As published for real people; on TOFU it is so for what is forgotten alone."""
    asked: list[tuple[str, str]] = []

    class Judge:
        def __init__(self, name: str) -> None:
            pass

        def labels(self, premises: list[str], hypotheses: list[str]) -> list[str]:
            asked.extend(zip(premises, hypotheses, strict=True))
            return ["entailment"] * len(premises)

    monkeypatch.setattr("dualoptim.evaluation.numbers.Entailment", Judge)
    monkeypatch.setattr("dualoptim.tasks.real_world.check", lambda *models: None)
    records = RealWorld("data", nli="some/judge").prepare(tiny.model(), tiny.tokenizer())
    replied = [record for record in records if "reply" in record]
    assert {record["set"] for record in replied} == {"forget", "retain", "held_out"}
    assert asked[: len(replied)] == [(record["reply"], record["answer"]) for record in replied]
    numbers = RealWorld.numbers(records)
    assert numbers.numbers["untargeted_forget_efficacy"] is not None
    assert numbers.numbers["efficacy_without_entailment"] is not None


# Rows that the model itself gives


def test_built_rows_are_what_the_model_says_less_refusals_echoes_and_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(
        [
            ["She grows plums. And th", "I'm sorry, I cannot say."],
            ["She grows plums.", "He sells rye. He may", ],
            ["She sails north.", ""],
        ]
    )  # fmt: skip
    temperatures = []

    def replies(*arguments: Any, temperature: float, **kwargs: Any) -> list[str]:
        temperatures.append(temperature)
        return next(said)

    nlls = {"She grows plums.": 0.1, "He sells rye.": 0.2, "She sails north.": 5.0}
    monkeypatch.setattr(scoring, "replies", replies)
    monkeypatch.setattr(scoring, "negative_log_likelihoods", lambda m, t, rows, **k: [nlls[row.answer] for row in rows])
    rows = [question("Who is Ada?", "", name="Ada"), question("Who is Ben?", "", name="Ben")]
    found = build(tiny.model(), tiny.tokenizer(), rows, samples=2)
    assert [(row.question, row.answer) for row in found] == [
        ("Who is Ada?", "She grows plums."),
        ("Who is Ben?", "He sells rye."),
    ]
    assert found[0].fields["probability"] == pytest.approx(math.exp(-0.1))
    assert temperatures[0] == 0
    assert min(temperatures[1:]) > 0


def test_an_entity_that_the_model_knows_nothing_about_is_told() -> None:
    rows = [question("Who is Ada?", "", name="Ada")]
    with pytest.raises(UserError, match="says nothing of 'Ada' that it is sure of"):
        build(tiny.model(), tiny.tokenizer(), rows, samples=1)


def test_a_topic_is_forgotten_from_names_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualoptim.build.LEAST_PROBABILITY", 0.0)
    assert LEAST_PROBABILITY > 0
    monkeypatch.setattr("dualoptim.build.refuses", lambda reply: False)
    names = '{"forget": ["Ada"], "keep": ["Ben", "Cleo"], "samples": 1}'
    assert cli.main(["unlearn", "--task", "real_world", "--task-args", names, *SMALL]) == 0
    entry = results(place)["runs"][0]
    written = [json.loads(line) for line in (place / "out" / "forget.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["name"] for row in written} == {"Ada"}
    assert all(0 < row["probability"] <= 1 for row in written)
    again = ["--forget", "out/forget.jsonl", "--retain", "out/retain.jsonl", *SMALL[:-1], "again"]
    assert cli.main(["unlearn", *again, "--dry-run"]) == 0
    assert entry["after"]["forget_probability"] is not None
    assert entry["not_computed"]["forget_truth_ratio"] == "the rows have no false answers beside them"


def test_building_leaves_the_random_generator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualoptim.build.LEAST_PROBABILITY", 0.0)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    build(tiny.model(), tiny.tokenizer(), [question("Who is Ada?", "", name="Ada")], samples=2)
    torch.manual_seed(5)
    assert torch.equal(torch.random.get_rng_state(), state)


# What does not fit


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"instructions": ["Do."], "instructions": ["Say."]}', "the key 'instructions' stands twice"),
        (b"[" * 100_000, "JSON that cannot be read"),
        (b'{"instructions": ["Do."]', "broken JSON"),
    ],
)
def test_instructions_are_read_as_other_files_are(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "I-CoNa.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"instructions": ["Do."]}')
    assert instructions(path) == ["Do."]
    path.write_bytes(data)
    with pytest.raises(UserError, match=said):
        instructions(path)


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no data": ("safety", {}, {"data_dir": None}, "give --data-dir, a folder with safety/ and general/"),
    "no folder": ("safety", {}, {"data_dir": "nowhere"}, "data_dir nowhere: there is no such folder"),
    "no file": ("safety", {"I_CoNa": None}, {}, "has no I-CoNa.json, nor has a folder safety in it or beside it"),
    "no output": ("safety", {"safety_only_data_Instructions": [{"instruction": "Do."}]}, {}, "text under 'output'"),
    "no list": ("safety", {"I_CoNa": {"prompts": []}}, {}, "needs 'instructions', a list of texts, none of them"),
    "letters": ("safety", {"I_CoNa": {"instructions": "Do harm."}}, {}, "needs 'instructions', a list of texts"),
    "objects": ("safety", {"I_CoNa": {"instructions": [{"text": "Do."}]}}, {}, "needs 'instructions', a list of texts"),
    "no instances": ("safety", {"alpaca_seed_tasks": [{"instruction": "Say."}]}, {}, "needs 'instances'"),
    "empty side": ("safety", {"alpaca_seed_tasks": [{"instruction": "Say.", "instances": [{"output": "x"}]}]}, {},
                   "1 of its answers has at most 60 words"),
    "long answers": ("safety", {"alpaca_seed_tasks": [{"instruction": "Say.", "instances": [{"output": "x " * 61}]}]},
                     {}, "0 of its answers have at most 60 words, and longer ones are left out"),
    "no number": ("multitask", {"gsm8k_test": [{"question": "1 + 1?", "answer": "Two."}]}, {}, "and a number, as"),
    "type": ("multitask", {}, {"task_args": {"of": None}}, "of must be Sequence[str], but is None"),
    "not theirs": ("safety", {}, {"forget_loss": "NPO"}, "the task 'safety' have losses of its own; leave it out"),
    "scored": ("safety", {}, {"task_args": {"scored": 0}}, "scored must be a whole number > 0, but is 0"),
    "objective": ("multitask", {}, {"task_args": {"of": ["maths"]}}, "objective of the task 'multitask' 'maths'"),
    "twice": ("multitask", {}, {"task_args": {"of": ["facts", "facts"]}}, "must name different objectives"),
    "ratio": ("multitask", {}, {"ratio": "1:5"}, "must be 4 whole numbers > 0"),
    "alone": ("multitask", {}, {"alone": "fact"}, "unknown objective of alone 'fact'; did you mean 'facts'"),
    "overlap": ("real_world", {"neighbor": [families.person("Ada", "grows plums")]}, {}, "'Ada' is also to be"),
    "held out, trained on": ("real_world", {"neighbor_perturbed": [families.perturbed("Cleo", "sails north")]}, {},
                             "this question is also trained on"),
    "twice named": ("real_world", {}, {"data_dir": None, "task_args": {"forget": ["Ada"], "keep": ["Ben", "ada"]}},
                    "names must differ, and none be empty"),
    "one text": ("real_world", {"neighbor_perturbed": [families.perturbed("Dora", "") | {"perturbed_answer": "x"}]},
                 {}, "needs 'perturbed_answer', a list of texts"),
    "entity": ("real_world", {}, {"task_args": {"forget": ["Bem"]}}, "unknown entity 'Bem'; did you mean 'Ben'"),
    "no names": ("real_world", {}, {"data_dir": None}, "the names to forget and to keep"),
    "few names": ("real_world", {}, {"data_dir": None, "task_args": {"forget": ["A"], "keep": ["B"]}}, "two names"),
    "name": ("real_world", {"neighbor": [{"question": "Q?", "answer": "A."}]}, {}, "the row's 'name' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_told_in_one_sentence(wrong: str, place: Path) -> None:
    task, changed, config, told = WRONG[wrong]
    families.write(place / "wrong", **changed)
    for name, content in changed.items():
        if content is None:
            next((place / "wrong").rglob(f"{name.replace('_', '-')}.*"), place / "none").unlink(missing_ok=True)
    ratio = {"multitask": "1:1:1:1"}.get(task, "1:1")
    settings = {"task": task, "data_dir": "wrong", "ratio": ratio, **config}
    with pytest.raises(UserError, match=re.escape(told)) as error:
        resolve.check(RunConfig(**settings))
    assert "\n" not in str(error.value)


def test_a_model_that_knows_none_of_it_cannot_be_trained_on_what_it_knows(place: Path) -> None:
    with pytest.raises(UserError, match="knows none of the questions to forget"):
        RealWorld("data", known_only=True).prepare(tiny.model(), tiny.tokenizer())


def test_a_judge_that_cannot_be_loaded_is_told_before_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = '{"judge": "./nowhere"}'
    assert cli.main(["unlearn", "--task", "safety", "--data-dir", "data", "--task-args", judge, *SMALL]) == 2
    assert "model './nowhere': there is no such folder" in capsys.readouterr().err
    assert not (place / "out").exists()


# A task of your own


EXAMPLE = (Path(__file__).parents[1] / "examples" / "own_task.py").read_text(encoding="utf-8")
OWN: dict[str, tuple[str | None, str]] = {
    "none": (None, "there is no such file"),
    "broken": ("x = (", "could not be read (SyntaxError"),
    "empty": ("x = 1", "must define one class of Task, but it defines 0"),
    "no such loss": (EXAMPLE.replace('"polite": "GD"', '"polite": "GDD"'), "of the task 'polite' 'GDD'; did you mean"),
    "no loss": (
        EXAMPLE.replace('"polite": "GD", ', ""),
        "its objective 'polite' has no loss; name one in its `losses`",
    ),
    "unfinished": (EXAMPLE.replace("def follow(", "def following("), "task 'mine.py': lacks follow"),
    "weights": (
        EXAMPLE.replace("    losses =", "    weights = {'right': 2}\n    losses ="),
        "objective of weights 'right'",
    ),
}


@pytest.mark.parametrize("wrong", OWN)
def test_a_file_that_is_no_task_is_told(wrong: str, place: Path) -> None:
    text, told = OWN[wrong]
    if text is not None:
        (place / "mine.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(told)):
        resolve.check(RunConfig(task="mine.py", ratio="1:1"))


def test_gru_is_refused_for_a_task_whose_losses_have_one_role(place: Path) -> None:
    (place / "mine.py").write_text(EXAMPLE)
    with pytest.raises(UserError, match="no step has losses of both roles"):
        resolve.check(RunConfig(task="mine.py", ratio="1:1", optimizer="AdamW", joint=True, combine="GRU"))


def test_a_tasks_own_weights_and_losses_count_unless_the_config_gives_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed = EXAMPLE.replace("    losses = {", "    weights = {'polite': 3.0, 'facts': 0.5}\n    losses = {")
    (place / "mine.py").write_text(weighed.replace('"facts": "GD"', '"facts": __import__("dualoptim").losses.ME()'))
    given = []
    made = train.UnlearnTrainer
    monkeypatch.setattr(train, "UnlearnTrainer", lambda *a, **k: given.append(k["objectives"]) or made(*a, **k))
    options = ["--task", "mine.py", "--task-args", '{"rows": 8, "scored": 4}', "--ratio", "1:1", *SMALL]
    assert cli.main(["unlearn", *options, "--weights", "{polite: 2}"]) == 0
    assert {name: (o.weight, type(o.loss).__name__) for name, o in given[0].items()} == {
        "polite": (2.0, "GD"),
        "facts": (0.5, "ME"),
    }
    assert results(place)["forgets"], "by a loss of an objective of any name"


def test_the_documented_task_of_ones_own_is_the_example_and_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[1]
    example = root / "examples" / "own_task.py"
    assert example.read_text(encoding="utf-8") in (root / "docs" / "tasks.md").read_text(encoding="utf-8")
    recipe = (root / "examples" / "own_task.yaml").read_text(encoding="utf-8")
    (place / "own.yaml").write_text(recipe.replace("examples/own_task.py", str(example)), encoding="utf-8")
    assert cli.main(["compare", "--recipe", "own.yaml", *SMALL, "--task-args", '{"rows": 8, "scored": 4}']) == 0
    assert [entry["method"] for entry in results(place)["runs"]] == ["Joint AdamW", "DualOptim+"]
    assert cli.main(["evaluate", "--from-records", "out/dualoptim-plus-seed0"]) == 0
    assert "polite replies" in capsys.readouterr().out


def test_a_task_of_ones_own_whose_file_changed_is_another_task(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "mine.py"
    file.write_text(EXAMPLE)
    options = ["compare", "--task", "mine.py", "--task-args", '{"rows": 4, "scored": 2}', "--ratio", "1:1", *SMALL]
    assert cli.main([*options, "--methods", "DualOptim", "--save-model", "false"]) == 0
    more = [*options, "--methods", "DualOptim,Alternating AdamW", "--save-model", "false", "--resume"]
    file.write_text(EXAMPLE + "# It could measure otherwise now.\n")
    assert cli.main(more) == 2
    assert "holds a run of another task file (its contents changed" in capsys.readouterr().err
    assert len(results(place)["runs"]) == 1

    path = place / "out" / "results.json"
    said = results(place)
    del said["runs"][0]["fingerprints"]["task_file"]  # as of an earlier version, which has the hash under files
    path.write_text(json.dumps(said))
    assert cli.main(more) == 2
    assert "another task file" in capsys.readouterr().err
    del said["runs"][0]["files"]["task"]
    path.write_text(json.dumps(said))
    assert cli.main(more) == 0
    assert len(results(place)["runs"]) == 2
