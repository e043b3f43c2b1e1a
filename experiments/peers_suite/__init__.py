"""PyTorch's own module cases, written with this library: `python -m experiments.peers_suite`."""
