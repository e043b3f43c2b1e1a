"""Experiments: one script a question, run as `python -m experiments.<name>` (see each `--help`)."""
