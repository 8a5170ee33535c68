"""Records → the numbers of a task that forgets question-answer rows, and for each that is missing, why.

Every number is computed from per-sample records alone, so it can be computed again from a run's records.jsonl. A number
that cannot be computed is None with a reason, and so is every aggregate over it; an aggregate without it has another
name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial, wraps
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from ..errors import UserError
from . import aggregates, metrics
from .judges import Entailment, SentenceEmbedder

Record = Mapping[str, Any]
T = TypeVar("T")
CHOICES = ("real_authors", "world_facts")  # their probability is that of the truth among all answers
NAMES = {"forget": "to forget", "retain": "to keep", "real_authors": "real authors", "world_facts": "world facts"}
NOTES = "notes"  # the set of the record that says why others lack a key
LEAKAGE_K = 0.4  # MUSE's share of tokens in the attack of privacy leakage


class Drawn(dict[str, Any]):
    """A record that many resamples draw. It keeps the scores that are computed from it by functions that are `once`."""

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self.scores: dict[Any, Any] = {}


def once(score: Callable[[Record], T]) -> Callable[[Record], T]:
    """A score of one record, which is computed a single time for one that is `Drawn`."""

    @wraps(score)
    def found(record: Record) -> T:
        if not isinstance(record, Drawn):
            return score(record)
        if score not in record.scores:
            record.scores[score] = score(record)
        return record.scores[score]

    return found


def told(record: Record, key: str) -> list[Any]:
    """A record's values for the tokens of the answer's text, without those that end the answer."""
    values = list(record[key])
    return values[: len(values) - record.get("ended", 1)] or values


ATTACKS: dict[str, Callable[[Record], float]] = {
    "loss": once(lambda r: metrics.membership_loss(r["nll"])),
    # Records of a private run have no text. Those of before lack the bytes.
    "zlib": once(lambda r: -r["nll"] / (r["zlib_bytes"] if "zlib_bytes" in r else metrics.zlib_bytes(r["answer"]))),
    "min_k": once(lambda r: metrics.min_k(told(r, "log_probs"))),
    "min_k_40": once(lambda r: metrics.min_k(told(r, "log_probs"), LEAKAGE_K)),
    "min_k_plus_plus": once(lambda r: metrics.min_k_plus_plus(told(r, "z"))),
    "min_k_plus_plus_40": once(lambda r: metrics.min_k_plus_plus(told(r, "z"), LEAKAGE_K)),
}
ATTACK_NAMES = {
    "loss": "loss", "zlib": "zlib", "reference": "reference", "min_k": "min-k, k 0.2", "min_k_40": "min-k, k 0.4",
    "min_k_plus_plus": "min-k++, k 0.2", "min_k_plus_plus_40": "min-k++, k 0.4", "gradient_norm": "gradient norm",
}  # fmt: skip


class Metric(NamedTuple):
    """How a number is shown: its name in words, which way is better, a format spec, and the table that it is in.

    If a number is a share of a set's records, `share_of` has that set's name, so that differences can be tested, and
    `counted_by` the records' key that says which of them count.
    """

    label: str
    better: str  # "lower", "higher", "zero", "chance" (near 0.5), or "neither" (for comparison)
    format: str = ".0%"
    group: str = ""  # "" for the first table
    share_of: str = ""
    counted_by: str = ""


class Numbers(NamedTuple):
    """A model's numbers, and for each that is None, the reason."""

    numbers: dict[str, float | None]
    missing: dict[str, str]


_OF_SET = {
    "probability": ("probability", "lower", "higher"),
    "rouge_l": ("ROUGE-L", "lower", "higher"),
    "truth_ratio": ("truth ratio", "lower", "higher"),
    "token_entropy": ("token entropy", "higher", "higher"),
    "cosine": ("cosine similarity", "lower", "higher"),
    "entailment": ("entailment", "lower", "higher"),
}

PARAPHRASED = {"forget": "forget_paraphrased", "retain": "retain_paraphrased"}  # sets asked in other words
_OF_PARAPHRASED = {
    "paraphrased_probability": ("probability, paraphrased question", "lower", "higher"),
    "paraphrased_rouge_l": ("ROUGE-L, paraphrased question", "lower", "higher"),
}

METRICS: dict[str, Metric] = {
    "forget_rouge_l": Metric("ROUGE-L, to forget", "lower", ".3f"),
    "extraction_strength": Metric("extraction strength", "lower", ".3f"),
    "forget_quality": Metric("forget quality (p)", "higher", ".2g"),
    "privacy_leakage": Metric("privacy leakage", "zero", ".2f"),
    "efficacy_without_entailment": Metric("UFE without entailment", "higher", ".3f"),
    "utility_without_entailment": Metric("MU without entailment", "higher", ".3f"),
    "tofu_model_utility": Metric("model utility (TOFU)", "higher", ".3f"),
    "perplexity": Metric("perplexity", "lower", ".1f"),
    "untargeted_forget_efficacy": Metric("UFE", "higher", ".3f", "Published aggregates"),
    "targeted_forget_efficacy": Metric("TFE", "higher", ".3f", "Published aggregates"),
    "model_utility": Metric("MU", "higher", ".3f", "Published aggregates"),
    "overall": Metric("OVR", "higher", ".3f", "Published aggregates"),
    **{
        f"{name}_{key}": Metric(label, forget if name == "forget" else kept, ".3f", words[0].upper() + words[1:])
        for name, words in NAMES.items()
        for key, (label, forget, kept) in (_OF_SET | (_OF_PARAPHRASED if name in PARAPHRASED else {})).items()
        if (name, key) != ("forget", "rouge_l")
    },
    "forget_idk_entailment": Metric("entailment of a refusal", "higher", ".3f", "To forget"),
    "forget_rouge_1": Metric("ROUGE-1", "lower", ".3f", "To forget"),
    "tofu_forget_truth_ratio": Metric("truth ratio, TOFU's definition", "higher", ".3f", "To forget"),
    "forget_truth_share": Metric("truth share", "lower", ".3f", "To forget"),
    "exact_memorisation": Metric("exact memorization", "lower", ".3f", "To forget"),
    "forget_quality_statistic": Metric("forget quality (KS distance)", "lower", ".3f", "To forget"),
    **{
        f"auc_{key}": Metric(f"AUC, {ATTACK_NAMES[key]}", "chance", ".3f", "Membership")
        for key in (*ATTACKS, "gradient_norm", "reference")
    },
    "forgotten_probability": Metric("probability", "lower", ".3f", "Forgotten before"),
    "forgotten_rouge_l": Metric("ROUGE-L", "lower", ".3f", "Forgotten before"),
    "held_out_probability": Metric("probability", "higher", ".3f", "Known, and not trained on"),
    "held_out_rouge_l": Metric("ROUGE-L", "higher", ".3f", "Known, and not trained on"),
}

_OVERALL_PARTS = ("model_utility", "untargeted_forget_efficacy", "targeted_forget_efficacy")
_AGGREGATES: dict[str, tuple[Callable[[Mapping[str, float | None]], float | None], Sequence[str]]] = {
    "model_utility": (aggregates.model_utility, aggregates.UTILITY_PARTS),
    "tofu_model_utility": (aggregates.tofu_model_utility, aggregates.TOFU_UTILITY_PARTS),
    "untargeted_forget_efficacy": (aggregates.untargeted_forget_efficacy, aggregates.UNTARGETED_PARTS),
    "targeted_forget_efficacy": (aggregates.targeted_forget_efficacy, aggregates.TARGETED_PARTS),
    "overall": (lambda scores: aggregates.overall(*map(scores.get, _OVERALL_PARTS)), _OVERALL_PARTS),
    "utility_without_entailment": (
        aggregates.utility_without_entailment,
        aggregates.UTILITY_WITHOUT_ENTAILMENT,
    ),
    "efficacy_without_entailment": (
        aggregates.efficacy_without_entailment,
        aggregates.UNTARGETED_WITHOUT_ENTAILMENT,
    ),
}


def judged(
    records: list[dict[str, Any]],
    refusals: Sequence[str],
    embedder: str | None,
    nli: str | None,
    entailing: Collection[str] = ("forget",),
) -> list[dict[str, Any]]:
    """Records with the judgments of other models on their replies, and a last record with what is missing and why.

    Adds ``cosine`` to every reply, ``entailment`` (a label) if there is an NLI model, and for the set "forget"
    ``idk_rouge_l`` and ``idk_entailment`` against a refusal. Replies are compared with a record's ``original_answer``,
    a whole sentence, if it has one.

    Args:
        refusals: one for each record of the set "forget".
        embedder: sentence embedding model; None for the default.
        nli: model of natural language inference; None for none.
        entailing: the sets whose replies must entail the answer; in other sets the answer must entail the reply. Both
            are published: see `judges`.
    """
    replied = [record for record in records if "reply" in record]
    given = [record["reply"] for record in replied]
    wanted = [record.get("original_answer", record["answer"]) for record in replied]
    asked = [record for record in replied if record["set"] == "forget"]
    for record, refusal in zip(asked, refusals, strict=True):
        record["refusal"] = refusal
        record["idk_rouge_l"] = metrics.rouge_l_recall(record["reply"], refusal)
    why: dict[str, str] = {}
    try:
        for record, cosine in zip(replied, SentenceEmbedder(embedder).cosines(given, wanted), strict=True):
            record["cosine"] = round(cosine, 5)
    except UserError as error:
        why["cosine"] = str(error)
    if nli is None:
        why["entailment"] = "no model of natural language inference was given (task_args.nli)"
        return [*records, {"set": NOTES, "missing": why}]
    pairs = [
        (reply, answer) if record["set"] in entailing else (answer, reply)
        for record, reply, answer in zip(replied, given, wanted, strict=True)
    ]
    pairs += [(record["reply"], record["refusal"]) for record in asked]
    try:
        labels = Entailment(nli).labels([premise for premise, _ in pairs], [hypothesis for _, hypothesis in pairs])
    except UserError as error:
        why["entailment"] = str(error)
        return [*records, {"set": NOTES, "missing": why}]
    for record, label in zip(replied, labels[: len(replied)], strict=True):
        record["entailment"] = label
    for record, label in zip(asked, labels[len(replied) :], strict=True):
        record["idk_entailment"] = label
    return [*records, {"set": NOTES, "missing": why}]


def mean(values: Sequence[float]) -> float | None:
    """The mean; None if there are no values."""
    return fmean(values) if values else None


def _mean_of(records: Sequence[Record], key: str) -> float | None:
    return mean([record[key] for record in records])


NO_PASSAGES = "the included passages were not read: the model has too few positions for the longest"


def perplexity(records: Sequence[Record]) -> float | None:
    """The perplexity on the included passages among records; None where they were not read."""
    passages = [r for r in records if r["set"] == "passages"]
    return metrics.perplexity([r["nll"] for r in passages], [r["tokens"] for r in passages]) if passages else None


class Computed:
    """Numbers as they are computed from records, and for each that cannot be computed, why.

    Args:
        records: of one model; ``set`` tells the sets apart.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.sets: dict[str, list[Record]] = {}
        for record in records:
            self.sets.setdefault(record["set"], []).append(record)
        self.notes: dict[str, str] = self.sets.pop(NOTES, [{"missing": {}}])[0]["missing"]
        self.numbers: dict[str, float | None] = {}
        self.missing: dict[str, str] = {}

    def put(self, name: str, compute: Callable[[], float | None], *lacking: str | None) -> None:
        """Compute a number, unless `lacking` has a reason against it, or the metric raises one as a ValueError."""
        reason = next(filter(None, lacking), None)
        try:
            self.numbers[name] = None if reason else compute()
        except UserError:  # records that do not belong together: not an error of one number
            raise
        except ValueError as error:
            self.numbers[name], reason = None, str(error)
        if self.numbers[name] is None:
            self.missing[name] = reason or "some of what it is made of was not computed"

    def put_perplexity(self) -> None:
        """Compute the perplexity on the included passages, where the model read them."""
        passages = self.sets.get("passages", [])
        self.put("perplexity", partial(perplexity, passages), None if passages else NO_PASSAGES)

    def aggregate(
        self, name: str, compute: Callable[[Mapping[str, float | None]], float | None], parts: Sequence[str]
    ) -> None:
        """Compute a number from other numbers, unless one of them is missing."""
        absent = [part for part in parts if self.numbers[part] is None]
        self.put(name, partial(compute, self.numbers), f"needs {absent[0]}, not computed" if absent else None)


def unlearning(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
    """The numbers in `METRICS`.

    Args:
        records: of one model; ``set`` tells the sets apart.
        retrained: the records of a model that never saw the rows to forget, on the sets "forget" and "holdout".
    """
    computed = Computed(records)
    sets, notes, put = computed.sets, computed.notes, computed.put
    for name in NAMES:
        six_metrics(name, sets.get(name, []), notes, put)
    for asked in PARAPHRASED.values():
        part = sets.get(asked, [])
        not_asked = None if part else "no paraphrased questions were asked (paraphrased_question in the task's files)"
        for key in ("probability", "rouge_l"):
            put(f"{asked}_{key}", partial(_mean_of, part, key), not_asked)
    forget = sets.get("forget", [])
    put("forget_idk_entailment", lambda: entailed(forget, "idk_"), lacks(forget, "idk_entailment", notes))
    no_forget = None if forget else "the set forget has no records"
    no_false = None if all(r.get("perturbed_nlls") for r in forget) else "the rows have no false answers beside them"
    put("forget_rouge_1", lambda: mean([r["rouge_1"] for r in forget]), no_forget, lacks(forget, "rouge_1", notes))
    put("tofu_forget_truth_ratio", lambda: metrics.tofu_forget_truth_ratio(_truth_ratios(forget)), no_forget, no_false)
    put("forget_truth_share", lambda: metrics.truth_share(_truth_ratios(forget)), no_forget, no_false)
    for name, none in (
        ("forgotten", "nothing was forgotten before"),
        ("held_out", "no row that the model knows was held out (task_args.held_out_rows)"),
    ):
        for key in ("probability", "rouge_l"):
            put(f"{name}_{key}", partial(_mean_of, sets.get(name, []), key), None if sets.get(name) else none)
    computed.put_perplexity()
    put("extraction_strength", lambda: mean([_extraction_strength(r) for r in forget]))
    put("exact_memorisation", lambda: mean([_exact_memorisation(r) for r in forget]))
    _beside_retrained(sets, retrained, put)
    for name, (compute, parts) in _AGGREGATES.items():
        computed.aggregate(name, compute, parts)
    return Numbers({name: computed.numbers[name] for name in METRICS}, computed.missing)


Put = Callable[..., None]


@once
def _extraction_strength(record: Record) -> float:
    return metrics.extraction_strength(told(record, "top1"))


@once
def _exact_memorisation(record: Record) -> float:
    return metrics.exact_memorisation(told(record, "top1"))


@once
def _normalised_probability(record: Record) -> float:
    return metrics.normalised_probability(record["nll"], record["perturbed_nlls"])


def six_metrics(name: str, records: Sequence[Record], notes: Mapping[str, str], put: Put) -> None:
    """The six metrics of a set; it is one to forget if its name begins with "forget"."""
    empty = None if records else f"the set {name} has no records"
    put(f"{name}_rouge_l", lambda: mean([r["rouge_l"] for r in records]), empty)
    put(f"{name}_token_entropy", lambda: mean([r["token_entropy"] for r in records]), empty)
    put(
        f"{name}_probability",
        lambda: mean([_normalised_probability(r) if name in CHOICES else r["probability"] for r in records]),
        empty,
    )
    aggregate = metrics.forget_truth_ratio if name.startswith("forget") else metrics.retain_truth_ratio
    no_false = None if all(r.get("perturbed_nlls") for r in records) else "the rows have no false answers beside them"
    put(f"{name}_truth_ratio", lambda: aggregate(_truth_ratios(records)), empty, no_false)
    put(
        f"{name}_cosine",
        lambda: mean([metrics.cosine_score(r["cosine"]) for r in records]),
        empty,
        lacks(records, "cosine", notes),
    )
    put(f"{name}_entailment", lambda: entailed(records, ""), empty, lacks(records, "entailment", notes))


def _truth_ratios(records: Sequence[Record]) -> list[float]:
    return [_truth_ratio(record) for record in records]


@once
def _truth_ratio(record: Record) -> float:
    """How much more probable the truth is than false answers: the truth's paraphrase, or the answer if it has none."""
    true = record["paraphrased_nlls"][0] if record.get("paraphrased_nlls") else record["nll"]
    return metrics.truth_ratio_samples([true], [record["perturbed_nlls"]])[0]


def entailed(records: Sequence[Record], which: str) -> float:
    """The entailment score of the replies; with "idk_", that of refusals."""
    return metrics.entailment_score([r[f"{which}entailment"] for r in records], [r[f"{which}rouge_l"] for r in records])


def lacks(records: Sequence[Record], key: str, notes: Mapping[str, str]) -> str | None:
    """Why records lack a key that `judged` adds, if they do."""
    if all(key in record for record in records):
        return None
    return notes.get(key.removeprefix("idk_"), f"the records hold no {key}")


def _beside_retrained(sets: Mapping[str, Sequence[Record]], retrained: Sequence[Record] | None, put: Put) -> None:
    """Numbers that compare with rows that were never seen, or with a model that never saw the rows to forget."""
    forget, holdout = sets.get("forget", []), sets.get("holdout", [])
    compared = (r for r in retrained or () if r["set"] in ("forget", "holdout"))
    gold = {(r["set"], r["question"], r["answer"]): r for r in compared}
    no_model = None if retrained else "no model retrained without the forget set was given (retrained)"
    unseen = None if holdout else "no rows that the model never saw were given (task_args.holdout or holdout_rows)"

    def golden(records: Sequence[Record]) -> list[Record]:
        found = []
        for r in records:
            if (same := gold.get((r["set"], r["question"], r["answer"]))) is None:
                asked = f"{r['question']!r} with the same answer"
                raise UserError(f"the retrained model was not scored on {asked}; score it on the same rows")
            found.append(same)
        return found

    @cache
    def quality() -> metrics.ForgetQuality:
        return metrics.forget_quality(_truth_ratios(forget), _truth_ratios(golden(forget)))

    def area(members: Sequence[Record], others: Sequence[Record], attack: Callable[[Record], float]) -> float:
        return metrics.auc([attack(r) for r in members], [attack(r) for r in others])

    no_test = "the ties of a resample distort a test" if any(isinstance(record, Drawn) for record in forget) else None
    put("forget_quality", lambda: quality().p_value, no_model, no_test)
    put("forget_quality_statistic", lambda: quality().statistic, no_model, no_test)
    for name, attack in ATTACKS.items():
        put(f"auc_{name}", partial(area, forget, holdout, attack), unseen)

    asked = all("gradient_norm" in record for record in (*forget, *holdout))
    not_asked = None if asked else "needs a backward pass a row, which was not asked for (task_args.gradient_norm)"
    put(
        "auc_gradient_norm",
        lambda: area(forget, holdout, lambda r: metrics.membership_gradient_norm(r["gradient_norm"])),
        unseen,
        not_asked,
    )

    def against_reference() -> float:
        scores = [
            [metrics.membership_reference(r["nll"], g["nll"]) for r, g in zip(part, golden(part), strict=True)]
            for part in (forget, holdout)
        ]
        return metrics.auc(*scores)

    put("auc_reference", against_reference, unseen, no_model)

    def leakage() -> float:
        attack = ATTACKS["min_k_40"]
        return metrics.privacy_leakage(area(forget, holdout, attack), area(golden(forget), golden(holdout), attack))

    put("privacy_leakage", leakage, unseen, no_model)
