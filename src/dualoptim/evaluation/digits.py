"""Numbers as they are shown, and as they are compared with a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal


def below(value: float, limit: float) -> bool:
    """Whether a number is less than a limit by more than what computing the two has rounded; False for NaN.

    >>> 16 / 40 > 14 / 40 + 0.05, below(14 / 40 + 0.05, 16 / 40), below(14 / 40 + 0.05, 17 / 40)
    (True, False, True)
    """
    return value < limit and not _same(value, limit)


def at_least(value: float, limit: float) -> bool:
    """Whether a number is a limit or more, or less by what computing the two has rounded; False for NaN."""
    return value >= limit or _same(value, limit)


def _same(value: float, limit: float) -> bool:
    return math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-9)


def text(value: float, spec: str) -> str:
    """A number as it is shown. A share that is not exactly none or all is not shown as that.

    >>> text(1 / 280, ".0%"), text(199 / 200, ".0%"), text(1.0, ".0%"), text(0.0004, ".1%")
    ('<1%', '>99%', '100%', '<0.1%')
    >>> text(65.54, ".1f"), text(4.6e299, ".1f")
    ('65.5', '4.6e+299')
    """
    if abs(value) >= 1e15 and spec.endswith("f"):  # of a broken model; all its digits would fill the page
        spec = f"{spec[:-1]}e"
    shown = format(value, spec)
    if not spec.endswith("%") or not 0 < value < 1 or float(shown[:-1]) not in (0, 100):
        return shown
    least = 10.0 ** -len(shown[:-1].partition(".")[2])
    return f"<{least:g}%" if value < 0.5 else f">{100 - least:g}%"


def beside(value: float, is_within: Callable[[float], bool]) -> str:
    """A share with as many digits as it takes to be on the same side of a bound as what is shown.

    >>> beside(0.054, lambda share: share <= 0.05), beside(0.051, lambda share: share <= 0.1)
    ('5.4%', '5%')
    >>> beside(0.004, lambda share: share <= 0.0), beside(0.9975, lambda share: share >= 0.9)
    ('0.4%', '>99%')
    """
    shown = ""
    for places in range(16):
        shown = text(value, f".{places}%")
        number = float(Decimal(shown.strip("<>%")).scaleb(-2))
        may_be = {"<": (0.0, number), ">": (number, 1.0)}.get(shown[0], (number,))
        if all(is_within(share) == is_within(value) for share in may_be):
            break
    return shown


def given(share: float) -> str:
    """A share that somebody chose, with the digits that they gave.

    >>> given(0.125), given(0.07), given(1.0), given(0.0)
    ('12.5%', '7%', '100%', '0%')
    """
    return f"{Decimal(repr(float(share))).scaleb(2).normalize():f}%"
