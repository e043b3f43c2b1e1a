"""Random networks against autodiff and the loop over examples: `python -m experiments.fuzz`."""
