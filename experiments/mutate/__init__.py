"""Plants mistakes in the library and asks the tests: `python -m experiments.mutate`."""
