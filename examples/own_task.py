"""A task of your own: answer politely, and stay right. `dualoptim compare --recipe examples/own_task.yaml`."""

from dualoptim.data import asset, question
from dualoptim.evaluation.numbers import Metric, Numbers, mean
from dualoptim.evaluation.scoring import replies
from dualoptim.tasks import Task

POLITE = "With pleasure:"


class Polite(Task):
    """Two objectives, the rows of each, and one number for each."""

    name = "polite"
    followed = "replies"
    metrics = {
        "polite": Metric("polite replies", "higher", share_of="polite"),
        "right": Metric("facts answered", "higher", share_of="facts"),
    }
    curves = {"polite": "Polite ↑", "facts": "Right ↑"}  # what is drawn while it trains
    losses = {"polite": "GD", "facts": "GD"}  # one of dualoptim.losses.LOSSES for each objective

    def __init__(self, rows=40, scored=20):
        general = [question(r["question"], f"{POLITE} {r['answer']}") for r in asset("general.jsonl")]
        facts = asset("facts.jsonl")
        self.objectives = {
            "polite": general[:rows],
            "facts": [question(ask, fact["statement"]) for fact in facts[:rows] for ask in fact["train"]],
        }
        self.held_out = {
            "polite": [(row.question, [POLITE]) for row in general[rows:][:scored]],
            "facts": [(fact["test"][0], [fact["answer"], *fact["aliases"]]) for fact in facts[:scored]],
        }

    def score(self, model, tokenizer):
        return [r for name in self.held_out for r in self._ask(model, tokenizer, name, self.held_out[name])]

    prepare = score  # nothing to settle by what the model knows

    def _ask(self, model, tokenizer, name, pairs):
        asks = [({"role": "user", "content": text},) for text, _ in pairs]
        given = replies(model, tokenizer, asks, max_new_tokens=24)
        return [
            {"set": name, "question": text, "answer": wanted[0], "reply": reply, "met": any(w in reply for w in wanted)}
            for (text, wanted), reply in zip(pairs, given, strict=True)
        ]

    @staticmethod
    def numbers(records, retrained=None):
        met = {name: mean([float(r["met"]) for r in records if r["set"] == name]) for name in ("polite", "facts")}
        return Numbers({"polite": met["polite"], "right": met["facts"]}, {})

    def follow(self, model, tokenizer):
        found = {name: self._ask(model, tokenizer, name, pairs[:6]) for name, pairs in self.held_out.items()}
        return {name: mean([float(r["met"]) for r in part]) for name, part in found.items()}
