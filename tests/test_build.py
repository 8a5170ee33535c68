"""What a model says of its own accord, as rows."""

from __future__ import annotations

import pytest

from dualoptim.build import whole_sentences


@pytest.mark.parametrize(
    "text",
    [
        "The population is 1.4 billion people",
        "Dr. Smith lives in Oslo and",
        "The URL is www.example.com and it",
        "圆周率约为3.14，是常数",
        "It was written by J. K. Rowling and",
        "He moved to the U.S. in 1950 and",
        "There are:\n1. Plums\n2. Figs",
        "He lives in the U.S.",
        "Apple Inc. makes telephones",
    ],
)
def test_a_mark_within_a_sentence_cuts_nothing_off(text: str) -> None:
    assert whole_sentences(text) == text


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Use file.txt to read it. Then go", "Use file.txt to read it."),
        ("It is 1.4 billion. Dr. Smith says", "It is 1.4 billion."),
        ("圆周率约为3.14，是常数。我们用它", "圆周率约为3.14，是常数。"),
        ("他说：「好。」然后他", "他说：「好。」"),
        ('She said "Yes." Then she', 'She said "Yes."'),
        ("Is it so?! Nobody", "Is it so?!"),
        ("यह सच है। और", "यह सच है।"),
        ("Yes. He lives in the U.S.", "Yes. He lives in the U.S."),
        ("It ended in 1980. Then came", "It ended in 1980."),
    ],
)
def test_a_last_sentence_that_was_cut_off_is_left_out(text: str, whole: str) -> None:
    assert whole_sentences(f" {text} ") == whole
