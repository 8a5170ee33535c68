"""results.json → one offline HTML page, and the same tables and sentences for the terminal and the model card."""

from .console import terminal
from .entries import ARROWS, Start, asked, columns, head, interval, label, setting_text, starts, text
from .findings import brought_back, headline, not_computed, not_shown, remarks, seen, verdict, verdicts
from .html import MADE, chapter, check_file, curves, heat_map, page, write
from .pictures import looks
from .tables import against_alone, attacks, cost, details, merging, over_seeds, rows, turned

__all__ = [
    "ARROWS", "MADE", "Start", "against_alone", "asked", "attacks", "brought_back", "chapter", "check_file", "columns",
    "cost", "curves", "details", "head", "headline", "heat_map", "interval", "label", "looks", "merging",
    "not_computed", "not_shown", "over_seeds", "page", "remarks", "rows", "seen", "setting_text", "starts", "terminal",
    "text", "turned", "verdict", "verdicts", "write",
]  # fmt: skip
