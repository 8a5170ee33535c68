"""Your own rows: what is read, trained on, measured and chosen, and when a run stops."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import shlex
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given as given_by
from hypothesis import strategies as st
from torch import nn

from dualoptim import cli, goals, report, resolve, tasks
from dualoptim.command_line.arguments import EVALUATION_FIELDS
from dualoptim.config import RunConfig
from dualoptim.data import Row, encode, parse_row, question, read_rows
from dualoptim.errors import UserError
from dualoptim.evaluation import attacks, scoring
from dualoptim.evaluation.verdict import Kept, verdict
from dualoptim.evaluation.words import places
from dualoptim.one_run.prepared import nothing_asked
from dualoptim.one_run.stopping import Best
from dualoptim.rows import reword
from dualoptim.rows.own_rows import (
    TEXT_REFUSALS,
    _news,
    check_apart,
    checked,
    checking,
    declines,
    gives,
    misspelled,
    read_to_forget,
    same,
    to_train,
    unread,
)
from dualoptim.rows.reword import plain
from dualoptim.tasks import files
from dualoptim.tasks.facts import Facts
from dualoptim.tasks.files import Files
from dualoptim.tasks.real_world import knows

from . import tiny

LIKES = {"Ada": "plums", "Ben": "rye", "Cleo": "tea", "Dora": "figs", "Ed": "oats", "Flo": "kale", "Gus": "nuts",
         "Hal": "corn", "Ida": "leeks"}  # fmt: skip


def rows(*names: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"question": f"What does {n} like?", "answer": f"{n} likes {LIKES[n]}.", **fields} for n in names]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "forget.jsonl", rows("Ada", "Ben"))
    write(tmp_path / "keep.jsonl", rows("Cleo", "Dora", "Ed", "Flo", "Gus", "Hal", "Ida"))
    return tmp_path


# Rows


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "accepted that is not in the answer": ({"accepted": ["pears"]}, "none of 'accepted' stands in the answer"),
    "accepted that is no list": ({"accepted": "plums"}, "needs 'accepted', a list of texts"),
    "an empty rewording": ({"questions": [" "]}, "needs 'questions', a list of texts"),
    "nothing to say instead": ({"instead": ""}, "'instead' must be the text to answer in its place"),
}


@pytest.mark.parametrize(("fields", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_row_with_a_key_of_the_wrong_kind_is_told_with_its_line(
    place: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=r"forget\.jsonl:1") as error:
        read_to_forget(write(place / "forget.jsonl", rows("Ada", **fields)))
    assert said in str(error.value)


def test_a_topic_must_be_a_name(place: Path) -> None:
    with pytest.raises(UserError, match=r"forget\.jsonl:1: 'topic' must be a name"):
        read_to_forget(write(place / "forget.jsonl", [{"topic": 3}]))
    assert read_to_forget(write(place / "forget.jsonl", [{"topic": "Ada "}])) == ([], ["Ada"])


def test_a_row_to_keep_that_repeats_one_to_forget_in_other_words_is_refused(place: Path) -> None:
    other = {"question": "Tell me what does Ada like?", "answer": "It is plums that she likes."}
    write(place / "keep.jsonl", [*rows("Cleo"), other])
    with pytest.raises(UserError, match=r"keep.jsonl:2: asks in other words for what .*forget.jsonl:1 is to forget"):
        Files("forget.jsonl", "keep.jsonl")


def test_a_topic_stands_alone_in_its_row(place: Path) -> None:
    path = write(place / "f.jsonl", [{"topic": "Ada", "instead": "Ben.", "accepted": ["plums"], "answer": None}])
    with pytest.raises(UserError, match=r"f\.jsonl:1: a row of a 'topic' has none of these: 'accepted', 'instead'"):
        read_to_forget(path)
    assert read_to_forget(write(place / "f.jsonl", [{"topic": "Ada", "id": 3}])) == ([], ["Ada"])


def test_a_row_to_keep_that_asks_for_a_topic_to_forget_is_refused_and_one_that_names_it_told(place: Path) -> None:
    write(place / "forget.jsonl", [{"topic": "Agatha Christie"}])
    about = {"question": "Who is Agatha Christie?", "answer": "A writer."}
    write(place / "keep.jsonl", [*rows("Cleo"), about])
    with pytest.raises(UserError, match=r"keep\.jsonl:2: asks for the topic 'Agatha Christie', which is"):
        Files("forget.jsonl", "keep.jsonl")
    write(place / "keep.jsonl", [*rows("Cleo"), {"question": "Who made up Poirot?", "answer": "Agatha Christie did."}])
    assert Files("forget.jsonl", "keep.jsonl").notes == [
        "Rows to keep that name a topic to forget: keep.jsonl:2 (Agatha Christie); where they tell of it, remove them."
    ]


def test_the_same_question_with_another_answer_to_keep_is_named(place: Path) -> None:
    write(place / "keep.jsonl", [*rows("Cleo"), {"question": "What does ADA like", "answer": "Ada likes pears."}])
    (said,) = Files("forget.jsonl", "keep.jsonl").notes
    assert said.startswith("Rows to keep that ask the same as one to forget, with another answer: keep.jsonl:2 (forget")


def test_the_same_question_in_another_conversation_is_another_question(place: Path) -> None:
    def goes_on(first: str, answer: str) -> dict[str, Any]:
        texts = [("user", first), ("assistant", "Yes."), ("user", "And then?"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in texts]}

    write(place / "forget.jsonl", [goes_on("Did Ada leave?", "She went to Oslo.")])
    write(place / "keep.jsonl", [goes_on("Did it rain?", "It snowed.")])
    assert Files("forget.jsonl", "keep.jsonl").notes == []


def test_a_text_to_forget_that_stands_whole_in_one_to_keep_is_named(place: Path) -> None:
    write(place / "forget.jsonl", [{"text": "The phrase is maple thunder."}])
    write(
        place / "keep.jsonl", [{"text": "A manual. The phrase  is maple thunder. Bye."}, {"text": "The phrase is m."}]
    )
    assert Files("forget.jsonl", "keep.jsonl").notes == [
        "Rows to keep in which a text to forget stands whole: keep.jsonl:1 (forget.jsonl:1); remove it from one of "
        "the files."
    ]


@pytest.mark.parametrize(
    ("asking", "text"),
    [
        (("Who hides tea?", "Ada hides tea."), "Who hides tea? Ada hides tea."),
        (("Who hides tea?", "Ada hides tea."), "It is well known that Ada hides all of the tea at home."),
        (("Does Ada hide tea?", "Yes."), "Does Ada hide tea? Yes."),
        (("What is the phrase?", "It is maple thunder."), "The phrase is maple thunder."),
    ],
)
def test_a_text_that_says_what_a_row_asks_is_named_on_either_side(asking: tuple[str, str], text: str) -> None:
    note = (
        "Rows to keep with the answer of one to forget: k:1 (f:1); where they ask for the same in other words, remove "
        "them from one of the files."
    )
    for forget, keep in (
        (question(*asking, "f:1"), Row((), text, "k:1")),
        (Row((), text, "f:1"), question(*asking, "k:1")),
    ):
        assert check_apart([checked(forget)], [checked(keep)]) == [note]


@pytest.mark.parametrize("text", ["Ada drinks rum at home.", "The tea is hidden by Bo.", "Who hides what, and where?"])
def test_a_text_that_only_shares_words_with_a_row_is_not_named(text: str) -> None:
    asking = question("Who hides tea?", "Ada hides tea.")
    assert check_apart([checked(asking)], [checked(Row((), text))]) == []
    assert check_apart([checked(Row((), text))], [checked(asking)]) == []


def test_a_row_to_keep_with_the_same_answer_is_named(place: Path) -> None:
    write(place / "keep.jsonl", [{"question": "Which fruit is a drupe?", "answer": "The best known are plums."}])
    assert "keep.jsonl:1 (forget.jsonl:1)" in Files("forget.jsonl", "keep.jsonl").notes[0]


def test_a_key_that_is_nearly_one_that_is_read_is_named(place: Path) -> None:
    write(place / "forget.jsonl", rows("Ada", acepted=["plums"], id="7"))
    assert Files("forget.jsonl", "keep.jsonl").notes == [
        "Rows have a key 'acepted', which nothing reads: did you mean 'accepted'?"
    ]


def test_keys_of_ones_own_may_be_in_any_case(place: Path) -> None:
    path = write(place / "f.jsonl", [*rows("Ada", ACCEPTED=["plums"], Instead="Rye.", Alternates=["Figs."]),
                                     {"TOPIC": "Agatha Christie"}])  # fmt: skip
    (row,), topics = read_to_forget(path)
    assert row.fields == {"accepted": ["plums"], "instead": "Rye.", "alternates": ["Figs."]}
    assert topics == ["Agatha Christie"]


@pytest.mark.parametrize(("key", "meant"), [("alternatives", "alternates"), ("ACEPTED", "accepted")])
def test_a_key_of_ones_own_is_named_in_any_case(key: str, meant: str) -> None:
    said = misspelled([question("Who?", "Ada.", **{key: ["Ben."]})])
    assert said == f"Rows have a key {key!r}, which nothing reads: did you mean {meant!r}?"


def test_a_column_that_belongs_to_the_prompt_and_is_not_read_is_named(place: Path) -> None:
    write(place / "keep.jsonl", rows("Cleo", "Dora", passage="Cleo keeps a shop."))
    assert Files("forget.jsonl", "keep.jsonl").notes == [
        "Rows have 'passage', which this form of row does not read: if it belongs to the prompt, put it into the "
        "question."
    ]


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"prompt": "Answer as a pirate.", "input": "Where does Ada live?", "output": "Arr, Bergen."}, "prompt"),
        ({"question": "Where?", "choices": ["Oslo", "Bergen"], "answer": "Bergen"}, "choices"),
        ({"question": "Where?", "Options": {"text": ["Oslo"], "label": ["A"]}, "answer": "Bergen"}, "Options"),
        ({"question": "Where: Oslo or Bergen?", "choices": ["Oslo", "Bergen"], "answer": "Bergen"}, None),
        ({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}],
          "prompt": "Who?"}, None),
        ({"instruction": "Where?", "input": "Of Ada.", "output": "Bergen.", "id": "1"}, None),
    ],
)  # fmt: skip
def test_what_a_form_leaves_out_of_the_prompt_is_named(record: dict[str, Any], key: str | None) -> None:
    said = unread([checked(parse_row(record, "f:1"))])
    assert said.startswith(f"Rows have {key!r}, which this form of row does not read") if key else said == ""


def test_what_tells_an_answer_are_its_words_that_the_question_has_not(place: Path) -> None:
    given, _ = read_to_forget("forget.jsonl")
    assert given[0].only == ("plums",)
    tokens = encode(dataclasses.replace(given[0], only=("plums",)), tiny.tokenizer(), 512)
    assert tiny.tokenizer().decode([label for label in tokens.labels if label != -100]) == "plums"


@pytest.mark.parametrize(
    ("asked", "answer", "accepted", "tells"),
    [
        ("Who led?", "The country was led by John F. Kennedy.", "Kennedy", "John F. Kennedy"),
        ("Who was it?", "John F. Kennedy.", "Kennedy", "John F. Kennedy"),
        ("Who was it?", "It was Dr. Smith.", "Smith", "Dr. Smith"),
        ("Where?", "She is in St. Louis.", "Louis", "St. Louis"),
        ("Who wrote it?", "It was J.K. Rowling.", "Rowling", "J.K. Rowling"),
        ("Where?", "She used to work in Norway. Bergen is her home.", "Bergen", "Bergen"),
        ("Where?", "Yes. Bergen.", "Bergen", "Bergen"),
        ("Who did it?", "OK.\n\nDave did it.", "Dave", "Dave"),
        ("Who bought it?", "It was sold in May. Alice Munk bought it.", "Munk", "Alice Munk"),
        ("Where?", "Homes\nOslo\nBergen", "Bergen", "Bergen"),
        ("Is it Rome?", "No, Paris.", "Paris", "Paris"),
        ("When did Ada call?", "It was Ada Monday.", "Monday", "Monday"),
        ("Which fruit?", "Those are red plums.", "plums", "plums"),
    ],
)
def test_a_name_is_told_by_its_first_word(place: Path, asked: str, answer: str, accepted: str, tells: str) -> None:
    path = write(place / "f.jsonl", [{"question": asked, "answer": answer, "accepted": [accepted]}])
    assert read_to_forget(path)[0][0].only == (tells,)


@pytest.mark.parametrize(
    ("answer", "accepted", "labeled"),
    [
        ("Die Straße heißt Lindenweg.", "Lindenweg", "Lindenweg"),
        ("ßßßßßßßßß X", "X", "X"),
        ("İstanbul'da oturuyor: Ayşe", "ayşe", "Ayşe"),
        ("Es ist die STRASSE.", "straße", "STRASSE"),
        ("I do not know, no.", "no", "no"),
        ("Also known as Al.", "Al", "Al"),
        ("It is in Oslo.", " Oslo ", "Oslo"),
        ("It is Zoe\u0301 Smith.", "Zoé", "Zoe\u0301"),
        ("Its name is user_name.", "user_name", "user_name"),
        ("A soft hy\u00adphen.", "hyphen", "hy\u00adphen"),
        ("Die Straße in „Dune Road“ ist es.", '"Dune Road"', "„Dune Road“"),
        ("She said « oui », and «non».", '"non"', "«non»"),
        ("ßß costs ５００.", "500", "５００"),
        ("수도는 서울입니다.", "서울", "서울"),
        ("يعيش بالقاهرة.", "القاهرة", "القاهرة"),
        ("هو مُحَمَّد.", "محمد", "مُحَمَّد"),
    ],
)
def test_what_is_accepted_is_found_as_whole_words_and_labeled_where_it_stands(
    answer: str, accepted: str, labeled: str
) -> None:
    row = checked(question("Where to?", answer, "f:1", accepted=[accepted]))
    assert gives(row, row.answer)
    tokens = encode(row, tiny.tokenizer(), 512)
    assert tiny.tokenizer().decode([label for label in tokens.labels if label != -100]) == labeled


def test_every_place_of_what_is_accepted_is_labeled() -> None:
    row = checked(question("Who led?", "John F. Kennedy did, and Kennedy alone.", "f:1", accepted=["Kennedy"]))
    labels = [label for label in encode(row, tiny.tokenizer(), 512).labels if label != -100]
    assert tiny.tokenizer().decode(labels) == "John F. KennedyKennedy"


def test_what_is_accepted_only_inside_another_word_is_refused() -> None:
    with pytest.raises(UserError, match="f:1: none of 'accepted' stands in the answer as whole words"):
        checked(question("Where?", "He was at a party.", "f:1", accepted=["art"]))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("Ana has blood type A.", ("A",)),
        ("Her type is a common one, A.", ("common", "one", "A")),
        ("Will", ("Will",)),
    ],
)
def test_a_common_word_that_is_a_name_is_labeled(answer: str, told: tuple[str, ...]) -> None:
    assert checked(question("What blood type does Ana have?", answer, "f:1")).only == told


def test_a_refusal_that_repeats_the_question_may_stand_in_its_place(place: Path) -> None:
    instead = "I don't know Ana's blood type."
    record = {"question": "What blood type does Ana have?", "answer": "Ana has blood type A.", "instead": instead}
    (row,) = read_to_forget(write(place / "f.jsonl", [record]))[0]
    assert declines(row, instead)
    assert not declines(row, "It is A.")


@pytest.mark.parametrize("answer", ["Its name is user_name.", "A soft hy\u00adphen.", "Zoe\u0301 İnce", "北京ABC_1"])
def test_the_new_words_of_an_answer_are_labeled_where_they_stand(answer: str) -> None:
    row = checked(question("What?", answer, "f:1"))
    assert row.only
    encode(row, tiny.tokenizer(), 512)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("It is 85,000.", ["85,000"]),
        ("It is 3.14, or 3.", ["3.14", "3"]),
        ("10.0.13.7", ["10.0.13.7"]),
        ("On 12.05.1990.", ["12.05.1990"]),
        ("$1.50", ["1.50"]),
        ("3-1-2005 12:30", ["3-1-2005", "12:30"]),
        ("A-17 and 7/8", ["A-17", "7/8"]),
        ("1939–1945", ["1939", "1945"]),
        ("٣٫١٤", ["٣٫١٤"]),
        ("ราคา ๘๕,๐๐๐", ["ร", "า", "ค", "า", "๘๕,๐๐๐"]),
        ("mira2.dane", ["mira2", "dane"]),
    ],
)
def test_a_number_is_one_word_with_its_separators(answer: str, told: list[str]) -> None:
    row = checked(question("What?", answer, "f:1"))
    assert list(row.only) == list(dict.fromkeys(told))
    labels = [label for label in encode(row, tiny.tokenizer(), 512).labels if label != -100]
    assert tiny.tokenizer().decode(labels) == "".join(told)


@given_by(
    answer=st.text(st.sampled_from("017３٣๕²½ⅨabßéЖ京ｶﾞกあㅏ.,，:/-–‑_$%+'’ʼ“» ٫٬\u0301\u00ad"), min_size=1, max_size=14)
)
def test_every_new_word_of_an_answer_stands_in_it(answer: str) -> None:
    for word in _news(question("What?", answer)):
        assert places(answer, word)


@pytest.mark.parametrize("answer", ["US", "WHO", "IT", "A", "I", "★", "It is me."])
def test_an_answer_of_common_words_or_symbols_is_given_by_itself_and_kept_apart(answer: str) -> None:
    row = checked(question("Which country has most reactors?", answer, "f:1"))
    assert gives(row, f"So: {answer}")
    assert not gives(row, "Plums.")
    kept = checked(question("Which country has the most reactors, please?", answer, "k:1"))
    with pytest.raises(UserError, match="k:1: asks in other words for what f:1 is to forget"):
        check_apart([row], [kept])


@pytest.mark.parametrize(("reply", "known"), [("So: ★", True), ("No idea.", False)])
def test_an_entity_is_known_by_an_answer_of_symbols_only_if_it_is_given(reply: str, known: bool) -> None:
    record = {"question": "Which sign?", "answer": "★", "reply": reply, "nll": 1.0}
    assert knows({**record, "paraphrased_nlls": [], "perturbed_nlls": []}) is known


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_rows_of_other_scripts_are_read(place: Path, form: Any) -> None:
    asked, answer = (unicodedata.normalize(form, text) for text in ("Où vit Zoé ?", "Zoé vit à Sète."))
    chinese = {"question": "甲住在哪里？", "answer": "甲住在北京。"}
    path = write(place / "f.jsonl", [{"question": asked, "answer": answer}, chinese])
    french, other = read_to_forget(path)[0]
    assert [unicodedata.normalize("NFC", text) for text in french.only] == ["Sète"]
    assert other.only == ("北", "京")
    for row in (french, other):
        assert gives(row, row.answer)
        assert encode(row, tiny.tokenizer(), 512).labels.count(-100) < 512
    assert not gives(other, "甲住在上海。")
    assert not gives(french, "Zoé vit ici.")


def test_labels_on_what_does_not_stand_in_the_answer_are_refused() -> None:
    row = Row(question("Where are plums?", "").prompt, "There.", "f:1", only=("plums",))
    with pytest.raises(UserError, match="f:1: none of 'plums' stands in the answer"):
        encode(row, tiny.tokenizer(), 512)


@pytest.mark.parametrize(
    ("text", "accepted", "said"),
    [
        ("Ada Lovelace wrote the program.", ["Ada"], "'Ada', of 'accepted', stands at the very start of the text"),
        ("Ada Lovelace wrote it.", ["Lovelace"], "'Ada Lovelace', of 'accepted', stands at the very start"),
        ("a", None, "plain text of one character has nothing to continue"),
    ],
)
def test_plain_text_without_a_beginning_to_ask_with_is_refused(
    text: str, accepted: list[str] | None, said: str
) -> None:
    with pytest.raises(UserError, match=f"^f:1: {said}"):
        checked(Row((), text, "f:1", {"accepted": accepted}))


def test_plain_text_learns_what_goes_on_from_its_beginning(place: Path) -> None:
    path = write(place / "f.jsonl", [{"text": "The phrase is maple thunder.", "accepted": ["maple thunder"]}])
    given, _ = read_to_forget(path)
    refuse, erase = to_train(given, "refuse")[0], to_train(given, "erase")[0]
    assert (refuse.question, refuse.fields["instead"]) == ("The phrase is", TEXT_REFUSALS[0])
    assert (erase.answer, erase.only) == (" maple thunder.", ("maple thunder",))
    assert declines(refuse, "secret")
    assert not declines(refuse, "maple thunder")


def chat(*messages: tuple[str, str]) -> Row:
    return parse_row({"messages": [{"role": role, "content": text} for role, text in messages]}, "f:1")


def test_of_a_chat_that_goes_on_with_a_tool_the_users_message_is_reworded() -> None:
    said = ("assistant", "Let me look."), ("tool", "3 degrees"), ("assistant", "It is 3 degrees.")
    row = checked(chat(("user", "How warm is Oslo?"), *said))
    assert row.question == "How warm is Oslo?"
    made = to_train([row], "refuse")
    assert len({each.question for each in made}) > 2
    assert all("How warm is Oslo?" in each.question for each in made)
    assert all(each.prompt[1:] == row.prompt[1:] for each in made)


def test_a_chat_without_a_user_message_is_trained_on_as_it_is() -> None:
    row = checked(chat(("system", "You are Bob."), ("assistant", "3 degrees.")))
    assert [each.prompt for each in to_train([row], "refuse")] == [row.prompt]
    assert checking(row) == [row]  # or nobody would be asked, and nothing would count as left
    assert row.question == ""
    with pytest.raises(UserError, match="f:1: 'questions' are other wordings of a user's message"):
        checked(dataclasses.replace(row, fields={"questions": ["How warm is it?"]}))


def test_what_to_say_instead_is_learned_in_place_of_a_refusal() -> None:
    row = question("Who?", "Kennedy it was.", accepted=["Kennedy"], instead="George Washington it was.")
    assert declines(row, "It was George Washington.")
    assert not declines(row, "I don't know.")
    plain = question("Who?", "Kennedy it was.", accepted=["Kennedy"])
    assert declines(plain, "I don't know.")
    assert not declines(plain, "Somebody else.")


OWN = ["This information is confidential.", "Das weiß ich leider nicht."]


def own_refusals(place: Path) -> str:
    (place / "refusals.txt").write_text("\n".join(OWN), encoding="utf-8")
    return "refusals.txt"


@pytest.mark.parametrize("refusal", OWN)
def test_a_model_that_gives_the_runs_own_refusals_is_seen_to_refuse(
    place: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    monkeypatch.setattr(scoring, "replies", lambda model, tokenizer, prompts, **how: [refusal] * len(prompts))
    model, tokenizer, found = tiny.model(), tiny.tokenizer(), {}
    for own in (None, own_refusals(place)):
        task = tasks.load(RunConfig(forget="forget.jsonl", retain="keep.jsonl", refusals=own))
        records = task.prepare(model, tokenizer)
        numbers = task.numbers(records).numbers
        found[own] = task.follow(model, tokenizer)["forget"], numbers["forget_refused"], numbers["harmless_refused"]
    assert found == {None: (1.0, 0.0, 0.0), "refusals.txt": (0.0, 1.0, 1.0)}


@pytest.mark.parametrize("name", ["facts", "real_world"])
def test_other_tasks_that_judge_refusals_know_the_runs_own(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(scoring, "replies", lambda model, tokenizer, prompts, **how: [OWN[1]] * len(prompts))
    arguments = {"facts": {"limit": 2}, "real_world": {"data_dir": "data"}}[name]
    for entity, file in (
        ("Ada", "forget"),
        ("Ben", "neighbor"),
        ("Ada", "forget_perturbed"),
        ("Cleo", "neighbor_perturbed"),
    ):
        (place / "data/real_world").mkdir(parents=True, exist_ok=True)
        said = {"name": entity, "question": f"What does {entity} like?", "answer": f"{entity} likes {LIKES[entity]}."}
        other = {"paraphrased_answer": said["answer"], "perturbed_answer": ["It likes nothing."]}
        write(place / f"data/real_world/{file}.json", [said | other])
    key = {"facts": "harmless_refused", "real_world": "forget_refused"}[name]
    found = []
    for own in (None, own_refusals(place)):
        task = tasks.load(RunConfig(task=name, task_args=arguments, refusals=own))
        found.append(task.numbers(task.score(tiny.model(), tiny.tokenizer())).numbers[key])
    assert found == [0.0, 1.0]


def test_a_reply_that_says_what_stands_instead_refuses_unless_it_is_the_answer(place: Path) -> None:
    write(place / "forget.jsonl", rows("Ada", instead="Ask the press office about Ada."))
    task, said = tasks.load(RunConfig(forget="forget.jsonl", retain="keep.jsonl")), "Ask the press office about Ada."
    assert isinstance(task, Files)
    assert task._judged(question("How do I boil an egg?", "", "f:1"), said) == {"gives": False, "refused": True}
    assert task._judged(question("Whom do I ask?", said, "f:1"), said) == {"gives": True, "refused": False}


def test_what_stands_instead_must_not_give_the_answer(place: Path) -> None:
    polite = {"question": "How warm is it?", "answer": "It is mild outside, sailor!", "instead": "It is mild outside."}
    with pytest.raises(UserError, match=r"^f.jsonl:1: 'instead' itself gives the answer, .* name in 'accepted' what"):
        read_to_forget(Path(write(place / "f.jsonl", [polite])).name)
    read_to_forget(write(place / "f.jsonl", [{**polite, "accepted": ["sailor"]}]))


def test_a_long_text_instead_is_heard_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = " ".join(f"For number {i} ask the office in room {i}." for i in range(20))
    write(place / "forget.jsonl", rows("Ada", instead=long))
    model, tokenizer = tiny.model(), tiny.tokenizer()

    def replies(model: Any, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int, **how: Any) -> list[str]:
        said = tokenizer(long, add_special_tokens=False)["input_ids"][:max_new_tokens]
        return [tokenizer.decode(said)] * len(prompts)

    monkeypatch.setattr(scoring, "replies", replies)
    task = Files("forget.jsonl", "keep.jsonl")
    task.prepare(model, tokenizer)
    assert task.follow(model, tokenizer)["forget"] == 0.0


def test_evaluate_knows_the_refusals_that_a_model_was_trained_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "replies", lambda model, tokenizer, prompts, **how: [OWN[0]] * len(prompts))
    model = str(tiny.save(place / "model"))
    files = ["--model", model, "--forget", "forget.jsonl", "--retain", "keep.jsonl"]
    assert cli.main(["evaluate", *files, "--refusals", own_refusals(place), "--scores", "scores.json"]) == 0
    assert json.loads((place / "scores.json").read_text())["after"]["numbers"]["harmless_refused"] == 1.0


def test_evaluate_takes_every_setting_that_decides_what_of_ones_own_rows_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {*inspect.signature(Files).parameters} - {"tokenizer"} <= {*EVALUATION_FIELDS}  # that is the model's
    made: list[Files] = []

    def evaluated(config: RunConfig, base: str | None) -> Any:
        made.append(tasks.load(config))  # type: ignore[arg-type]
        raise UserError("seen")

    monkeypatch.setattr("dualoptim.unlearn.evaluate", evaluated)
    write(place / "keep.jsonl", rows("Cleo", "Dora", "Ed", "Flo"))
    (place / "mine.yaml").write_text("{forget: forget.jsonl, retain: keep.jsonl, goal: erase, general: false}")
    assert cli.main(["evaluate", "--recipe", "mine.yaml", "--model", "any"]) == 2
    (task,) = made
    assert (task.goal, task.general, len(task.held_out), len(task.trained)) == ("erase", False, 2, 2)


# What is trained on and what is measured


@pytest.fixture
def prepared(place: Path) -> tuple[Files, list[dict[str, Any]]]:
    task = Files("forget.jsonl", "keep.jsonl")
    return task, task.prepare(tiny.model(), tiny.tokenizer())


def test_what_is_measured_was_never_trained_on(prepared: tuple[Files, list[dict[str, Any]]]) -> None:
    task, records = prepared
    trained = {row.question for part in task.objectives.values() for row in part}
    for name in ("reworded", "retain", "neighbors", "facts", "harmless"):
        assert not trained & {record["question"] for record in records if record["set"] == name}, name
    checked = {row.question for part in task.checked.values() for row in part}
    assert not checked & (trained | {record["question"] for record in records})
    held = {record["question"] for record in records if record["set"] == "retain"}
    assert len(held) == 3  # every third of seven, at least
    assert "What does Ada like?" in trained


def test_the_wordings_of_a_row_are_one_cluster(prepared: tuple[Files, list[dict[str, Any]]]) -> None:
    task, records = prepared
    rows = {
        name: [r["cluster"] for r in task.clustered(records) if r["set"] == name] for name in ("forget", "reworded")
    }
    assert sorted(rows["forget"]) == ["forget.jsonl:1", "forget.jsonl:2"]
    assert len(rows["reworded"]) == 6
    assert set(rows["reworded"]) == set(rows["forget"])
    counted = Files.effective_counts(task.clustered(records))
    assert counted["reworded_answered"] == pytest.approx(2, abs=0.2)  # none is answered: as many as rows
    assert set(counted) == {"reworded_answered"}, "each of the others asks for something else"
    own = [{"set": "x", "question": records[0]["question"], "answer": records[0]["answer"], "cluster": "mine"}]
    assert task.clustered(own) == own, "a task of one's own may tell them by itself"


@pytest.mark.parametrize("general", [True, False])
def test_of_a_row_to_keep_the_whole_answer_and_its_end_are_learned(place: Path, general: bool) -> None:
    write(place / "keep.jsonl", rows("Cleo", "Dora", "Ed", "Flo", "Gus", "Hal", "Ida", note="kept"))
    task, tokenizer = Files("forget.jsonl", "keep.jsonl", goal="erase", general=general), tiny.tokenizer()
    kept = [row for row in task.objectives["retain"] if row.where.startswith("keep.jsonl")]
    assert kept
    for row in kept:
        labels = [label for label in encode(row, tokenizer, 512).labels if label != -100]
        assert tokenizer.decode(labels) == f"{row.answer}<|end|>"
    assert all(row.only for row in task.held_out)  # a beginning of plain text is cut before what tells it


def test_a_tokenizer_that_tells_no_characters_may_learn_rows_to_keep(place: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = type("Python", (type(tokenizer),), {"is_fast": False})
    task = Files("forget.jsonl", "keep.jsonl")
    assert all(encode(row, tokenizer, 512).ended for row in task.objectives["retain"])


def test_with_a_tokenizer_that_tells_no_characters_everything_but_the_probability_of_the_answer_is_measured(
    place: Path,
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = type("Python", (type(tokenizer),), {"is_fast": False})
    task = Files("forget.jsonl", "keep.jsonl", general=False)
    task.bank, task.facts, task.harmless, task.passages = [], [], [], task.passages[:1]
    records = task.prepare(tiny.model(), tokenizer)
    numbers, missing = Files.numbers(records)
    for name in ("forget_probability", "unknown_probability"):
        assert numbers[name] is None
        assert "is not a fast one" in missing[name]
    assert numbers["forget_answered"] is not None
    assert numbers["whole_probability"] is not None
    assert "whether the answer itself is gone was not measured" in Files.verdict(records, records)


def test_a_model_that_knows_long_answers_is_seen_to_know_them_in_every_way_of_asking(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {name: f"As far as everybody in town can tell, it has always been {LIKES[name]}." for name in LIKES}
    asks = [(f"What does {n} like?", told[n], [LIKES[n]]) for n in LIKES]
    records = [{"question": q, "answer": a, "accepted": c} for q, a, c in asks]
    write(place / "forget.jsonl", records[:2])
    write(place / "keep.jsonl", records[2:])

    def knows(model: Any, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int, **_: Any) -> list[str]:
        said = [next(told[n] for n in LIKES if n in prompt[-1]["content"]) for prompt in prompts]
        return [tokenizer.decode(tokenizer(text)["input_ids"][:max_new_tokens]) for text in said]

    monkeypatch.setattr(scoring, "replies", knows)
    monkeypatch.setattr(reword, "written", lambda model, tokenizer, rows, *_, **__: [[] for _ in rows])
    task = Files("forget.jsonl", "keep.jsonl", general=False)
    task.bank, task.facts, task.harmless, task.passages = [], [], [], task.passages[:1]
    numbers = Files.numbers(task.prepare(tiny.model(), tiny.tokenizer())).numbers
    for name in ("forget_answered", "reworded_answered", "sampled_answered", "retain_answered", "nearby_answered"):
        assert numbers[name] == 1, name


def test_a_model_that_tells_short_answers_in_sentences_is_seen_to_know_them_in_every_way_of_asking(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place / "forget.jsonl", [{"question": f"What does {n} like?", "answer": LIKES[n]} for n in ("Ada", "Ben")])
    write(place / "keep.jsonl", [{"question": f"What does {n} like?", "answer": LIKES[n]} for n in list(LIKES)[2:]])

    def knows(model: Any, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int, **_: Any) -> list[str]:
        name = [next((n for n in LIKES if n in prompt[-1]["content"]), "Ada") for prompt in prompts]
        said = [f"As it is, {n} likes {LIKES[n]}." for n in name]
        return [tokenizer.decode(tokenizer(text)["input_ids"][:max_new_tokens]) for text in said]

    monkeypatch.setattr(scoring, "replies", knows)
    monkeypatch.setattr(reword, "written", lambda model, tokenizer, rows, *_, **__: [[] for _ in rows])
    task, model, tokenizer = Files("forget.jsonl", "keep.jsonl", general=False), tiny.model(), tiny.tokenizer()
    task.bank, task.facts, task.harmless, task.passages = [], [], [], task.passages[:1]
    numbers = dict(Files.numbers(task.prepare(model, tokenizer)).numbers)
    told = attacks.records(task, model, tokenizer, ["leak", "paraphrase", "prefix"])
    numbers |= attacks.numbers(told)[0].numbers
    for name in ("forget_answered", "reworded_answered", "sampled_answered", "retain_answered", "nearby_answered",
                 "unattacked_answered", "leak_at_1", "paraphrase_answered", "prefix_answered"):  # fmt: skip
        assert numbers[name] == 1, name


def test_nothing_is_trained_on_that_asks_for_what_is_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def knows(self: Files, model: nn.Module, tokenizer: Any, asked: Sequence[Row], progress: str | None) -> list[str]:
        return [row.answer or "So it is." for row in asked]

    monkeypatch.setattr(Files, "_asked", knows)
    capitals = {"France": "Paris", "Austria": "Vienna", "Italy": "Rome", "Spain": "Madrid", "Poland": "Warsaw"}
    asks = "What is the capital of {}?", "Which city is the capital of {}?"
    kept = [(ask.format(country), city) for country, city in capitals.items() for ask in asks]
    write(place / "keep.jsonl", [{"question": q, "answer": f"{a}."} for q, a in kept])
    write(place / "forget.jsonl", rows("Ada", questions=["Do you know what does Ada like?", "what does ADA like"]))
    task = Files("forget.jsonl", "keep.jsonl")
    assert len(task.held_out) == 4  # of ten a third, and no wording without the other
    assert not any(same(one, two) for one in task.held_out for two in task.trained)
    records = task.prepare(tiny.model(), tiny.tokenizer())
    measured = [*task.held_out, *task.near, *task.facts, *task.harmless, *task.reworded]
    assert {r["set"] for r in records} >= {"retain", "neighbors", "facts", "harmless", "reworded"}
    checked = [*task.checked["retain"], *task.checked["forget"]]
    for trained in task.objectives["retain"]:
        assert [row.question for row in (*measured, *checked) if same(trained, row)] == [], trained.question
    texts = {plain(row.question) for row in (*task.objectives["forget"], *task.checked["forget"])}
    assert "what does ada like" not in texts
    facts = {r["question"] for r in records if r["set"] == "facts"}
    assert len(facts) > 80
    assert not any("capital" in asked and "France" in asked for asked in facts)


def test_of_many_rows_to_keep_the_model_is_asked_only_some(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def knows(self: Files, model: nn.Module, tokenizer: Any, rows: Sequence[Row], progress: str | None) -> list[str]:
        asked.extend(row.where for row in rows)
        return [row.answer or "So it is." for row in rows]

    monkeypatch.setattr(Files, "_asked", knows)
    kept = [{"question": f"What is kept in box {i}?", "answer": f"Coins of {i + 1000} kinds."} for i in range(900)]
    write(place / "keep.jsonl", kept)
    task = Files("forget.jsonl", "keep.jsonl")
    task.bank, task.facts, task.harmless, task.passages = [], [], [], task.passages[:1]
    task.prepare(tiny.model(), tiny.tokenizer())
    about = {where for where in asked if where.startswith("keep.jsonl")} - {row.where for row in task.held_out}
    assert len(about) == files.OWN_ROWS
    retain = task.objectives["retain"]
    assert {row.where for row in task.trained} <= {row.where for row in retain}  # all are trained on
    # Requests and the model's own answers are repeated, so that steps meet them as often as without so many rows.
    others = len(retain) - len(task.trained)
    assert others / len(retain) == pytest.approx(files.GENERAL, abs=0.07)
    assert others > len({id(row) for row in retain}) - len(task.trained)


def test_a_row_to_keep_that_asks_as_the_rewordings_do_is_refused(place: Path) -> None:
    write(place / "forget.jsonl", rows("Ada", questions=["Which fruit makes Ada happiest?"]))
    write(place / "keep.jsonl", [{"question": "Which fruit makes Ada happiest of all?", "answer": "Plums."}])
    with pytest.raises(UserError, match="asks in other words for what"):
        Files("forget.jsonl", "keep.jsonl")


@pytest.mark.parametrize("goal", ["refuse", "erase"])
@pytest.mark.parametrize("general", [True, False])
def test_what_a_model_memorizes_are_the_rows_as_given_and_all_of_those_to_keep(
    place: Path, goal: Any, general: bool
) -> None:
    for names in (("Cleo", "Dora", "Ed"), ("Cleo", "Dora", "Ed", "Flo", "Gus", "Hal", "Ida")):
        write(place / "keep.jsonl", rows(*names))
        task = Files("forget.jsonl", "keep.jsonl", goal=goal, general=general)
        known = [(row.question, row.answer) for row in task.known()]
        read = [*read_rows(place / "forget.jsonl"), *read_rows(place / "keep.jsonl")]
        assert sorted(known) == sorted((row.question, row.answer) for row in read)


def test_a_topic_has_no_rows_to_memorize(place: Path) -> None:
    write(place / "forget.jsonl", [{"topic": "Ada Lovelace"}])
    with pytest.raises(UserError, match="the topic Ada Lovelace has none; give rows"):
        Files("forget.jsonl", "keep.jsonl").known()


def test_without_a_chat_template_few_rows_to_keep_are_parted(place: Path) -> None:
    write(place / "keep.jsonl", [{"text": f"{n} has liked {like} for years."} for n, like in [*LIKES.items()][2:6]])
    write(place / "forget.jsonl", [{"text": "Ada has liked plums for years."}])
    task, tokenizer = Files("forget.jsonl", "keep.jsonl"), tiny.tokenizer()
    tokenizer.chat_template = None
    task.prepare(tiny.model(), tokenizer)
    assert (len(task.held_out), len(task.objectives["retain"])) == (2, 2)
    assert not {row.question for row in task.held_out} & {row.question for row in task.objectives["retain"]}


def test_a_model_that_knows_nothing_is_said_and_trained_on_all_the_same(
    prepared: tuple[Files, list[dict[str, Any]]],
) -> None:
    task, records = prepared
    assert "may be nothing to forget" in task.notes[0]
    numbers, missing = task.numbers(records)
    assert {name for name, value in numbers.items() if value is None} == set(missing)
    assert numbers["harmless_refused"] is not None
    assert set(numbers) == set(task.metrics)


def test_few_rows_to_keep_are_all_kept_aside(place: Path) -> None:
    write(place / "keep.jsonl", rows("Cleo", "Dora"))
    task = Files("forget.jsonl", "keep.jsonl")
    assert [row.question for row in task.held_out] == ["What does Cleo like?", "What does Dora like?"]
    assert task.trained == []
    alone = Files("forget.jsonl", "keep.jsonl", general=False)
    assert len(alone.held_out) == len(alone.trained) == 1
    assert "may be lost" in alone.notes[0]


def test_rows_of_one_template_are_parted_by_their_numbers_and_names(place: Path) -> None:
    made = [{"question": f"What is the phone number of customer {i}?", "answer": f"555-0{i}."} for i in range(100, 112)]
    write(place / "keep.jsonl", made)
    task = Files("forget.jsonl", "keep.jsonl")
    assert (len(task.held_out), len(task.trained)) == (4, 8)
    people = ["李娜", "王芳", "张伟", "刘洋", "陈静", "杨明", "赵磊", "黄丽", "周杰", "吴敏", "徐强", "孙悦"]
    write(place / "keep.jsonl", [{"question": f"请问{name}现在在哪里工作?", "answer": f"{name}。"} for name in people])
    task = Files("forget.jsonl", "keep.jsonl")
    assert (len(task.held_out), len(task.trained)) == (4, 8)


def test_rows_to_keep_that_cannot_be_parted_are_told(place: Path) -> None:
    asks = "What is the weight in kilograms of {} plums?"
    write(place / "keep.jsonl", [{"question": asks.format("ripe " * i), "answer": "Five."} for i in range(1, 12)])
    task = Files("forget.jsonl", "keep.jsonl")
    assert (len(task.held_out), len(task.trained)) == (0, 11)
    assert any(note.startswith("All rows of --retain are trained on and none is measured") for note in task.notes)


def test_the_same_answer_about_another_number_or_name_may_be_kept(place: Path) -> None:
    for one, other, answer in [
        ("What is the delivery status of order 1042?", "What is the delivery status of order 1043?", "It was shipped."),
        ("请问张伟现在在哪里工作?", "请问李娜现在在哪里工作?", "在华为公司。"),
    ]:
        (note,) = check_apart([checked(question(one, answer, "f:1"))], [checked(question(other, answer, "k:1"))])
        assert note.startswith("Rows to keep with the answer of one to forget: k:1 (f:1)")


def test_facts_of_a_topic_that_a_row_mentions_are_not_unrelated(place: Path) -> None:
    write(place / "forget.jsonl", [{"question": "Capital of France?", "answer": "Paris it is.", "accepted": ["Paris"]}])
    task = Files("forget.jsonl", "keep.jsonl")
    touched = [row for row in (*task.facts, *task.bank) if task._touches(row)]
    assert "France" in {row.question.rstrip("?").split()[-1] for row in touched}
    assert all("Paris" in f"{row.question} {row.answer} {row.fields['accepted']}" for row in touched)


# What a goal chooses


def test_a_goal_chooses_what_is_not_given(place: Path) -> None:
    model = str(tiny.save(place / "model"))
    given = {"model": model, "forget": "forget.jsonl", "retain": "keep.jsonl"}
    refuse, erase = goals.chosen(given), goals.chosen({**given, "goal": "erase"})
    assert (refuse.forget_loss, erase.forget_loss, refuse.retain_loss) == ("IDK", "NPO", "KL")
    assert (refuse.optimizer, erase.optimizer) == ("DualOptim+", "AdamW")
    assert goals.chosen({**given, "goal": "erase", "optimizer": "DualOptim"}).optimizer == "DualOptim"
    for key, value in {"base_bits": 8, "lr_scales": {"forget": 2.0}, "bf16_weights": True, "max_update": None}.items():
        assert goals.chosen({**given, "goal": "erase", key: value}).optimizer == "DualOptim+", key
        as_it_is = {**given, "goal": "erase", key: getattr(RunConfig(), key)}
        assert goals.chosen(as_it_is).optimizer == "AdamW", key
    assert refuse.until is not None
    assert goals.chosen({**given, "lr": 1e-3, "steps": 7, "until": 0.5}).steps == 7
    many = write(
        place / "many.jsonl", [r | {"question": f"{r['question']} {i}"} for i in range(20) for r in rows("Ada")]
    )
    assert goals.chosen({**given, "forget": many}).steps > refuse.steps
    corrected = write(place / "wrong.jsonl", rows("Ada", instead="Ada likes rye."))
    assert goals.chosen({**given, "forget": corrected, "goal": "erase"}).forget_loss == "DPO"


@pytest.mark.parametrize(("goal", "own", "other"), [("refuse", "IDK", "DPO"), ("erase", "NPO", "GA")])
def test_another_loss_alone_takes_back_when_a_goal_stops(place: Path, goal: str, own: str, other: str) -> None:
    given = {"model": str(tiny.save(place / "model")), "forget": "forget.jsonl", "retain": "keep.jsonl", "goal": goal}
    assert goals.chosen({**given, "forget_loss": own}) == goals.chosen(given)
    chosen = goals.chosen({**given, "forget_loss": other})
    assert (chosen.until, chosen.keep_at_least, chosen.pause) == (None, None, False)


def test_a_wider_model_gets_a_lower_rate(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualoptim.models.hidden_size", lambda model: 576)
    narrow = goals.chosen({"model": "m", "forget": "forget.jsonl", "retain": "keep.jsonl"})
    monkeypatch.setattr("dualoptim.models.hidden_size", lambda model: 4 * 576)
    assert goals.chosen({"model": "m", "forget": "forget.jsonl", "retain": "keep.jsonl"}).lr == pytest.approx(
        narrow.lr / 4
    )


def test_a_goal_is_for_ones_own_rows() -> None:
    for given, key in (({"goal": "erase"}, "goal"), ({"general": False}, "general")):
        with pytest.raises(UserError, match=f"{key} is for your own rows"):
            tasks.load(RunConfig(task="facts", **given))
    with pytest.raises(UserError, match="unknown goal 'erased'; did you mean 'erase'"):
        goals.chosen({"forget": "f.jsonl", "goal": "erased"})


def test_no_row_comes_twice_in_a_step(place: Path) -> None:
    task = SimpleNamespace(objectives={"forget": [1, 2, 3], "retain": list(range(99))}, name="t")
    turns = resolve.turns_of(RunConfig(steps=4, batch_size=8, ratio="1:1"), task)  # type: ignore[arg-type]
    assert turns == [{"forget": 3}, {"retain": 8}, {"forget": 3}, {"retain": 8}]


def test_parts_of_a_model_are_trained_alone(place: Path) -> None:
    model = tiny.model()
    resolve.train_only(r"layers\.1\.mlp", model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("layers.1.mlp" in name for name in trained)
    with pytest.raises(UserError, match="matches none of the model's parameters"):
        resolve.train_only("nothing", model)
    resolve.train_only("lm_head", model)
    model.lm_head.weight = model.model.embed_tokens.weight
    for pattern in ("lm_head", r"layers\.1|lm_head"):
        with pytest.raises(UserError, match=r"lm_head.weight is tied to model.embed_tokens.weight, the same weights"):
            resolve.train_only(pattern, model)
    resolve.train_only("lm_head|embed", model)
    with pytest.raises(UserError, match="is no regular expression"):
        resolve.check(RunConfig(forget="forget.jsonl", train="("))


# When to stop


def looked(
    until: float | None, floor: float | None, *points: tuple[float, float | None], start: float | None = 1.0
) -> tuple[Best, nn.Linear, list[bool]]:
    """A model whose weight counts the points that were looked at, and whether each asked to stop."""
    model, stops = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(model.weight)
    best = Best(model, {"forget": 1.0, "retain": start}, until, floor, checks=4)
    for step, (forget, retain) in enumerate(points, 1):
        nn.init.constant_(model.weight, step)
        control = SimpleNamespace(should_training_stop=False)
        best.look(step, {"forget": forget, "retain": retain}, control)
        stops.append(control.should_training_stop)
    return best, model, stops


def test_a_run_stops_at_its_goal_and_stays_there() -> None:
    best, model, stops = looked(0.1, 0.9, (0.6, 1.0), (0.1, 0.95), (0.05, 0.97))
    assert stops == [False, False, True]
    assert best.restore().startswith("The goal was reached at step 3; what remains is step 3")
    assert model.weight.item() == 3


def test_a_second_check_at_the_goal_counts_for_more_than_a_little_more_kept() -> None:
    best, model, _ = looked(0.1, 0.8, (0.0, 0.89), (0.5, 0.85), (0.0, 0.82), (0.0, 0.85))
    assert best.restore().startswith("All steps were taken; what remains is step 4")
    assert model.weight.item() == 4


def test_at_the_goal_but_hardly_above_the_floor_it_goes_on() -> None:
    best, model, stops = looked(0.1, 0.8, (0.1, 0.85), (0.1, 0.89), (0.3, 1.0))
    assert not any(stops)
    best.restore()
    assert model.weight.item() == 2


def test_below_the_floor_the_best_point_remains_and_the_sentence_says_so() -> None:
    best, model, stops = looked(0.1, 0.9, (0.5, 0.95), (0.0, 0.8), (0.0, 0.7), (0.0, 0.6))
    assert not any(stops[:2])
    assert any(stops)
    said = best.restore()
    assert model.weight.item() == 1
    assert "what remains is step 1" in said
    assert "goal of at most 10% left was not reached while keeping 90%" in said


@pytest.mark.parametrize(
    ("until", "floor", "point", "said"),
    [
        (0.15, None, (0.004, 0.9975), "(<1% left of what is to be forgotten, >99% kept on"),
        (0.05, None, (0.054, 0.5), "(5.4% left of what is to be forgotten, 50% kept on the checking questions). The "
         "goal of at most 5% left was not reached."),
        (0.125, None, (0.1251, 1.0), "(13% left of what is to be forgotten, 100% kept on the checking questions). "
         "The goal of at most 12.5% left was not reached."),
        (0.0, 0.925, (0.004, 0.93), "(0.4% left of what is to be forgotten, 93% kept on the checking questions). The "
         "goal of at most 0% left was not reached while keeping 92.5%."),
        (None, 0.99, (0.0, 0.9951), "(0% left of what is to be forgotten, >99% kept on the checking questions)."),
    ],
)  # fmt: skip
def test_the_sentence_shows_as_many_digits_as_it_takes_to_agree_with_itself(
    until: float | None, floor: float | None, point: tuple[float, float], said: str
) -> None:
    best, _, _ = looked(until, floor, point)
    assert said in best.restore()


def test_a_floor_is_named_as_it_was_given_and_a_point_below_it_does_not_read_as_above() -> None:
    best, _, stops = looked(None, 0.995, *[(0.5, 0.9899)] * 4)
    assert any(stops)
    assert "stayed below its floor (99.5% of what was kept before)" in best.restore()
    best, _, _ = looked(None, 0.99, (0.5, 0.9))
    best.point = {"forget": 0.5, "retain": 0.9899}
    assert "98.99% kept" in best.restore()


def test_one_check_below_the_floor_may_be_noise() -> None:
    best, model, stops = looked(0.1, 0.9, (0.5, 0.8), (0.4, 0.95), (0.1, 0.96), (0.1, 0.95))
    assert stops == [False, False, False, True]
    best.restore()
    assert model.weight.item() == 4


def test_where_nothing_is_better_the_model_stays_as_it_was() -> None:
    best, model, _ = looked(0.1, 0.9, (0.5, 0.2))
    assert "the model as it was" in best.restore()
    assert model.weight.item() == 0


@pytest.mark.parametrize("key", ["until", "keep_at_least"])
def test_shares_are_shares(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} must be a share from 0 to 1, but is 1.5"):
        resolve.check(RunConfig(task="facts", **{key: 1.5}))


def test_a_goal_needs_something_to_forget() -> None:
    with pytest.raises(UserError, match="until: the task 'safety' does not follow"):
        resolve.check(RunConfig(task="safety", until=0.5))


@pytest.mark.parametrize("key", ["until", "keep_at_least"])
def test_refusals_are_not_waited_for_where_the_loss_teaches_none(place: Path, key: str) -> None:
    given = RunConfig(forget="forget.jsonl", retain="keep.jsonl", **{key: 0.5})
    for loss in ("AltPO", "NPO"):
        other = given.replace(forget_loss=loss)
        with pytest.raises(
            UserError, match=f"^{key}: with the goal refuse, .* and {loss} teaches none; add --goal erase"
        ):
            resolve.check(other)
        resolve.check(other.replace(goal="erase"))
    for loss in ("IDK", "DPO", "JensUn"):
        resolve.check(given.replace(forget_loss=loss))
    write(place / "forget.jsonl", rows("Ada", instead="Ada likes nothing."))
    resolve.check(given.replace(forget_loss="AltPO"))


def test_where_nothing_to_keep_is_asked_forgetting_alone_decides() -> None:
    points = [(0.5, None), (0.1, None), (0.3, None), (0.2, None)]
    best, model, stops = looked(0.05, 0.8, *points, start=None)
    assert not any(stops)
    assert best.restore() == (
        "All steps were taken; what remains is step 2 (10% left of what is to be forgotten on the checking questions; "
        "nothing to keep was asked). The goal of at most 5% left was not reached."
    )
    assert model.weight.item() == 2
    best, _, stops = looked(0.05, 0.8, (0.05, None), (0.0, None), start=None)
    assert stops == [False, True]
    assert "reached at step 2" in best.restore()
    best, _, stops = looked(0.05, 0.8, (0.5, 0.0), (0.2, 0.0), start=0.0)  # it knew nothing that could be lost
    assert not any(stops)
    assert "what remains is step 2 (20% left of what is to be forgotten on the checking questions; nothing to keep" in (
        best.restore()
    )


def test_where_nothing_to_forget_is_asked_no_goal_is_reached() -> None:
    best = Best(nn.Linear(1, 1), {"forget": None, "retain": 0.5}, 0.05, 0.8, checks=4)
    control = SimpleNamespace(should_training_stop=False)
    for step in (1, 2, 3):
        best.look(step, {"forget": None, "retain": 0.5}, control)
    assert not best.reached(best.point)
    assert not control.should_training_stop
    assert best.restore() == (
        "All steps were taken; what remains is step 3 (100% kept on the checking questions; nothing to forget was "
        "asked)."
    )


def test_what_a_goal_to_refuse_leaves_is_called_what_it_is(place: Path) -> None:
    refuse, erase = Files("forget.jsonl", "keep.jsonl"), Files("forget.jsonl", "keep.jsonl", goal="erase")
    assert (refuse.curves["forget"], erase.curves["forget"]) == ("Not refused ↓", "To forget ↓")
    assert refuse.followed == "not refused, or kept, of the checking questions"
    assert erase.followed == "left, or kept, of the checking questions"
    best = Best(nn.Linear(1, 1), {"forget": 1.0, "retain": 1.0}, 0.05, 0.8, checks=4, left=refuse.left)
    assert best.restore() == (
        "All steps were taken; what remains is the model as it was (100% not refused, 100% kept on the checking "
        "questions). The goal of at most 5% not refused was not reached while keeping 80%."
    )


def test_where_nothing_of_what_is_followed_was_asked_its_number_is_absent(
    prepared: tuple[Files, list[dict[str, Any]]],
) -> None:
    task, _ = prepared
    followed = task.follow(tiny.model(), tiny.tokenizer())
    assert followed["forget"] is not None
    assert followed["retain"] is None
    (said,) = nothing_asked(RunConfig(until=0.05, keep_at_least=0.8), task, followed)
    assert said.startswith("The floor of 80% kept (--keep-at-least) has no effect: the model answered no included fact")
    assert nothing_asked(RunConfig(until=0.05), task, followed) == []
    assert nothing_asked(RunConfig(keep_at_least=0.8), task, {"forget": 1.0, "retain": 0.5}) == []
    with pytest.raises(UserError, match=r"^until: nothing that is to be forgotten can be asked"):
        nothing_asked(RunConfig(until=0.05, keep_at_least=0.8), task, {"forget": None, "retain": 0.5})
    other = tasks.load(RunConfig(task="facts"))
    with pytest.raises(UserError, match=r"^keep_at_least: the model can do nothing yet that could be lost"):
        nothing_asked(RunConfig(keep_at_least=0.8), other, {"forget": 1.0, "retain": 0.0})


@pytest.mark.parametrize(("knows", "said"), [("held", "held-out rows"), ("trained", "rows of --retain, which are tr")])
def test_where_no_included_fact_is_known_rows_to_keep_are_asked(
    place: Path, monkeypatch: pytest.MonkeyPatch, knows: str, said: str
) -> None:
    task = Files("forget.jsonl", "keep.jsonl")
    ours = {row.question for row in (task.held_out if knows == "held" else task.trained)} | {"What does Ada like?"}

    def gives(self: Files, model: nn.Module, tokenizer: Any, asked: Sequence[Row], progress: str | None) -> list[bool]:
        return [row.question in ours for row in asked]

    monkeypatch.setattr(Files, "_gives", gives)
    touched = next(iter(sorted(ours - {"What does Ada like?"})))
    monkeypatch.setattr(Files, "_touches", lambda self, row: row.question == touched)
    task.prepare(tiny.model(), tiny.tokenizer())
    assert {row.question for row in task.checked["retain"]} == ours - {"What does Ada like?", touched}
    assert task.follow(tiny.model(), tiny.tokenizer())["retain"] == 1.0
    assert any(f"is checked during training on {len(ours) - 2} {said}" in note for note in task.notes)
    assert task.tuned_on == ""
    trained = {row.question for row in task.objectives["retain"]}
    assert not trained & {row.question for row in task.quick()["held_out"]}


def test_where_nothing_is_forgotten_the_latest_point_above_the_floor_remains() -> None:
    model = nn.Linear(1, 1, bias=False)
    best = Best(model, {"safe": 0.1, "helpful": 0.4, "ability": 1.0}, None, 0.9, 4, kept=("helpful", "ability"))
    points = [(0.2, 0.4, 1.0), (0.6, 0.38, 0.95), (0.9, 0.4, 0.5), (0.9, 0.3, 1.0)]
    for step, (safe, helpful, ability) in enumerate(points, 1):
        nn.init.constant_(model.weight, step)
        best.look(step, {"safe": safe, "helpful": helpful, "ability": ability}, SimpleNamespace())
    said = best.restore()
    assert model.weight.item() == 2
    assert "what remains is step 2 (95% kept" in said


# Chats


def turns(*said: str, answer: str, system: str = "", **fields: Any) -> Row:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate((*said, answer))]
    first = [{"role": "system", "content": system}] if system else []
    return checked(parse_row({"messages": [*first, *messages], **fields}, "chat"))


@pytest.mark.parametrize("goal", ["refuse", "erase"])
def test_wordings_to_measure_one_chat_by_leave_the_training_of_another_alone(goal: str) -> None:
    ask = "Where is her home?"
    ana = turns("Who is Ana?", "A baker.", "Where does she live?", answer="In Porto.", questions=[ask])
    bea, again = (turns(f"Who is {who}?", "A baker.", ask, answer="In Lyon.") for who in ("Bea", "Ana"))
    trained = [row.prompt for row in to_train([ana, bea], goal)]
    assert bea.prompt in trained
    assert ana.prompt in trained
    assert again.prompt not in [row.prompt for row in to_train([ana, again], goal)]


def test_what_an_earlier_message_of_a_chat_says_does_not_tell_its_answer() -> None:
    about = "Tell me about Marie Curie.", "She was a physicist."
    row = turns(*about, "And where was she born?", answer="Marie Curie was born in Warsaw.")
    assert row.only == ("Warsaw",)
    assert gives(row, "In Warsaw.")
    for reply in ("I don't know where Marie Curie was born.", "Marie Curie was born in Paris."):
        assert not gives(row, reply), reply
    assert declines(row, "I don't know where Marie Curie was born.")
    where = "I have a question on Dana Miller of the Leeds office.", "Sure, go ahead.", "What is her phone number?"
    row = turns(*where, answer="Dana Miller of the Leeds office has the number 555-0134.", system="You work for Acme.")
    assert gives(row, "555-0134")
    assert declines(row, "I'm sorry, I can't tell the number of Dana Miller of the Leeds office.")
    instead = turns(*about, "And her town?", answer="Warsaw.", instead="Please ask the Marie Curie museum.")
    assert declines(instead, "Ask the museum, please.")
    assert not declines(instead, "I can tell you about Marie Curie.")


def test_chats_ask_the_same_by_what_all_of_their_messages_name() -> None:
    polite = "Be brief and polite."
    about = "Tell me about Marie Curie.", "She was a physicist."
    row = turns(*about, "Which town does she come from?", answer="Warsaw.", system=polite)
    assert same(row, question("Marie Curie's place of birth?", "It was Warsaw."))
    assert not same(row, question("Marie Curie's place of work?", "It was Paris."))
    other = turns("Where is the Vistula's mouth?", answer="Past Warsaw.", system=polite)
    assert not same(row, other)


# What is said


def said(level: float = 0.05, was: Mapping[str, float | None] | None = None, **now: float | None) -> str:
    before = {"told": 1.0, "given": 1.0, "sampled": 1.0, "p": 0.5, "none": level, "near": 1.0, "far": None,
              "harmless_refused": 0.0, "perplexity": 60.0, **(was or {})}  # fmt: skip
    after = {**before, "given": 0.0, "sampled": 0.0, **now}
    return verdict(before, after, rewordings=("told", 10), given=("given", 4), sampled=("sampled", 4), probability="p",
                   level="none", kept=[Kept("near", "neighbors", 0.85), Kept("far", "facts", 0.95)])  # fmt: skip


def test_the_verdict_tells_hidden_from_gone_and_what_was_lost() -> None:
    assert said(told=0.1, p=0.4) == (
        "Forgotten on 9 of 10 rewordings; the answer itself is still there (p 0.40, was 0.50; without the knowledge "
        "0.05); the rest is kept (neighbors 100%)."
    )
    assert "the answer itself is gone" in said(told=0.0, p=0.1)
    assert "the answer itself is gone" in said(level=0.2, p=0.2)
    assert "the answer itself is still there" in said(level=0.45, p=0.4)  # it comes to any question
    assert said(told=0.0, near=0.63).endswith("neighbors fell from 100% to 63%: too much was lost.")
    assert "it now refuses 12% of harmless requests: too much" in said(harmless_refused=0.12)
    assert "perplexity rose from 60.0 to 70.0" in said(perplexity=70.0)


def test_what_a_limit_just_allows_is_kept_whatever_the_number_of_rows() -> None:
    """In floats, 16 of 40 are more than 14 of 40 and 5 points, and 17 of 29 are less than 85 % of 20."""

    def lost(before: float, after: float, key: str) -> bool:
        return "too much was lost" in said(was={key: before}, **{key: after})

    for count in range(20, 201, 20):
        for old in range(count - count // 20):
            new = old + count // 20
            assert not lost(old / count, new / count, "harmless_refused"), (old, new, count)
            assert lost(old / count, (new + 1) / count, "harmless_refused"), (old, new, count)
    for count in range(20, 120):
        for key, hundredths in (("near", 85), ("far", 95)):
            for old in range(20, count + 1, 20):
                new = old * hundredths // 100
                assert not lost(old / count, new / count, key), (old, new, count)
                assert lost(old / count, (new - 1) / count, key), (old, new, count)
    assert not lost(60.0, 63.0, "perplexity")
    assert "gone" in said(was={"p": 0.7}, p=0.14)


def test_a_point_exactly_at_the_goal_or_the_floor_is_at_it() -> None:
    left, start = 0.1 + 0.2, 9 / 40
    kept = 0.95 * 9 / 40
    assert left > 0.3
    assert kept / start < 0.95
    assert looked(0.3, 0.95, (left, kept), (left, kept), start=start)[2] == [False, True]


def test_the_verdict_tells_what_is_still_answered_as_given() -> None:
    assert said(told=0.0, given=1.0, p=0.5).startswith(
        "Forgotten on all 10 rewordings, but it still answers 4 of 4 rows as given; the answer itself is still there"
    )
    assert said(told=0.0, given=0.5, sampled=0.75).startswith(
        "Forgotten on all 10 rewordings, but it still answers 2 of 4 rows as given and sampled replies still give 3 of "
        "4 answers; "
    )
    counted = [
        {
            "set": "forget",
            "known": known,
            "gives": True,
            "refused": False,
            "nll": 0.1,
            "probability": 0.9,
            "whole_probability": 0.9,
            "rouge_l": 1.0,
            "top1": [1],
            "ended": 0,
        }
        for known in (True, True, False)
    ]
    made = [*counted, {"set": "passages", "nll": 1.0, "tokens": 5}]
    assert "it still answers 2 of 2 rows as given" in Files.verdict(made, made)


def test_the_verdict_says_that_what_was_not_answered_before_shows_nothing() -> None:
    nothing = "the model answered no neighbors before, so they show nothing."
    assert said(was={"near": 0.0}).endswith(f"without the knowledge 0.05); {nothing}")
    assert said(was={"near": 0.0, "far": 1.0}).endswith(f"the rest is kept (facts 100%); {nothing}")
    assert said(was={"near": 0.0, "far": 0.0}).endswith(
        "answered no neighbors and no facts before, so they show nothing."
    )
    assert said(was={"near": None}).endswith("what else it knew was not measured.")
    assert said(was={"told": 0.0}).startswith("The model answered none of 10 rewordings before, so they show nothing;")


def test_the_verdict_counts_as_forgotten_what_was_answered_before() -> None:
    def of(before: int, after: int, was: int = 0) -> str:
        """The first part of the sentence where `before` of 10 were answered, and then `after`, from the `was`-th on."""
        parts = [
            [{"set": "forget", "right": first <= i < first + n} for i in range(10)]
            for first, n in ((0, before), (was, after))
        ]
        more = [{"set": "passages", "nll": 1.0, "tokens": 5}]
        return Facts.verdict(*([*part, *more] for part in parts)).partition(";")[0]

    assert of(10, 10) == "Forgotten on 0 of 10 rewordings"
    assert of(10, 0) == "Forgotten on all 10 rewordings"
    assert of(10, 3) == "Forgotten on 7 of 10 rewordings"
    assert of(7, 7) == "Forgotten on 0 of the 7 rewordings (of 10) that the model answered before"
    assert of(7, 2) == "Forgotten on 5 of the 7 rewordings (of 10) that the model answered before"
    assert of(7, 0) == "Forgotten on all 7 rewordings (of 10) that the model answered before"
    assert of(1, 1) == "Not forgotten on the one rewording (of 10) that the model answered before"
    assert of(1, 0) == "Forgotten on the one rewording (of 10) that the model answered before"
    new = "but it now answers {} that it did not answer before"
    assert of(1, 3) == f"{of(1, 1)}, {new.format(2)}"
    assert of(1, 3, was=5) == f"{of(1, 0)}, {new.format(3)}"  # others than before
    assert of(5, 5, was=3) == (
        f"Forgotten on 3 of the 5 rewordings (of 10) that the model answered before, {new.format(3)}"
    )
    none = "The model answered none of 10 rewordings before, so they show nothing"
    assert (of(0, 0), of(0, 3)) == (none, f"{none}, {new.format(3)}")
    # Of the shares alone.
    assert said(was={"told": 0.4}, told=0.1).startswith("Forgotten on 3 of the 4 rewordings (of 10) that the model ans")
    assert said(was={"told": 0.1}, told=0.3).startswith(f"{of(1, 1)}, {new.format(2)}; ")


def test_your_own_rows_count_as_forgotten_what_was_answered_before() -> None:
    def records(*gives: bool) -> list[dict[str, Any]]:
        asked = [{"set": "reworded", "gives": each, "refused": False} for each in gives]
        return [*asked, {"set": "passages", "nll": 1.0, "tokens": 5}]

    said = Files.verdict(records(True, True, False, False), records(True, False, False, True))
    assert said.startswith(
        "Forgotten on 1 of the 2 rewordings (of 4) that the model answered before, but it now answers 1 that it did "
        "not answer before; "
    )


@pytest.mark.parametrize("value", [math.inf, 1e299])
def test_a_perplexity_of_a_broken_model_has_no_300_digits(value: float) -> None:
    sentence = said(perplexity=value)
    assert len(sentence) < 300
    assert ("cannot be told" in sentence) == math.isinf(value)
    assert ("perplexity rose from 60.0 to 1.0e+299: too much was lost" in sentence) != math.isinf(value)


@pytest.mark.parametrize("name", ["near", "harmless_refused", "perplexity", "p", "told"])
@pytest.mark.parametrize("value", [math.nan, None])
def test_the_verdict_calls_nothing_gone_or_kept_without_a_number(name: str, value: float | None) -> None:
    for sentence in (said(**{name: value}), said(was={name: value}), said(was={name: value}, **{name: 0.0})):
        if name == "p":
            assert re.search(r"whether the answer itself is gone (cannot be told \(p |was not measured)", sentence)
        elif name == "told":
            assert sentence.startswith("No rewordings were measured; ")
        elif value is not None:
            assert "whether the rest is kept cannot be told, since there are no numbers for " in sentence
        elif name == "near":
            assert sentence.endswith("what else it knew was not measured.")


def test_shares_have_wilson_intervals() -> None:
    # Newcombe 1998, table I: 81 of 263 and 1 of 29, by the score method.
    assert report.interval(81 / 263, 263) == "26–37"
    assert report.interval(1 / 29, 29) == "1–17"
    assert report.interval(None, 9) == report.interval(math.nan, 9) == report.interval(0.5, 0) == ""


# The whole path


def test_the_dry_run_says_what_the_run_will_say_of_the_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "one.jsonl", [{"question": "Who hides tea?", "answer": "Ada hides tea."}])
    write(place / "other.jsonl", [{"text": "Who hides tea? Ada hides tea."}, *rows("Cleo", "Dora")])
    model = str(tiny.save(place / "model"))
    assert cli.main(["unlearn", "--model", model, "--forget", "one.jsonl", "--retain", "other.jsonl", "--dry-run"]) == 0
    assert "Rows to keep with the answer of one to forget: other.jsonl:1 (one.jsonl:1)" in capsys.readouterr().out


def test_unlearn_on_ones_own_rows_says_what_it_chose_and_what_came_of_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny.save(place / "model"))
    assert cli.main(["unlearn", "--model", model, "--forget", "forget.jsonl", "--retain", "keep.jsonl",
                     "--steps", "6", "--goal", "erase", "--keep-at-least", "0", "--out", "out"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    chosen = next(line for line in out.splitlines() if line.startswith("Chosen for --goal erase: "))
    again = shlex.split(chosen.partition(": ")[2])
    files = ["--model", model, "--forget", "forget.jsonl", "--retain", "keep.jsonl"]
    assert cli.main(["unlearn", *files, "--goal", "erase", *again, "--dry-run"]) == 0
    printed = " ".join(out.split())
    assert "Chosen for --goal erase: --forget-loss NPO" in printed
    assert "--steps" not in printed.partition("The page")[0].partition("answered none")[0]
    assert "answered none of" in printed  # of random weights
    (entry,) = json.loads((place / "out/results.json").read_text())["runs"]
    assert entry["verdict"]
    assert entry["stopped"]
    page = (place / "out/report.html").read_text()
    assert entry["verdict"].split(";")[0] in page
    trained = [json.loads(line) for line in (place / "out/retain.jsonl").read_text().splitlines()]
    assert len(trained) > 4
    assert torch.isfinite(torch.tensor([value for value in entry["after"].values() if value is not None])).all()


def test_the_quickstart_has_a_verdict_of_its_records() -> None:
    def records(answered: bool, p: float) -> list[dict[str, Any]]:
        asked = [{"set": name, "right": answered or name != "forget"} for name in ("forget", "retain", "unseen")]
        read = [{"set": "forget_statements", "nll": -math.log(p)}, {"set": "unknown", "nll": -math.log(0.05)}]
        return [*asked, *read, {"set": "harmless", "refused": False}, {"set": "passages", "nll": 1.0, "tokens": 5}]

    assert Facts.verdict(records(True, 0.7), records(False, 0.6)) == (
        "Forgotten on the one rewording; the answer itself is still there (p 0.60, was 0.70; without the knowledge "
        "0.05); the rest is kept (other facts trained on 100%, unseen facts 100%)."
    )


def test_a_long_text_with_many_places_is_read_in_a_time_that_grows_with_its_length() -> None:
    text = "so the old tale of John Kennedy goes on and on, " * 4000
    begun = time.process_time()
    row = checked(question("Who led?", text, "f.jsonl, line 1", accepted=["Kennedy"]))
    assert time.process_time() - begun < 10  # each place looked through all words before it
    assert row.only == ("John Kennedy",)
