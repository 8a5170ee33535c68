"""Evaluation: `scoring` turns a model into per-sample records, `metrics` turns records into numbers."""
