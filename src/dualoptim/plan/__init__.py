"""What fits where: the memory and communication of an unlearning step, from a model's configuration alone."""

from .memory import BYTES, Need, Step, needed
from .run import of_run, passes
from .setting import Setting, how, ladder, rows_at_once
from .table import fitting, parse_size, show, size_text
from .tracing import Held, Part, Size, trace

__all__ = [
    "BYTES", "Held", "Need", "Part", "Setting", "Size", "Step", "fitting", "how", "ladder", "needed", "of_run",
    "parse_size", "passes", "rows_at_once", "show", "size_text", "trace",
]  # fmt: skip
