"""Documents cut into chunks: nothing lost, nothing too long, and no end but where a document ends."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dualoptim import cli
from dualoptim.data import Row, encode, parse_row, question
from dualoptim.errors import UserError
from dualoptim.rows.chunks import cut
from dualoptim.rows.own_rows import asking, read_to_forget, to_train
from dualoptim.tasks.files import Files

from . import tiny

SENTENCE = "Ada sold plums, rye and tea to 27 harbor-masters; nobody knew why she sailed north. "
TEXTS = {
    "ASCII": "".join(f"{i}. {SENTENCE}" for i in range(12)),
    "one word": "".join(f"unfathomably{i}" for i in range(60)),
    "Chinese": "".join(f"从前有{i}位船长，她把茶叶和李子卖给港口的人们，没有人知道为什么。" for i in range(12)),
    "emoji": "".join(f"🍵👩‍👩‍👧 tea{i}🏴󠁧󠁢󠁳󠁣󠁴󠁿 é e\u0301 " for i in range(40)),
    "blanks at both ends": "\n\n  \t" + "".join(f"{SENTENCE}{i} " for i in range(9)) + "  \n\n",
    "lines": "\r\n".join(f"{i}\n\n   Another one,\tand {i} more.\r\n\u2028" for i in range(25)),
    "blanks alone in the middle": "".join(str(i) + " \n" * (i % 40) for i in range(60)) + "That is all.",
    "control tokens": "".join(f"She wrote <|end|> and <|user|> on {i}. " for i in range(20)),
}


def words() -> PreTrainedTokenizerFast:
    """Byte-level BPE with tokens of several letters, so that a cut can fall within one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>", "<|begin|>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    made.train_from_iterator([SENTENCE, *TEXTS.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", bos_token="<|begin|>")


class WithoutOffsets:
    """A tokenizer that does not tell which characters its tokens are of, as those written in Python."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.inner(*texts, **options)


TOKENIZERS = {
    "letters": tiny.tokenizer(),
    "words": words(),
    "letters without offsets": ByT5Tokenizer(),  # whose end token swallows blanks behind it
    "words without offsets": WithoutOffsets(words()),
}
SIZES = [(24, None), (61, None), (61, 60), (61, 30), (40, 7)]


def document(text: str) -> Row:
    return Row((), text, "file.jsonl:3", {"id": 7})


def ids(row: Row, tokenizer: Any) -> list[int]:
    return encode(row, tokenizer, 2**31).input_ids


@pytest.mark.parametrize(("size", "stride"), SIZES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_chunks_are_all_of_the_text_and_none_is_too_long(
    text: str, tokenizer: Any, size: int, stride: int | None
) -> None:
    chunks = cut([document(text)], tokenizer, size, stride)
    assert len(chunks) > 1
    overlaps = stride is not None and stride < size - 1
    if overlaps and text == TEXTS["blanks alone in the middle"]:
        return  # blanks among blanks stand anywhere
    begin = -1
    covered = ""
    for i, chunk in enumerate(chunks, 1):
        assert chunk.where == f"file.jsonl:3, chunk {i}"
        assert chunk.chunk == (i, len(chunks))
        assert chunk.fields == {"id": 7}
        assert max(len(ids(chunk, tokenizer)), len(ids(asking(chunk), tokenizer))) <= size
        assert any(label not in (-100, tokenizer.eos_token_id) for label in encode(chunk, tokenizer, size).labels)
        if overlaps:
            # Each begins behind the beginning of the one before it, at a place that this one has reached.
            begin = text.find(chunk.answer, begin + 1)
            assert 0 <= begin <= len(covered)
            covered = text[: max(len(covered), begin + len(chunk.answer))]
        else:
            covered += chunk.answer
    assert covered == text
    assert len(ids(chunks[-1], tokenizer)) >= min(size // 4, 10), "no last chunk of a few tokens"


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_end_is_learned_at_the_documents_end_alone(tokenizer: Any) -> None:
    chunks = cut([document(TEXTS["ASCII"])], tokenizer, 40)
    end = tokenizer.eos_token_id
    for chunk in chunks:
        for row in (chunk, asking(chunk), *to_train([chunk], "erase")):
            tokens = encode(row, tokenizer, 40)
            assert (tokens.labels[-1] == end) == (chunk is chunks[-1])
            assert end not in tokens.labels[:-1]
            assert tokens.ended == (1 if chunk is chunks[-1] else 0)
    for row in to_train(chunks, "refuse"):
        assert encode(row.answered(row.fields["instead"]), tokenizer, 99).labels[-1] == end, "a refusal does end"


def test_all_of_every_chunk_is_erased() -> None:
    tokenizer = TOKENIZERS["words"]
    chunks = cut([document(TEXTS["ASCII"])], tokenizer, 40)
    learned = ""
    for row in to_train(chunks, "erase"):
        labels = encode(row, tokenizer, 40).labels
        learned += tokenizer.decode([label for label in labels if label not in (-100, tokenizer.eos_token_id)])
    assert learned == TEXTS["ASCII"]


def test_strides_are_as_long_as_asked_for() -> None:
    text = TEXTS["ASCII"]
    chunks = cut([document(text)], TOKENIZERS["letters"], 60, 20)
    begins = []
    at = -1
    for chunk in chunks:
        begins.append(at := text.find(chunk.answer, at + 1))
    steps = [b - a for a, b in itertools.pairwise(begins)]
    assert max(steps) <= 20
    assert sum(steps) / len(steps) > 12, "back to where a word begins, and no further"


@pytest.mark.parametrize("more", range(1, 40))
def test_what_is_left_over_is_shared_with_the_chunk_before(more: int) -> None:
    tokenizer = TOKENIZERS["letters"]
    text = ("a" * 38 + " ") * 2 + "b" * more
    lengths = [len(ids(chunk, tokenizer)) for chunk in cut([document(text)], tokenizer, 40)]
    assert max(lengths) <= 40
    assert min(lengths) >= 10


def test_what_fits_and_what_is_no_plain_text_stays_as_it_is() -> None:
    tokenizer = TOKENIZERS["letters"]
    short, chat = document("A short text."), question("Who? " * 30, "Ann. " * 30, "f:1")
    assert cut([short, chat], tokenizer, 60) == [short, chat]
    edge = document("a b " * 9)  # of 38 tokens, but not with the words that wordings put before it
    (one,) = cut([edge], tokenizer, 40)
    assert (one.answer, one.where, one.chunk) == (edge.answer, edge.where, (1, 1))
    assert all(len(ids(row, tokenizer)) <= 40 for row in to_train([one], "erase"))


def test_a_model_of_few_positions_keeps_room_for_wordings() -> None:
    tokenizer = TOKENIZERS["letters"]
    longest = max(len(ids(chunk, tokenizer)) for chunk in cut([document(TEXTS["ASCII"])], tokenizer, 90, None, 90))
    assert longest <= 90 - len("I have read that this is so. ")
    with pytest.raises(UserError, match="chunk 91 is more than the model's 90 positions"):
        cut([document("A.")], tokenizer, 91, None, 90)


def test_what_cannot_be_cut_is_told() -> None:
    tokenizer = TOKENIZERS["letters"]
    with pytest.raises(UserError, match=r"file\.jsonl:3: '茶' alone has 4 tokens.* a chunk 3; raise chunk"):
        cut([document("茶" * 9)], tokenizer, 3)
    for key in ("accepted", "questions", "instead"):
        row = Row((), SENTENCE * 3, "f:1", {key: ["Ada"], "topic": "trade"})
        with pytest.raises(UserError, match=rf"f:1: .* its '{key}' would stand for each of its chunks"):
            cut([row], tokenizer, 40)


def test_a_chunk_that_was_written_down_is_read_as_one_again() -> None:
    row = parse_row({"text": "in the middle", "chunk": [2, 5]}, "f:1")
    assert (row.chunk, row.ends, row.fields) == ((2, 5), False, {})
    again = cut([Row((), SENTENCE, "f:1", chunk=(2, 5))], TOKENIZERS["letters"], 40)
    assert not any(chunk.ends for chunk in again)
    assert parse_row({"text": "T", "chunk": 3}, "f:1").fields == {"chunk": 3}
    assert parse_row({"question": "Q", "answer": "A", "chunk": [1, 2]}, "f:1").chunk is None


# The command line


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "model")
    write(tmp_path / "forget.jsonl", {"text": SENTENCE * 4})
    write(tmp_path / "keep.jsonl", *({"text": f"{name} mends clocks. " * 20} for name in ("Ben", "Cleo")))
    return tmp_path


def write(path: Path, *rows: Any) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


OWN = ["--model", "model", "--forget", "forget.jsonl", "--retain", "keep.jsonl"]
LONG = ["--max-length", "200"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "too long without": (LONG, "or give --chunk, which cuts plain text into chunks"),
    "zero": (["--chunk", "0"], "chunk must be a number of tokens > 0, but is 0"),
    "a word": (["--chunk", "many"], "chunk"),
    "a stride alone": (["--chunk-stride", "8"], "chunk_stride: texts are not cut into chunks; add --chunk"),
    "a stride that loses text": (
        ["--chunk", "64", "--chunk-stride", "65"],
        "chunk_stride must be 1 to chunk 64, or what lies between two chunks would be lost, but is 65",
    ),
    "no stride": (["--chunk", "64", "--chunk-stride", "0"], "chunk_stride must be 1 to chunk 64"),
    "more than max_length": (["--chunk", "201", *LONG], "chunk 201 is more than max_length 200"),
    "more than the model takes": (["--chunk", "4000", "--max-length", "4000"], "more than the model's 2048 positions"),
    "a model made of rows": (["--chunk", "64", "--model", "tiny", "--memorise", "true"], "name another model"),
    "with a task": (["--chunk", "64", "--task", "facts"], "chunk is for your own rows (--forget FILE)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    mistake: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, said = MISTAKES[mistake]
    own = ["--model", "model"] if "--task" in options else OWN
    assert cli.main(["unlearn", *own, "--out", "out", *options]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(line) == 1
    assert said in line[0]
    assert not (place / "out").exists()


@pytest.mark.parametrize("goal", ["erase", "refuse"])
def test_a_run_on_documents_trains_on_their_chunks_and_measures_them(place: Path, goal: str) -> None:
    options = ["--chunk", "64", *LONG, "--goal", goal, "--steps", "2", "--batch-size", "2", "--curve-points", "1"]
    assert cli.main(["unlearn", *OWN, *options, "--out", "out", "--save-model", "false"]) == 0
    written = [json.loads(line) for line in (place / "out/forget.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "".join(row["text"] for row in written) == SENTENCE * 4
    assert written[0]["chunk"] == [1, len(written)]
    (entry,) = json.loads((place / "out/results.json").read_text(encoding="utf-8"))["runs"]
    assert entry["config"]["chunk"] == 64
    assert entry["after"]["forget_probability"] is not None
    # What a run wrote is what another can begin from.
    again, _ = read_to_forget("out/forget.jsonl")
    assert [row.ends for row in again] == [False] * (len(written) - 1) + [True]


def test_chunks_that_a_model_does_not_recite_are_trained_on_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Files("forget.jsonl", "keep.jsonl", goal="erase", chunk=64, tokenizer="model")
    first = task.given[0].where
    monkeypatch.setattr(Files, "_gives", lambda self, m, t, rows, progress: [row.where == first for row in rows])
    task.prepare(tiny.model(), tiny.tokenizer())
    assert [row.where for row in task.objectives["forget"]] == [row.where for row in task.given]
    assert not any("left out" in note for note in task.notes)


def test_chunk_without_a_text_that_is_long_says_so(place: Path) -> None:
    write(place / "forget.jsonl", {"question": "Who mends?", "answer": "Ben mends. " * 20})
    write(place / "keep.jsonl", *({"text": f"{name} sails."} for name in ("Ed", "Flo")))
    notes = Files("forget.jsonl", "keep.jsonl", chunk=64, tokenizer="model").notes
    assert "No plain text was longer than --chunk 64, so none was cut." in notes


def test_the_dry_run_and_evaluate_cut_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *OWN, "--chunk", "64", *LONG, "--dry-run"]) == 0
    assert "rows of " in capsys.readouterr().out
    assert cli.main(["evaluate", *OWN, "--chunk", "64", "--chunk-stride", "32", "--scores", "s.json"]) == 0
    records = json.loads((place / "s.json").read_text(encoding="utf-8"))["after"]["records"]
    assert sum(record["set"] == "forget" for record in records) > 5


def test_overlapping_chunks_of_a_document_are_not_both_trained_on_and_measured(place: Path) -> None:
    write(place / "keep.jsonl", *({"text": "".join(f"{n}{w} " for w in "abcdefghijklm" for n in name)}
                                  for name in (("be", "lo"), ("cu", "ri"), ("da", "my"), ("fe", "zu"))))  # fmt: skip
    task = Files("forget.jsonl", "keep.jsonl", chunk=64, chunk_stride=32, tokenizer="model")
    sides = [{row.where.rpartition(", chunk ")[0] for row in rows} for rows in (task.held_out, task.trained)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_a_model_with_absolute_positions_is_scored_on_its_longest_chunks(place: Path) -> None:
    small = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=500, eos_token_id=0,
                                       bos_token_id=0))  # fmt: skip
    small.save_pretrained(place / "model")
    write(place / "forget.jsonl", {"text": SENTENCE * 9})
    assert cli.main(["evaluate", *OWN, "--chunk", "500"]) == 0
