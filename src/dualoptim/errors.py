"""The errors for a user's mistakes."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def one_line(text: object) -> str:
    """A text without characters that break the line or move the cursor, as text from files may have."""
    signs = str(text)
    if signs.isprintable():
        return signs
    return "".join(
        sign if sign.isprintable() or unicodedata.category(sign) == "Zs" else repr(sign)[1:-1] for sign in signs
    )


LONGEST = 1000  # characters of a sentence, which may quote a value of any length


class UserError(ValueError):
    """A mistake of the user's, reported in one sentence: what was found, where, and how to mend it.

    The command line prints it without a traceback and exits with `status`; any other exception is a defect of ours.
    """

    status = 2

    def __init__(self, message: object) -> None:
        said = one_line(message)
        super().__init__(said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} … {said[-LONGEST // 2 :]}")


class NotFiniteError(UserError):
    """A run whose weights are not finite after training."""

    status = 3


# Other trainers' names of settings → our names.
MEANT = {
    "learning_rate": "lr", "max_steps": "steps", "per_device_train_batch_size": "batch_size", "output_dir": "out",
    "model_name_or_path": "model",
}  # fmt: skip


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not among the known ones, with the nearest of those as a hint."""
    names = list(known)
    plain = {each.lstrip("-").replace("-", "_"): each for each in map(str, names)}
    meant = plain.get(MEANT.get(str(name).lstrip("-").replace("-", "_"), ""))
    close = [meant] if meant else difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}" if names else "there are none"
    return UserError(f"{where + ': ' if where else ''}unknown {kind} {name!r}; {hint}")
