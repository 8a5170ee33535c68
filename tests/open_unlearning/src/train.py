"""The stub's command: a random model, four rows of each kind, and the trainer that the config names."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import load_trainer


def rows(start):
    ids = torch.arange(start, start + 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@hydra.main(version_base=None, config_path="../configs", config_name="train.yaml")
def main(cfg):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    data = [{"forget": rows(i), "retain": rows(i + 20)} for i in range(4)]
    trainer = load_trainer(cfg.trainer, model, train_dataset=data)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    state = optimizer.state[model.lm_head.weight]
    steps = {key: int(value) for key, value in state.items() if "step" in key}
    told = {"trainer": type(trainer).__name__, "steps": steps, "lr_scales": optimizer.param_groups[0].get("lr_scales")}
    (Path(cfg.trainer.args.output_dir) / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
