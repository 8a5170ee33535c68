"""Numbers as they are shown."""

from __future__ import annotations


def text(value: float, spec: str) -> str:
    """A number as it is shown. A share that is not exactly none or all is not shown as that.

    >>> text(1 / 280, ".0%"), text(199 / 200, ".0%"), text(1.0, ".0%"), text(0.0004, ".1%")
    ('<1%', '>99%', '100%', '<0.1%')
    """
    shown = format(value, spec)
    if not spec.endswith("%") or not 0 < value < 1 or float(shown[:-1]) not in (0, 100):
        return shown
    least = 10.0 ** -len(shown[:-1].partition(".")[2])
    return f"<{least:g}%" if value < 0.5 else f">{100 - least:g}%"
