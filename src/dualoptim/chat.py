"""Where an answer begins and ends: the one place that knows chat templates.

A row is prompt, answer, closing. The prompt is all that a template writes before an answer: headers of roles, and the
empty think blocks of reasoning templates. The closing is what ends the answer's turn, the first control token behind
it. Both are found by writing the conversation with a mark in the answer's place. What is learnt is the answer and its
closing; what the model is asked with is the same prompt; and a reply ends at the same token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import UserError

Message = dict[str, str]
TEXT = "text"  # the role of plain text that an answer continues
MARK = "THE-ANSWER-STANDS-HERE"
OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")


class Turn(NamedTuple):
    """What stands around an answer: prompt, lead, answer, closing."""

    prompt: str
    lead: str  # blanks that are the answer's first token's
    closing: str
    strips: bool  # whether the template takes blanks off an answer's ends


def is_text(prompt: Sequence[Mapping[str, str]]) -> bool:
    """Whether a prompt is plain text, or nothing, and no chat."""
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
    if is_text(prompt):
        text = (tokenizer.bos_token or tokenizer.eos_token) + "".join(m["content"] for m in prompt)
        return Turn(text, "", tokenizer.eos_token, strips=False)
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError(
            f"the model {name} has no chat template; give one with --chat-template FILE "
            "(a Jinja file such as other models' chat_template.jinja), or rows of plain 'text'"
        )
    try:
        return _turn(tokenizer, str(template), tuple(tuple(message.items()) for message in prompt))
    except _RefusedError as refused:
        said = f"{where}: " if where else ""
        raise UserError(f"{said}the chat template of {name} {refused}") from None


class _RefusedError(Exception):
    """Why a template cannot write a conversation."""


@functools.lru_cache(maxsize=8192)
def _turn(tokenizer: Any, template: str, prompt: tuple[tuple[tuple[str, str], ...], ...]) -> Turn:
    messages = [dict(message) for message in prompt]

    def written(answer: str) -> str:
        return _written(tokenizer, [*messages, {"role": "assistant", "content": answer}])

    before, mark, after = written(MARK).rpartition(MARK)
    if not mark:
        raise _RefusedError("does not write the answer; give another with --chat-template FILE")
    beginning = _beginning(before, _written(tokenizer, messages, add_generation_prompt=True))
    strips = written(f" {MARK} ") != f"{before} {MARK} {after}"
    return Turn(beginning, before[len(beginning) :], _closing(tokenizer, after), strips)


def _beginning(before: str, asked: str) -> str:
    """Where the answer begins, of what a template writes before a given answer and before one that is to come."""
    if before.startswith(asked):
        more = before[len(asked) :]
        # Blanks before an answer are its first token's, as the model writes them: "Answer:" and " Paris".
        return asked if not more.strip() else before.rstrip(" ")
    if asked.startswith(before):
        more = asked[len(before) :]
        if opened := OPENED.search(more):  # thinking that is to be done: done, with nothing in it
            return f"{before}{more.rstrip()}\n\n</{opened[1]}>\n\n"
        return asked
    return before.rstrip(" ")


def _closing(tokenizer: Any, after: str) -> str:
    """What ends an answer's turn: up to its first control token, or letters; the end token where there is nothing."""
    found = [(after.find(token), token) for token in control_tokens(tokenizer) if token in after]
    if not found:
        return after.rstrip() or str(tokenizer.eos_token)
    at, token = min(found, key=lambda place: (place[0], -len(place[1])))
    return after[:at] + token


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of a tokenizer's control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(dict.fromkeys([*(str(token) for token in added.values()), *map(str, tokenizer.all_special_tokens)]))


def end_ids(tokenizer: Any, turns: Iterable[Turn]) -> list[int]:
    """The ids of the tokens that end an answer: the control tokens of closings, and the tokenizer's end token."""
    control = control_tokens(tokenizer)
    closings = dict.fromkeys(turn.closing for turn in turns if turn.closing.endswith(control))
    return list(dict.fromkeys([*(_ids(tokenizer, closing)[-1] for closing in closings), tokenizer.eos_token_id]))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _written(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    try:
        # Reasoning templates write no thinking for it, and others do not read it.
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, enable_thinking=False, **options))
    except Exception as error:  # whatever a template and jinja raise
        reason = " ".join(str(error).split()) or type(error).__name__
        system = any(message["role"] == "system" for message in messages)
        hint = "; put the system message's text into the first user message" if system else ""
        raise _RefusedError(f"refuses this conversation: {reason}{hint}") from None


class Spelled(NamedTuple):
    """Tokens of a text, and which characters each stands for; None where the tokenizer does not tell."""

    ids: list[int]
    spans: list[tuple[int, int]] | None


def spelled(tokenizer: Any, text: str, contents: Sequence[str]) -> Spelled:
    """A text as tokens, where control tokens that stand in somebody's contents are spelled out as any other text.

    Args:
        contents: what messages say, in their order in the text.
    """
    offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, **({"return_offsets_mapping": True} if offsets else {}))
    ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]] if offsets else None
    control = control_tokens(tokenizer)
    if spans is None or not any(token in content for content in contents for token in control):
        return Spelled(ids, spans)
    inside, at = [], 0
    for content in map(str.strip, contents):
        start = text.find(content, at)
        if start >= 0 and content:
            at = start + len(content)
            inside.append((start, at))
    control_ids = {tokenizer.convert_tokens_to_ids(token) for token in control}
    plain_ids: list[int] = []
    plain_spans: list[tuple[int, int]] = []
    for token, (start, end) in zip(ids, spans, strict=True):
        if token in control_ids and any(first <= start and end <= last for first, last in inside):
            letters = tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            plain_ids += letters
            plain_spans += [(start, end)] * len(letters)
        else:
            plain_ids.append(token)
            plain_spans.append((start, end))
    return Spelled(plain_ids, plain_spans)


def prompt_ids(tokenizer: Any, prompt: Sequence[Message], where: str = "") -> list[int]:
    """The tokens that a model is asked with."""
    contents = [message["content"] for message in prompt]
    return spelled(tokenizer, turn_of(tokenizer, prompt, where).prompt, contents).ids


def reply_of(tokenizer: Any, ids: Sequence[int], turn: Turn, ends: Sequence[int]) -> str:
    """The text of a reply up to its end."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = str(tokenizer.decode(list(ids[:last]), skip_special_tokens=True))
    closing = turn.closing.strip()
    if not closing.endswith(control_tokens(tokenizer)):  # of a template that ends a turn in letters
        text = text.partition(closing)[0]
        if last == len(ids):  # it may have been cut off within them
            begun = next((n for n in range(len(closing) - 1, 0, -1) if text.endswith(closing[:n])), 0)
            text = text[: len(text) - begun]
    return text.strip()
