"""The sections of the benchmark."""
