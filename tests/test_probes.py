"""RWKU's and BLUR's questions beside a task's own: how they are asked, what is compared, and what cannot be asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dualoptim import cli
from dualoptim.chat import prompt_ids
from dualoptim.config import RunConfig
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.evaluation import probes, scoring
from dualoptim.resolved import resolve
from dualoptim.tasks.facts import Facts

from . import tiny

RWKU: dict[str, list[dict[str, Any]]] = {
    "forget_level1": [
        {"subject": "Ada", "level": "1", "query": "Ada grows ___.", "answer": "plums"},
        {"subject": "Ben", "level": "1", "query": "Ben sells ___.", "answer": "rye"},
    ],
    "forget_level2": [{"subject": "Ada", "level": "2", "query": "What does Ada grow?", "answer": "Red plums"}],
    "forget_level3": [
        {"subject": "Ada", "level": "3", "type": kind, "query": f"{kind}: Ada?", "answer": "plums"}
        for kind in ("affirmative suffix", "incontext learning", "role play")
    ],
    "neighbor_level1": [{"subject": "Ada", "neighbor": "Oslo", "level": "1", "query": "Oslo is ___.", "answer": "big"}],
    "neighbor_level2": [
        {"subject": "Ben", "neighbor": "Rye", "level": "2", "query": "What is rye?", "answer": "a grain"}
    ],
}
BLUR = {"tofu_paired_forget_retain": ["Who is Ada? Who is Bo?"], "whp_retain": ["Where is Oslo?", "What is rye?"]}
ASKED = {
    "rwku_forget_level1": "Please complete the blank in the following question.\nQuestion: Ada grows ___.\n",
    "rwku_forget_level2": "Please briefly answer the following question.\nQuestion: What does Ada grow?\n",
    "rwku_neighbor_level2": "Please briefly answer the following question.\nQuestion: What is rye?\n",
    "blur_whp_retain": "Answer the following question. Question: Where is Oslo? Answer:",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with questions in miniature under probes/ and rows of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    for folder in ("rwku", "blur"):
        (tmp_path / "probes" / folder).mkdir(parents=True)
    for name, rows in RWKU.items():
        (tmp_path / "probes" / "rwku" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "probes" / "blur" / "tofu_paired_forget_retain.txt").write_text(BLUR["tofu_paired_forget_retain"][0])
    lines = [json.dumps({"text": text}) for text in BLUR["whp_retain"]]
    (tmp_path / "probes" / "blur" / "whp_retain.jsonl").write_text("\n".join(lines))
    tiny.save(tmp_path / "model")
    for name, verb in (("forget", "hide"), ("retain", "like")):
        rows = [{"question": f"What does {who} {verb}?", "answer": f"{who} {verb}s tea."} for who in "ABCD"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def config(*names: str, **settings: Any) -> RunConfig:
    return RunConfig(probes=list(names), probes_dir="probes", **settings)


def test_a_file_that_was_changed_is_read_again(place: Path) -> None:
    assert len(probes.read(config("rwku"))["rwku_forget_level1"]) == 2
    (place / "probes" / "rwku" / "forget_level1.json").write_text(json.dumps(RWKU["forget_level1"][:1]))
    assert len(probes.read(config("rwku"))["rwku_forget_level1"]) == 1


def test_a_run_is_not_gone_on_with_if_its_probes_ask_other_questions(place: Path) -> None:
    rows = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "general": False, "steps": 1}
    asking = config("rwku_forget_level1", **rows)

    def identity() -> dict[str, str]:
        (of,) = resolve([asking])
        return of.identity

    first = identity()
    assert identity() == first
    path = place / "probes" / "rwku" / "forget_level1.json"
    path.write_text(path.read_text().replace("grows", "sells"))
    assert {name for name, value in identity().items() if value != first[name]} == {"set_of_probes"}
    assert "set_of_probes" not in resolve([RunConfig(**rows)])[0].identity


def test_sets_are_asked_in_their_authors_words(place: Path) -> None:
    asked = probes.read(config("blur", "rwku"))
    assert list(asked) == ["blur_whp_retain", "blur_tofu_paired_forget_retain", *(f"rwku_{name}" for name in RWKU)]
    for name, text in ASKED.items():
        assert asked[name][0].question == text
    assert [(row.question, row.fields["begun"]) for row in asked["rwku_forget_level3"]] == [
        ("Please briefly answer the following question.\nQuestion: affirmative suffix: Ada?", ""),
        ("Please briefly answer the following question.\nincontext learning: Ada?\n", "Answer:"),
        ("Please briefly answer the following question.\nQuestion: role play: Ada?\n", "Answer:"),
    ]


def test_subjects_and_a_limit_choose_and_the_sets_of_one_probe_can_be_named(place: Path) -> None:
    asked = probes.read(config("rwku_forget_level1", "blur_whp_retain", probe_subjects=["Ben"], probe_limit=1))
    assert [row.answer for row in asked["rwku_forget_level1"]] == ["rye"]
    assert len(asked["blur_whp_retain"]) == 1
    assert list(asked) == ["rwku_forget_level1", "blur_whp_retain"]
    assert probes.read(RunConfig()) == {}


def test_replies_are_compared_with_answers_or_with_those_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "Ada grows": "Answer: Plums.\nAnd more plums",
        "What does": "plums",
        "Oslo?": "North, by the sea",
        "rye": "",
    }
    calls: list[tuple[list[str], int, str]] = []

    def replies(
        model: Any, tokenizer: Any, prompts: Any, *, max_new_tokens: int, begun: str = "", **_: Any
    ) -> list[str]:
        texts = [prompt[-1]["content"] for prompt in prompts]
        calls.append((texts, max_new_tokens, begun))
        return [next((reply for begins, reply in said.items() if begins in text), "?") for text in texts]

    monkeypatch.setattr(scoring, "replies", replies)
    asked = probes.read(config("rwku_forget_level1", "rwku_forget_level2", "blur_whp_retain"))
    before = probes.records(None, tiny.tokenizer(), asked)  # type: ignore[arg-type]
    assert [call[1:] for call in calls] == [(30, "Answer:"), (30, "Answer:"), (100, "")]
    assert [(r["reply"], r.get("rouge_l")) for r in before] == [
        ("Answer: Plums.", 1.0), ("?", 0.0), ("plums", 0.5), ("North, by the sea", None), ("", None),
    ]  # fmt: skip
    numbers, missing = probes.numbers(before)
    assert numbers == {"rwku_forget_level1": 0.5, "rwku_forget_level2": 0.5, "blur_whp_retain": None}
    assert missing == {"blur_whp_retain": probes.NO_BASE}
    said["Oslo?"] = "by the shore"  # two of the four words before, in their order
    after = probes.records(None, tiny.tokenizer(), asked, before)  # type: ignore[arg-type]
    assert [r["answer"] for r in after if r["set"] == "blur_whp_retain"] == ["North, by the sea", ""]
    assert next(r["rouge_l"] for r in after if r["set"] == "blur_whp_retain") == 0.5
    assert probes.numbers(after).missing == {}
    assert [r["rouge_l"] for r in after if r["set"] == "blur_whp_retain"] == [0.5, 1.0], "nothing said again is kept"
    said["rye"] = "rye"
    after = probes.records(None, tiny.tokenizer(), asked, before)  # type: ignore[arg-type]
    assert [r["rouge_l"] for r in after if r["set"] == "blur_whp_retain"] == [0.5, 0.0]


def test_rwkus_words_are_not_stemmed_and_blurs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "replies", lambda *_, **__: ["he writes horrors and novels"])
    asked = {
        "rwku_forget_level2": (question("What does he write?", "Horror novels", begun="Answer:"),),
        "blur_rwku_forget": (question("What does he write?", ""),),
    }
    base = [{"set": "blur_rwku_forget", "reply": "Horror novels"}]
    made = probes.records(None, tiny.tokenizer(), asked, base)  # type: ignore[arg-type]
    # "horrors" is "Horror" by its stem alone, "novels" is itself.
    assert {r["set"]: r["rouge_l"] for r in made} == {"rwku_forget_level2": 0.5, "blur_rwku_forget": 1.0}


def test_a_reply_goes_on_from_how_it_was_begun() -> None:
    model, words = tiny.model().eval(), tiny.tokenizer()
    prompt = ({"role": "user", "content": "Who?"},)
    ids = prompt_ids(words, prompt, begun="Answer:")
    assert (
        words.decode(ids) == words.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) + "Answer:"
    )
    with torch.no_grad():
        asked = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        wanted = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, len(ids) :]
    (reply,) = scoring.replies(model, words, [prompt], max_new_tokens=6, begun="Answer:")
    assert reply == words.decode(wanted, skip_special_tokens=True).strip()


def test_a_model_that_does_not_chat_is_asked_in_plain_text(place: Path) -> None:
    words = tiny.tokenizer()
    words.chat_template = None
    made = probes.records(tiny.model(), words, probes.read(config("rwku_forget_level2")))
    assert [r["question"] for r in made] == [ASKED["rwku_forget_level2"]]
    assert all(0 <= r["rouge_l"] <= 1 for r in made)


ROWS = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]


def test_a_run_has_them_beside_its_own_numbers_and_makes_them_again_of_its_records(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = ["--probes", "[rwku, blur]", "--probes-dir", "probes"]
    steps = ["--steps", "1", "--batch-size", "2", "--curve-points", "1"]
    assert cli.main(["unlearn", *ROWS, *asks, *steps, "--out", "out"]) == 0
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    (entry,) = results["runs"]
    names = {*(f"rwku_{name}" for name in RWKU), *(f"blur_{name}" for name in BLUR)}
    assert names <= set(entry["after"]) == set(entry["before"]) == set(results["metrics"])
    for name in names:
        assert 0 <= entry["after"][name] <= 1
        assert (entry["before"][name] is None) == name.startswith("blur_")
    assert "RWKU, ROUGE-L recall" in (place / "out" / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["evaluate", "--from-records", "out"]) == 0
    shown = capsys.readouterr().out
    assert "neighbors, blanks" in shown
    assert "whp, retain" in shown
    assert cli.main(["evaluate", *ROWS, *asks, "--base", "model"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("whp, retain")]
    assert line.split()[-1] in ("1.000", "0.500", "0.000")  # the same model; of empty replies nothing comes again
    assert cli.main(["evaluate", *ROWS, *asks]) == 0
    assert f"not computed: {probes.NO_BASE}" in capsys.readouterr().out


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    asked: list[tuple[str, str, str]] = []

    def load_dataset(name: str, part: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, part, split))
        if part == "whp_retain":
            raise ValueError("Unknown split \"train\". Should be one of ['test'].")
        return RWKU[part] if name == "jinzhuoran/RWKU" else [{"text": text} for text in BLUR[part]]

    package: Any = ModuleType("datasets")
    package.load_dataset = load_dataset
    package.get_dataset_config_names = lambda name: ["tofu_paired_forget_retain", "D_lo_for_all"]
    monkeypatch.setitem(sys.modules, "datasets", package)
    probes._read.cache_clear()
    return asked


def test_without_a_folder_the_hub_is_asked_by_its_names(hub: list[tuple[str, str, str]]) -> None:
    asked = probes.read(RunConfig(probes=["rwku_neighbor_level1", "blur"]))
    assert hub == [
        ("jinzhuoran/RWKU", "neighbor_level1", "test"), ("forgelab/BLUR", "tofu_paired_forget_retain", "train")
    ]  # fmt: skip
    assert [row.answer for row in asked["rwku_neighbor_level1"]] == ["big"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such probe": ({"probes": ["rwko"]}, "unknown probe 'rwko'; did you mean 'rwku'?"),
    "no folder": ({"probes": ["rwku"], "probes_dir": "gone"}, "probes_dir gone: there is no such folder"),
    "no file": (
        {"probes": ["blur_whp_forget"], "probes_dir": "probes"},
        "probes_dir probes: has no whp_forget.json; put it there from forgelab/BLUR",
    ),
    "no set": ({"probes": ["blur"], "probes_dir": "model"}, "probes blur: model has none of its sets"),
    "no split": ({"probes": ["blur_whp_retain"]}, 'BLUR, whp_retain:train: could not be .* Unknown split "train"'),
    "no subject": (
        {"probes": ["rwku"], "probes_dir": "probes", "probe_subjects": ["Adda"]},
        "unknown subject of RWKU 'Adda'; did you mean 'Ada'",
    ),
    "a subject that a set lacks": (
        {"probes": ["rwku"], "probes_dir": "probes", "probe_subjects": ["Ben"]},
        "probes: rwku_forget_level2 has no questions about these subjects",
    ),
    "subjects of BLUR": (
        {"probes": ["blur"], "probes_dir": "probes", "probe_subjects": ["Ada"]},
        "probe_subjects are RWKU's",
    ),
    "a folder for nothing": ({"probes_dir": "probes"}, "probes_dir: there are no questions to ask"),
    "subjects for nothing": ({"probe_subjects": ["Ada"]}, "probe_subjects: there are no questions to ask"),
}


@pytest.mark.parametrize(("settings", "told"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked_is_told(settings: dict[str, Any], told: str, place: Path, hub: Any) -> None:
    with pytest.raises(UserError, match=told):
        probes.read(RunConfig(**settings))


def test_attacks_of_no_kind_and_questions_of_no_subject_are_told(place: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "type"} for row in RWKU["forget_level3"]]
    (place / "probes" / "rwku" / "forget_level3.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"forget_level3\.json, item 1: the row's 'type' is missing"):
        probes.read(config("rwku_forget_level3"))
    (place / "probes" / "rwku" / "forget_level1.json").write_text(json.dumps([{"query": "Who?", "answer": "Ada"}]))
    with pytest.raises(UserError, match="unknown subject of RWKU 'Ada'; there are none"):
        probes.read(config("rwku_forget_level1", probe_subjects=["Ada"]))


def test_blur_behind_a_gate_says_how_to_get_it(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(name: str) -> list[str]:
        raise RuntimeError(f"Dataset '{name}' is a gated dataset on the Hub.")

    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_config_names", gated)
    with pytest.raises(UserError, match=r"forgelab/BLUR: could not .* gated .* log in .*, or give --probes-dir"):
        probes.read(RunConfig(probes=["blur"]))


def test_it_is_told_before_anything_is_loaded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "probes" / "rwku" / "forget_level2.json").write_text(json.dumps([{"subject": "Ada", "query": "Who?"}]))
    probes._read.cache_clear()
    asks = ["--probes", "[rwku]", "--probes-dir", "probes", "--model", "nowhere", "--out", "out"]
    assert cli.main(["unlearn", "--task", Facts.name, *asks]) == 2
    assert "the row's 'answer' is missing" in capsys.readouterr().err
    assert cli.main(["unlearn", "--task", Facts.name, *asks, "--probe-limit", "0"]) == 2
    assert "probe_limit must be at least 1, but is 0" in capsys.readouterr().err
