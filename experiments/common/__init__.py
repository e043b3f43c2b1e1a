"""Helpers of the experiments: data, figures, flags, files and measurements."""
