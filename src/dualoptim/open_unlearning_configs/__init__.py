"""Hydra's configs for open-unlearning, on its search path as ``pkg://dualoptim.open_unlearning_configs``."""
