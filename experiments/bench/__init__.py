"""The benchmark: `python -m experiments.bench`."""
