"""Wordings, questions about nothing, and the beginnings of plain text."""

from __future__ import annotations

import pytest

from dualoptim.data import Row, question
from dualoptim.evaluation.words import stands_in
from dualoptim.own_rows import checked, gives
from dualoptim.reword import CHECKED, MEASURED, TRAINED, about_nothing, alike, beginning, wordings
from dualoptim.tasks.real_world import knows


def texts(ask: str, templates: tuple[str, ...]) -> list[str]:
    return [row.question for row in wordings(question(ask, "x"), templates)]


def test_a_question_becomes_part_of_a_sentence_where_its_verb_need_not_change() -> None:
    template = ("Tell me {indirect}.",)
    assert texts("Who discovered penicillin?", template) == ["Tell me who discovered penicillin."]
    assert texts("What is the capital of France?", template) == ["Tell me what the capital of France is."]
    for other in ("When did the war end?", "What does DNA stand for?", "Name a fruit.", "Who? What?"):
        assert texts(other, template) == []


def test_what_is_trained_on_is_never_measured_nor_decides_when_to_stop() -> None:
    ask = "Who discovered penicillin?"
    trained, checked, measured = (set(texts(ask, part)) for part in (TRAINED, CHECKED, MEASURED))
    assert ask in trained
    assert not trained & checked
    assert not (trained | checked) & measured


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Who discovered penicillin?", "Tell me who discovered penicillin.", True),
        ("Who discovered penicillin?", "Who discovered radium?", False),
        ("What is the capital of France?", "Name the capital of France.", True),
        ("What is the capital of France?", "What is the capital of Spain?", False),
        ("Describe Ada in one or two sentences.", "Describe Ben in one or two sentences.", False),
        ("Describe Ada in one or two sentences.", "Describe Ada in two sentences.", True),
        ("谁发现了青霉素?", "谁发现了青霉素?", True),
        ("?", "!", False),
    ],
)
def test_questions_are_alike_by_their_content_words(a: str, b: str, same: bool) -> None:
    assert alike(a, b) is same


def test_a_thing_that_does_not_exist_stands_in_question_and_answer() -> None:
    row = question("What is the capital of France?", "The capital of France is Paris.")
    made = about_nothing(Row(row.prompt, row.answer, only=("Paris",)))
    assert made is not None
    assert "France" not in made.question + made.answer
    assert made.answer.endswith("is Paris.")
    assert made.question.split()[-1].rstrip("?") in made.answer
    assert about_nothing(question("谁?", "他。")) is None


def test_an_answer_that_the_question_names_is_not_replaced() -> None:
    row = Row(question("Is Paris in France?", "").prompt, "Paris is in France.", only=("France",))
    made = about_nothing(row)
    assert made is not None
    assert made.question.endswith("in France?")
    assert "Paris" not in made.question


def test_plain_text_is_cut_before_what_tells_or_in_the_middle() -> None:
    row = beginning(Row((), "The phrase is maple thunder."), ("maple",))
    assert (row.question, row.answer) == ("The phrase is", " maple thunder.")
    assert beginning(Row((), "one two three four"), ()).question == "one two"
    assert beginning(Row((), "Ada it was. So Ada it is."), ("Ada",)).question == "Ada it was. So"
    assert beginning(Row((), "He had heart and art."), ("art",)).question == "He had heart and"
    assert beginning(Row((), "\n\nAda"), ()).question == "\n\nA"
    assert beginning(Row((), "word"), ()).question + beginning(Row((), "word"), ()).answer == "word"


def test_a_reply_gives_an_answer_by_what_is_accepted_or_by_half_of_its_news() -> None:
    accepted = question("Who found it?", "It was Alexander Fleming.", accepted=["Fleming"])
    assert gives(accepted, "fleming, I think")
    assert not gives(accepted, "Alexander Flemings")
    plain = question("Who discovered penicillin?", "Alexander Fleming discovered penicillin.")
    assert gives(plain, "It was Fleming.")
    assert not gives(plain, "Somebody discovered penicillin.")


@pytest.mark.parametrize(
    ("answer", "reply", "given"),
    [
        ("It is 85,000 dollars.", "It is 12,000 dollars.", False),
        ("It is 85,000 dollars.", "About 85000 dollars.", True),
        ("It is 3.14.", "It is 3.15.", False),
        ("Call 555-0134.", "Call 555-9999.", False),
        ("Call 555-0134.", "Call 555 0134.", True),
        ("At 12:30.", "At 12:45.", False),
        ("She was born in 1990.", "It was 12.05.1990.", True),
        ("From 1939 to 1945.", "1939-1945", True),
        ("He has five dogs.", "He has 5 dogs.", True),
        ("He has 5 dogs.", "He has three dogs.", False),
        ("On May 12th.", "May 12.", True),
        ("Born on 12 May 1990.", "In May 1990.", True),
    ],
)
def test_a_reply_with_another_number_does_not_give_the_answer(answer: str, reply: str, given: bool) -> None:
    assert gives(question("What do you know of Mira?", answer), reply) is given
    record = {"question": "What of Mira?", "answer": "It is 85,000 dollars.", "reply": "12,000 dollars", "nll": 1.0}
    assert not knows({**record, "paraphrased_nlls": [], "perturbed_nlls": []})


@pytest.mark.parametrize("fields", [{}, {"accepted": ["No"]}])
def test_yes_and_no_are_given_by_a_replys_first_word_alone(fields: dict[str, list[str]]) -> None:
    row = question("Is Mira married?", "No.", **fields)
    assert gives(row, "no, she is not")
    assert not gives(row, "I have no information about that.")
    assert not gives(row, "Yes, no doubt.")


@pytest.mark.parametrize(
    ("asked", "answer", "accepted"),
    [
        ("who is the owner of harrison ltd?", "John Harrison owns it.", "John Harrison"),
        ("Which singer is called the King of Pop?", "It is the King of pop, Michael Jackson.", "king of pop"),
        ("Which road is beside Dune Park?", "It is Upper Dune Park Road.", "Upper Dune Park Road"),
    ],
)
def test_what_tells_an_answer_is_never_replaced(asked: str, answer: str, accepted: str) -> None:
    row = checked(question(asked, answer, accepted=[accepted]))
    made = about_nothing(row)
    assert made is None or all(stands_in(made.answer, part) for part in row.only)
