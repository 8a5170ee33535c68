"""Which way a number is better, and how far it is from there. −50 and 50 are both 50 from 0, though their mean is 0."""

TARGETS = {"zero": 0.0, "chance": 0.5}  # where a number is best, unless lower or higher is always better
WAYS = ("lower", "higher", *TARGETS, "neither")


def away(better: str, value: float) -> float:
    """How much is lacking to the best, less is better: |value − target|, or ± value where there is no best number.

    >>> [away(better, -5.0) for better in WAYS]
    [-5.0, 5.0, 5.0, 5.5, 0.0]
    """
    if better in TARGETS:
        return abs(value - TARGETS[better])
    return {"lower": value, "higher": -value, "neither": 0.0}[better]
