"""Figures and tables of experiments, from their results.jsonl alone."""
