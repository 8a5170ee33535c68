"""Signed records of what a run measured: their contents (`evidence`, `measured`), envelope (`signing`) and check."""
