"""The losses, to forget and to retain.

Each loss is a small frozen class whose instance is called as ``loss(model, batch, reference)`` and gives a scalar.
`batch` is a mapping of ``input_ids``, ``labels`` and ``attention_mask`` (B, T), with labels −100 where nothing is
learned. ``batch["idk"]`` is a mapping of the same kind with the same questions, for the losses that need it: their
answers are refusals (`needs_idk`), or other answers that the model itself wrote (`needs_alternates`). Either may hold
``position_ids`` (B, T), a custom attention mask (B, 1, T, T), and ``reference_log_probs`` (B,), log π_ref(y|x) computed
once. A batch of rows from several sources has ``groups`` (B,), each row's source, counted from 0. `reference` is a
frozen model for the losses that need one (`needs_reference`), else None. `docs/methods.md` lists all losses and how
they differ from their papers.

Letters: B sequences in a batch, T tokens in a sequence, V vocabulary, N labeled tokens in the batch, d width of the
hidden states, y an answer, x its question, |y| its tokens, π the model, π_ref the reference, p_t = π(y_t | x, y_<t);
log π(y|x) sums over the answer's tokens.
"""

from __future__ import annotations

from .base import IGNORED, Batch, Labelled, Loss, labelled, sequence_log_probs
from .forget import CEU, DPO, GA, IDK, ME, NPO, RMU, UNDIAL, WGA, AltPO, JensUn, LogitMargin, SatImp, SimNPO
from .retain import AP, GD, JSD, KL, RMURetain

LOSSES: dict[str, type[Loss]] = {
    cls.__name__: cls
    for cls in (
        *(GA, WGA, SatImp, NPO, SimNPO, DPO, AltPO, IDK, JensUn, ME, LogitMargin, CEU, UNDIAL, RMU),
        *(GD, KL, JSD, AP, RMURetain),
    )
}

__all__ = [
    "AP",
    "CEU",
    "DPO",
    "GA",
    "GD",
    "IDK",
    "IGNORED",
    "JSD",
    "KL",
    "LOSSES",
    "ME",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "AltPO",
    "Batch",
    "JensUn",
    "Labelled",
    "LogitMargin",
    "Loss",
    "RMURetain",
    "SatImp",
    "SimNPO",
    "labelled",
    "sequence_log_probs",
]
