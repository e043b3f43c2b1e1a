"""The figures that experiments/README.md quotes: `python -m experiments.quote`."""
