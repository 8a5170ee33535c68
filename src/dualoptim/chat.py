"""Where an answer begins and ends: the one place that knows chat templates.

A row is prompt, answer, closing. The prompt is all that a template writes before an answer: headers of roles, and the
empty think blocks of reasoning templates. The closing ends the answer's turn, up to the first control token after the
answer. Both are found by writing the conversation with a mark in the answer's place. The model learns the answer and
its closing; it is asked with the same prompt, and its reply ends at the same token.

A control token that a message spells is text. Before the conversation is written, a break is put inside such a token.
In the result, the break shows where the tokenizer must not read the token as one piece.

Templates that write the day's date, as those of Llama 3.2 and SmolLM3 do, write `DAY` on every day. So a run that is
resumed on another day trains on the same rows, and scores of two days are of the same prompts.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import UserError

Message = dict[str, str]
TEXT = "text"  # the role of plain text that an answer continues
MARK = "The-Answer-Stands-Here"  # in upper and lower case, so that a template that changes case is noticed
DAY = datetime.datetime(2024, 7, 26)  # the date of Llama 3's templates where they are given none
BREAK = "\ufdd0"  # a Unicode noncharacter, which no text has
# What opens a block of thinking: <think>, [THINK], <seed:think>, <|START_THINKING|>, <|begin_of_thought|>.
OPENED = re.compile(
    r"(?P<left>[<\[◁]\|?)(?P<first>start|begin)?(?P<name>[\w:]*(?:think|thought|reasoning)\w*)(?P<right>\|?[>\]▷])\s*$",
    re.I,
)


class Turn(NamedTuple):
    """What stands around an answer: prompt, lead, answer, closing."""

    prompt: str
    lead: str  # blanks that belong to the answer's first token
    closing: str
    end: str  # the control token that the closing ends in; empty where it is letters
    strips: bool  # whether the template strips blanks from an answer's ends
    reserved: tuple[str, ...]  # control tokens that are text where a message or an answer spells them
    cuts: tuple[int, ...]  # positions in the prompt, one inside each such token that is text
    opens: int = 0  # where plain text begins that is to be read as if nothing came before it

    def cuts_of(self, answer: str) -> list[int]:
        """Positions in an answer, one inside each control token that it spells."""
        return _cuts(_broken(answer, self.reserved))


def is_text(prompt: Sequence[Mapping[str, str]]) -> bool:
    """Whether a prompt is plain text or empty, not a chat."""
    return all(message["role"] == TEXT for message in prompt)


def turn_of(tokenizer: Any, prompt: Sequence[Message], where: str = "") -> Turn:
    """What stands before an answer to a prompt, and what ends it.

    Args:
        where: the row's file and line, for messages.

    Raises:
        UserError: no end token, no chat template, or one that cannot write this conversation.
    """
    name = tokenizer.name_or_path
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end token, so answers could not be ended")
    special = special_tokens(tokenizer)
    if is_text(prompt):
        said = _broken("".join(m["content"] for m in prompt), special)
        first = tokenizer.bos_token or tokenizer.eos_token
        text = first + said
        eos = tokenizer.eos_token
        opens = 0 if _reads_on(tokenizer, first) else len(first)
        return Turn(text.replace(BREAK, ""), "", eos, eos, False, special, tuple(_cuts(text)), opens)
    said = f"{where}: " if where else ""
    template = _template(tokenizer, said)
    try:
        return _turn(tokenizer, template, special, tuple(tuple(message.items()) for message in prompt))
    except _RefusedError as refused:
        raise UserError(f"{said}the chat template of {name} {refused}") from None


@functools.lru_cache(maxsize=64)
def _reads_on(tokenizer: Any, first: str) -> bool:
    """Whether text after the written first token has the tokens that a tokenizer gives it alone.

    Not so for Metaspace with `prepend_scheme="first"`, which puts a blank before what is first and before nothing else.
    """
    return _ids(tokenizer, f"{first}a") == [*_ids(tokenizer, first), *_ids(tokenizer, "a")]


def _template(tokenizer: Any, said: str) -> str:
    """A tokenizer's chat template; of several, the default.

    Args:
        said: what a message begins with.
    """
    given, name = getattr(tokenizer, "chat_template", None), tokenizer.name_or_path
    if isinstance(given, list):
        given = {named["name"]: named["template"] for named in given}
    if isinstance(given, dict) and given:
        if "default" not in given and len(given) > 1:
            raise UserError(
                f"the model {name} has several chat templates, {', '.join(given)}, and none is the default; give one "
                "with --chat-template FILE"
            )
        given = given.get("default") or next(iter(given.values()))
    if not given:
        raise UserError(
            f"{said}the model {name} has no chat template; give one with --chat-template FILE "
            "(a Jinja file such as other models' chat_template.jinja), or rows of plain 'text' alone, to forget and to "
            "keep (without --retain FILE, included questions are kept)"
        )
    return str(given)


class _RefusedError(Exception):
    """Why a template cannot write a conversation."""


@functools.lru_cache(maxsize=8192)
def _turn(
    tokenizer: Any, template: str, reserved: tuple[str, ...], prompt: tuple[tuple[tuple[str, str], ...], ...]
) -> Turn:
    messages = [dict(message) for message in prompt]
    broken = [{**message, "content": _broken(message["content"], reserved)} for message in messages]
    try:
        turn = _around(tokenizer, template, reserved, broken, lambda text: text)
    except _RefusedError as refused:
        try:  # templates of vision-language models take contents as lists of parts
            turn = _around(tokenizer, template, reserved, broken, lambda text: [{"type": "text", "text": text}])
        except _RefusedError:
            raise refused from None
    if turn.end and turn.end not in reserved:  # an added token that is not special
        return _turn(tokenizer, template, (*reserved, turn.end), prompt)
    return turn


def _around(
    tokenizer: Any, template: str, reserved: tuple[str, ...], messages: Sequence[Message], form: Callable[[str], Any]
) -> Turn:
    mark = MARK
    while any(mark in message["content"] for message in messages):
        mark += "-"

    def written(answer: str | None = None) -> str:
        turns = [*messages, *([{"role": "assistant", "content": answer}] if answer is not None else [])]
        formed = [{**turn, "content": form(turn["content"])} for turn in turns]
        return _written(tokenizer, template, formed, add_generation_prompt=answer is None)

    pieces = written(mark).split(mark)
    if len(pieces) != 2:
        how = "writes the answer more than once" if len(pieces) > 2 else "does not write the answer"
        raise _RefusedError(f"{how}; give another with --chat-template FILE")
    before, after = pieces
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for i in dict.fromkeys([*users[-1:], len(messages) - 1]):  # what is asked, and what is answered
        if messages[i]["content"].strip() in before:
            continue
        marked = [{**m, "content": mark if j == i else m["content"]} for j, m in enumerate(messages)]
        formed = [{**message, "content": form(message["content"])} for message in marked]
        if mark not in _written(tokenizer, template, formed, add_generation_prompt=True):  # nor in another spelling
            raise _RefusedError(
                f"does not write message {i + 1} of the prompt, of the role {messages[i]['role']!r}, so the model "
                "would not see it; give a role that the template writes, such as 'user'"
            )
    prompt, lead = _beginning(before, written(), messages[-1]["content"].strip())
    spaced = written(f" {mark} ").partition(mark)
    strips = not (spaced[0].endswith(f"{before[-8:]} ") and spaced[2].startswith(f" {after[:8]}"))
    closing, end = _closing(tokenizer, after)
    return Turn(prompt.replace(BREAK, ""), lead, closing, end, strips, reserved, tuple(_cuts(prompt)))


def _beginning(before: str, asked: str, question: str = "") -> tuple[str, str]:
    """The prompt, from what a template writes before a given answer (`before`) and before one to be written (`asked`).

    Also the blanks after it, which belong to the answer's first token, as the model writes it: "Answer:" and " Paris".
    """
    if before.startswith(asked):
        more = before[len(asked) :]
        prompt = asked if not more.strip(" ") else before.rstrip(" ")
    elif asked.startswith(before):
        more = asked[len(before) :]
        opened = OPENED.search(more)  # the template opens a block of thinking: close it, empty
        prompt = f"{before}{more.rstrip()}\n\n{_closed(opened)}\n\n" if opened else asked
    elif question and question in before and question in asked:  # they differ before the question
        tail, asked_tail = before.rpartition(question)[2], asked.rpartition(question)[2]
        if tail.startswith(asked_tail) or asked_tail.startswith(tail):
            prompt, lead = _beginning(tail, asked_tail)
            return asked[: len(asked) - len(asked_tail)] + prompt, lead
        prompt = before.rstrip(" ")
    else:
        prompt = before.rstrip(" ")
    return prompt, before[len(prompt) :] if before.startswith(prompt) else ""


def _closed(opened: re.Match[str]) -> str:
    """What closes a block of thinking."""
    left, first, name, right = opened.group("left", "first", "name", "right")
    end = {"start": "END", "begin": "end"}.get((first or "").lower(), "/")
    return f"{left}{end}{name}{right}"


def _closing(tokenizer: Any, after: str) -> tuple[str, str]:
    """What ends an answer's turn, up to its first control token, and that token; else letters, or the end token."""
    found = [(after.find(token), token) for token in control_tokens(tokenizer) if token in after]
    if not found:
        letters = after.rstrip()
        return (letters, "") if letters else (str(tokenizer.eos_token),) * 2
    at, token = min(found, key=lambda place: (place[0], -len(place[1])))
    return after[:at] + token, token


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that a tokenizer marks as special."""
    special = (text for text, is_special in _added(tokenizer, len(tokenizer)) if is_special)
    return tuple(dict.fromkeys([*special, *map(str, tokenizer.all_special_tokens)]))


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of a tokenizer's control tokens: the special ones, and all that were added except blanks."""
    words = (text for text, _ in _added(tokenizer, len(tokenizer)) if text.strip())
    return tuple(dict.fromkeys([*words, *special_tokens(tokenizer)]))


@functools.lru_cache(maxsize=8)
def _added(tokenizer: Any, size: int) -> tuple[tuple[str, bool], ...]:
    """The tokens that were added to a tokenizer, sometimes thousands, and whether each is special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple((str(token), bool(getattr(token, "special", True))) for token in added)


def end_ids(tokenizer: Any, turns: Iterable[Turn], model: Any) -> list[int]:
    """The ids of the tokens that end an answer.

    These are the control tokens of closings, the tokenizer's end token, and the control tokens that the model's
    generation config names as ends: many chat models have several, such as Llama 3's <|eot_id|> and <|eom_id|>.
    """
    closings = dict.fromkeys(turn.closing for turn in turns if turn.end)
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else named or []
    control = {*getattr(tokenizer, "added_tokens_decoder", {}), *tokenizer.all_special_ids}
    named = [token for token in named if token in control]  # others are text, as after a change of the tokenizer
    return list(dict.fromkeys([*(_ids(tokenizer, c)[-1] for c in closings), tokenizer.eos_token_id, *named]))


def _broken(text: str, tokens: Sequence[str]) -> str:
    """A text with a break put inside each of the given tokens that it spells."""
    if not any(token in text for token in tokens):
        return text
    spelt = "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)))
    return re.sub(spelt, lambda found: found[0][:1] + BREAK + found[0][1:], text)


def _cuts(broken: str) -> list[int]:
    """The positions of breaks, counted in the text without them."""
    return [found.start() - i for i, found in enumerate(re.finditer(BREAK, broken))]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _written(tokenizer: Any, template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    try:
        # Makes reasoning templates write no thinking; others ignore it.
        quick = {"enable_thinking": False, "thinking": False}
        template = _dated(template)
        return str(
            tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **quick, **options)
        )
    except Exception as error:  # whatever a template and jinja raise
        reason = " ".join(str(error).split()) or type(error).__name__
        system = any(message["role"] == "system" for message in messages)
        hint = "; put the system message's text into the first user message" if system else ""
        raise _RefusedError(f"refuses this conversation: {reason}{hint}") from None


def _dated(template: str) -> str:
    """A chat template in which the function that tells the date tells that of `DAY`.

    It is a macro that replaces the parts of a format, as transformers gives no functions to a template. The new line
    after it is not written, and what the template itself writes is the same to the letter.
    """
    if "strftime_now" not in template:
        return template
    parts = {f"%{code}": DAY.strftime(f"%{code}") for code in "aAbBdfHIjmMpSwyY"}
    parts |= {f"%-{code}": parts[f"%{code}"].lstrip("0") or "0" for code in "dHIjmMS"}  # without zeros before
    parts["%%"] = "%"
    replaced = "".join(f" | replace('{part}', '{text}')" for part, text in parts.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


class Spelled(NamedTuple):
    """Tokens of a text, and which characters each stands for; None where the tokenizer does not tell."""

    ids: list[int]
    spans: list[tuple[int, int]] | None


def spelled(tokenizer: Any, text: str, cuts: Sequence[int] = (), *, goes_on: bool = False, opens: int = 0) -> Spelled:
    """A text as tokens, none of which spans a cut.

    Args:
        cuts: positions in the text.
        goes_on: whether other text comes before it, so that the blank that some tokenizers add at the start is wrong.
        opens: as in `Turn`.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] | None = []
    for start, end in itertools.pairwise([0, *([opens] if opens else []), *cuts, len(text)]):
        piece = _piece(tokenizer, text[start:end], goes_on or start > opens)
        ids += piece.ids
        spans = (
            None
            if spans is None or piece.spans is None
            else [*spans, *((start + a, start + b) for a, b in piece.spans)]
        )
    return Spelled(ids, spans)


def _piece(tokenizer: Any, text: str, goes_on: bool) -> Spelled:
    offsets = bool(getattr(tokenizer, "is_fast", False))
    before = "\n" if goes_on else ""
    encoded = tokenizer(
        before + text, add_special_tokens=False, **({"return_offsets_mapping": True} if offsets else {})
    )
    ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]] if offsets else None
    if goes_on:
        first = _ids(tokenizer, before)
        if ids[: len(first)] != first:  # the new line was merged into a token of the text
            return _piece(tokenizer, text, goes_on=False)
        ids = ids[len(first) :]
        spans = spans and [(max(start - 1, 0), max(end - 1, 0)) for start, end in spans[len(first) :]]
    return Spelled(ids, spans)


def prompt_ids(tokenizer: Any, prompt: Sequence[Message], where: str = "", begun: str = "") -> list[int]:
    """The tokens of the prompt that a model is given.

    Args:
        begun: the beginning of the answer, which the model continues.
    """
    turn = turn_of(tokenizer, prompt, where)
    return spelled(tokenizer, turn.prompt + (turn.lead + begun if begun else ""), turn.cuts, opens=turn.opens).ids


def reply_of(tokenizer: Any, ids: Sequence[int], turn: Turn, ends: Sequence[int]) -> str:
    """The text of a reply up to its end."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    # As it was learned: when cleaning up, some tokenizers would remove blanks before punctuation.
    text = str(tokenizer.decode(list(ids[:last]), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
    closing = turn.closing.removesuffix(turn.end).strip()
    if turn.end:
        return text.removesuffix(closing).strip()
    text = text.partition(closing)[0]  # for a template that ends a turn in letters
    if last == len(ids):  # it may have been cut off within them
        begun = next((n for n in range(len(closing) - 1, 0, -1) if text.endswith(closing[:n])), 0)
        text = text[: len(text) - begun]
    return text.strip()
