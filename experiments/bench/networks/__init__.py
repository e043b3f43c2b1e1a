"""The networks, each in the library and in plain JAX, with its data."""
