"""What others are shown of a run's settings, in a signed record and on a model's card: no folders and no names.

How a setting is shown stands at its field in `dualoptim.config.RunConfig`. A setting that says nothing is shown if it
holds no text, and withheld if it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ..config import AS_IS, COUNTED, DATA, NAMED, NESTED, PATH, START, RunConfig
from ..evaluation.words import replaced
from ..reading import FILE_SUFFIX, HUB

WITHHELD = "withheld"
_HOW = {name: field.metadata["shown"] for name, field in RunConfig.__dataclass_fields__.items()}


def recipe(config: Mapping[str, Any], private: bool) -> dict[str, Any]:
    """A run's settings, without the folders of files and without what may name a person."""
    return {key: setting(key, value, private) for key, value in config.items()}


def setting(key: str, value: Any, private: bool) -> Any:
    """A setting's value as others are shown it."""
    return _shown(_HOW.get(key, ""), value, private)


def _shown(how: str, value: Any, private: bool) -> Any:
    if how == AS_IS or not _has_text(value):
        return value
    if how == NESTED:
        is_whole = isinstance(value, Mapping)  # whose keys are the names of the task's arguments
        return {k: _argument(v, private) for k, v in value.items()} if is_whole else _argument(value, private)
    if how == COUNTED:
        return _number_of(value)
    if how == NAMED and isinstance(value, list):
        return [_shown(NAMED, each, private) for each in value]
    if how == START:
        return _last(value, perhaps_hub=True)
    if how == NAMED and re.fullmatch(r"[\w-]+", value) and not Path(value).is_file():
        return value
    if how not in (PATH, DATA, NAMED) or private:
        return WITHHELD
    # A file named "folder/rows.jsonl" could be a data set of the hub by its form alone.
    return _last(value, perhaps_hub=how == DATA and not FILE_SUFFIX.fullmatch(Path(value).suffix))


def _argument(value: Any, private: bool) -> Any:
    """A value among a task's arguments, of any depth."""
    if isinstance(value, Mapping):
        return WITHHELD if private else {key: _argument(each, private) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        # Lists of texts are what a task forgets or keeps, such as names of people, which hashes would not hide.
        is_of_texts = any(isinstance(each, str) for each in value)
        return _number_of(value) if is_of_texts else [_argument(each, private) for each in value]
    if not isinstance(value, str):
        return value
    return WITHHELD if private else _last(value, perhaps_hub=not FILE_SUFFIX.fullmatch(Path(value).suffix))


def _has_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)  # its keys are texts
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(map(_has_text, value)))


def _number_of(texts: Sequence[Any]) -> str:
    return f"{WITHHELD}: {len(texts)} texts"


def _last(value: str, *, perhaps_hub: bool) -> str:
    """The last part of a path, of whichever system; a name of the hub, and a text that is no path, as it is."""
    if perhaps_hub and HUB.fullmatch(value) and not value.startswith(".") and not Path(value).exists():
        return value
    return PureWindowsPath(value).name or WITHHELD if re.search(r"[/\\]", value) else value


def sentence(text: str, config: Mapping[str, Any], private: bool) -> str:
    """A sentence of a run's results, with settings in it as others are shown them."""
    changed: dict[str, str] = {}
    for key, value in config.items():
        found = dict(_texts(_HOW.get(key, ""), value, private))
        # In a sentence, the a of --out a is a word. Other short texts may be names of people.
        changed |= {was: now for was, now in found.items() if key != "out" or len(was) > 2}
    for was in sorted(changed, key=len, reverse=True):
        text = replaced(text, was, changed[was])
    return text


def _texts(how: str, value: Any, private: bool) -> Iterator[tuple[str, str]]:
    """The texts in a setting, each with what is shown of it; those in a list are withheld, unless they are names."""
    if how == AS_IS:
        return
    if isinstance(value, str):
        yield value, str(_shown(how, value, private))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(how, each, private)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(NAMED if how == NAMED else "", each, private)


def notes(notes: Sequence[str], config: Mapping[str, Any], private: bool) -> list[str]:
    """The results' notes as others are shown them; for a private run, only how many there are."""
    if private:
        return [f"The results have notes ({len(notes)}), withheld since the run is private."] if notes else []
    return [sentence(note, config, private) for note in notes]
