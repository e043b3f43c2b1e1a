"""Experiments: one script per question, `python -m experiments.NAME` (`--help` lists its flags)."""
