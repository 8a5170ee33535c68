"""A stub of open-unlearning's trainers: how its classes are built, called and registered, with losses of its kinds."""

from __future__ import annotations

import copy
import re

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

TRAINER_REGISTRY = {}


def registered(cls):
    TRAINER_REGISTRY[cls.__name__] = cls
    return cls


def load_trainer(trainer_cfg, model, train_dataset=None, evaluators=None, template_args=None):
    arguments = TrainingArguments(**trainer_cfg.args)
    cls = TRAINER_REGISTRY[trainer_cfg.handler]
    return cls(
        model=model,
        train_dataset=train_dataset,
        data_collator=collate,
        args=arguments,
        evaluators=evaluators,
        template_args=template_args,
        **trainer_cfg.get("method_args", {}),
    )


def collate(rows):
    if isinstance(rows[0], dict) and not isinstance(next(iter(rows[0].values())), torch.Tensor):
        return {key: collate([row[key] for row in rows]) for key in rows[0]}
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def log_probs(model, rows):
    """Σ log p of each row's labels, (B,)."""
    logits, labels = model(**rows).logits[:, :-1], rows["labels"][:, 1:]
    return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1)


@registered
class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        super().__init__(*args, **kwargs)


@registered
class GradAscent(FinetuneTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs["forget"])
        return (-outputs.loss, outputs) if return_outputs else -outputs.loss


@registered
class GradDiff(FinetuneTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
        self.ref_model = copy.deepcopy(self.model).eval()

    def compute_retain_loss(self, model, retain_inputs):
        outputs = model(**retain_inputs)
        if self.retain_loss_type == "NLL":
            return outputs.loss
        with torch.no_grad():
            reference = self.ref_model(**retain_inputs).logits.log_softmax(-1)
        return F.kl_div(outputs.logits.log_softmax(-1), reference, reduction="batchmean", log_target=True)

    def forget_loss(self, model, forget):
        return -model(**forget).loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.gamma * self.forget_loss(model, inputs["forget"])
        retain = {key: inputs["retain"][key] for key in ("input_ids", "attention_mask", "labels")}
        loss = loss + self.alpha * self.compute_retain_loss(model=model, retain_inputs=retain)
        return (loss, {}) if return_outputs else loss


@registered
class NPO(GradDiff):
    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def ratio(self, model, rows):
        with torch.no_grad():
            reference = log_probs(self.ref_model, rows)
        return log_probs(model, rows) - reference

    def forget_loss(self, model, forget):
        return -2 / self.beta * F.logsigmoid(-self.beta * self.ratio(model, forget)).mean()


@registered
class DPO(NPO):
    def forget_loss(self, model, forget):
        margin = self.ratio(model, forget["alternate"]) - self.ratio(model, forget["original"])
        return -2 / self.beta * F.logsigmoid(self.beta * margin).mean()


@registered
class RMU(GradDiff):
    """Trains some parameters alone, which are all that require gradients while the optimizer is made."""

    def create_optimizer(self):
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = bool(re.fullmatch(r".*layers\.0\.mlp\.down_proj\.weight", name))
        super().create_optimizer()
        for parameter in self.model.parameters():
            parameter.requires_grad = True


@registered
class PDU(GradDiff):
    """Weighs by multipliers of its own, the second of which follows the loss to retain."""

    def __init__(self, retain_loss_eps=0.0, primal_dual=False, dual_step_size=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.preferences, self.loss_names = [self.gamma, self.alpha], ["forget_loss", "retain_loss"]
        self.retain_loss_eps, self.primal_dual, self.dual_step_size = retain_loss_eps, primal_dual, dual_step_size
        self.can_update = True

    def final_loss_value(self, losses):
        over = losses[1] - self.retain_loss_eps
        loss = (torch.tensor(self.preferences) * torch.hstack([losses[0], over])).sum()
        if self.primal_dual and self.can_update:
            self.preferences[1] = max(0, self.preferences[1] + self.dual_step_size * over.item())
        self.log({name: part.item() for name, part in zip(self.loss_names, losses, strict=True)})
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs["forget"]).logits
        forget = ((logits.max(-1).values - logits.mean(-1)) ** 2).mean()
        retain = self.compute_retain_loss(model=model, retain_inputs=inputs["retain"])
        return self.final_loss_value([forget, retain])
