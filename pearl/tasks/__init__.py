"""Benchmarks that a pair of models is measured on: problems, prompts and scoring. Knows no model and no tensor."""
