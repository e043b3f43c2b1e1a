"""Do all calls give the same numbers on several devices? `python -m experiments.modes`."""
