"""What is looked up among many rows: the same as comparing with each of them, with few comparisons."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from dualoptim.data import Row, parse_row, question
from dualoptim.evaluation.words import stands_in
from dualoptim.rows import giving, own_rows, reword
from dualoptim.rows.giving import Answers, Parts, Questions, gives
from dualoptim.rows.own_rows import asking, check_apart, check_topics, checked
from dualoptim.tasks import files

# Words, numbers and dates in many ways of writing; a blank stands where one may be missing.
SAID = (
    "Paris", "paris", "Zoë", "ZOE\u0308", "Straße 12", "STRASSE", "New York",
    "new\u00a0york", "O’Neill", "o'neill", "A-17", "a17", "A 17", "555-0134",
    "(555) 01 34", "5550134", "1,500", "1500", "500", "1.500,5", "85.000", "85 000",
    "12th", "twelve", "12", "3 March 2020", "March 3, 2020", "2020-03-03",
    "3.3.2020", "03/2020", "March", "3", "2020", "17:30", "17.30 Uhr", "5pm",
    "5 p.m.", "100.0", "100", "yes", "Yes, it is", "no", "No.", "nein", "да",
    "Москва", "в Москве", "Αθήνα", "서울", "서울에서", "부산", "القاهرة", "للقاهرة",
    "بالقاهرة", "قاهرة", "ل", "ا", "לירושלים", "ירושלים", "東京", "東京都", "京", "トウキョウ",
    "ありがとう", "กรุงเทพ", "张伟在北京", "北京", "٣٫١٤", "3,14", "file_name", "file_2", "m²",
    "3km", "likes", "like", "baker", "bakers", "the", "it", "is", "der", "AM", "-",
    "?", "x\u0301", "straße12", "12/13", "13",
    "A", "a", "I", "Will", "The Who", "our", "I'm", "Ana's", "l'eau", "twenty-five", "25", "one",
    "one hundred and five", "105", "-5", "5", "10 g", "10g", "1.80m", "1.80 m", "0.50", "0.5", "4-2-7-1", "4271",
    "03/05/1990", "5 March 1990", "$5", "5 €", "5 euros", "5%", "A+", "A-", "C++", "C#", "n > 5", "n<5",
)  # fmt: skip
ASKS = (
    "Where", "does", "Ana", "Bo", "live", "work", "in", "Lima", "the", "house",
    "order", "1042", "1043", "refund", "policy", "张伟在哪里工作", "李娜在哪里工作", "where",
    "likes", "Quito", "of",
)  # fmt: skip


def made(draw: random.Random, count: int) -> list[Row]:
    """Rows of all kinds, with words and numbers that often come again."""

    def some(words: Sequence[str], least: int, most: int) -> str:
        return draw.choice([" ", " ", ", ", ""]).join(draw.choices(words, k=draw.randint(least, most)))

    rows = []
    for i in range(count):
        record: dict[str, Any] = {"answer": some(SAID, 1, 5)}
        if draw.random() < 0.3:
            text = draw.choice(record["answer"].split())
            record["accepted"] = [text, some(SAID, 1, 2)]
        asks = some(ASKS, 1, 6) + draw.choice(["?", "", " " + draw.choice(SAID)])
        if draw.random() < 0.2:
            before = {"role": "user", "content": some(ASKS, 1, 4)}, {"role": "assistant", "content": some(SAID, 1, 2)}
            prompt = (*before, {"role": "user", "content": asks})
        else:
            prompt = ({"role": "user", "content": asks},) if draw.random() < 0.95 else ()
        row = Row(prompt, record["answer"], f"f:{i}", {"accepted": record.get("accepted")})
        rows.append(Row(row.prompt, row.answer, row.where, row.fields, own_rows._news(row)))
    return rows


def test_what_is_looked_up_is_what_comparing_with_each_row_finds() -> None:
    found = 0
    for seed in range(6):
        draw = random.Random(seed)
        rows, others = made(draw, 50), made(draw, 40)
        answers, questions = Answers(rows), Questions(rows)
        parts = [*SAID, *(row.answer for row in rows), " ", ""]
        standing = Parts(parts)
        for other in others:
            text = other.answer
            given = [row.where for row in rows if gives(row, text)]
            assert [row.where for row in answers.given_in(text)] == given, text
            alike = [i for i, row in enumerate(rows) if reword.ask_alike(other, row)]
            assert list(questions.alike(other)) == alike, other.question
            assert list(standing.standing_in(text)) == [i for i, p in enumerate(parts) if stands_in(text, p)], text
            found += len(given) + len(alike)
    assert found > 500


def test_rows_that_ask_alike_stay_on_one_side_as_when_each_is_compared_with_each() -> None:
    def groups(rows: Sequence[Row]) -> list[set[int]]:
        asked = [asking(row) for row in rows]
        left, found = set(range(len(rows))), []
        while left:
            group, ends = set(), {min(left)}
            while ends:
                at = ends.pop()
                group.add(at)
                ends |= {i for i in left - group if reword.ask_alike(asked[at], asked[i])}
            left -= group
            found.append(group)
        return found

    for seed in range(4):
        rows = made(random.Random(seed), 60)
        aside, trained = files._kept_aside(rows)
        held: set[int] = set()
        found = groups(rows)
        for first in random.Random(0).sample(range(len(rows)), len(rows)):
            group = next(group for group in found if first in group)
            held |= group if len(held | group) <= len(rows) // 3 else set()
        assert [row.where for row in aside] == [rows[i].where for i in sorted(held)]
        assert [row.where for row in trained] == [row.where for i, row in enumerate(rows) if i not in held]
        assert aside


def test_questions_of_common_words_alone_stay_on_one_side_too() -> None:
    asks = ("Who are you?", "What is your name?", "How are you?", "🍕?")
    rows = [question(text, f"Answer {i}.") for text in asks for i in range(4)]
    assert list(Questions(rows).alike(question("what is your name", ""))) == [4, 5, 6, 7]
    aside, trained = files._kept_aside(rows)
    assert len(aside) == 4
    assert not {row.question for row in aside} & {row.question for row in trained}


def test_many_rows_are_compared_with_few_and_not_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(kind: str, i: int) -> Row:
        return checked(
            parse_row({"question": f"Where does {kind}{i} live?", "answer": f"In {kind}ville{i}."}, f"f:{i}")
        )

    compared = {"told": 0, "ask_alike": 0, "stands_in": 0}

    def counted(module: Any, name: str) -> None:
        was = getattr(module, name)

        def counting(*args: Any) -> Any:
            compared[name] += 1
            return was(*args)

        monkeypatch.setattr(module, name, counting)

    counted(giving, "told")
    counted(reword, "ask_alike")
    counted(giving, "stands_in")
    forget, keep = ([record(kind, i) for i in range(400)] for kind in ("Ana", "Bo"))
    assert check_apart(forget, keep) == []
    files._kept_aside(keep)
    assert not check_topics({f"Ana{i}": [f"Who is Ana{i}?"] for i in range(400)}, keep)
    task = files.Files.__new__(files.Files)
    task.given, task.topics = forget, ["Ana0"]
    assert not any(task._touches(row) for row in keep)
    assert task._touches(question("Where is it?", "It is in Anaville7."))
    assert sum(compared.values()) < 10 * len(keep), compared
