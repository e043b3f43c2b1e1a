"""What the flags of a gradient descent must be, said before any work is done."""


def require_flags(name, *, seed, learning_rate, steps, out):
    """Ends the program with a message if a flag is wrong, or if nothing can be written to `out`."""
    if not 0 <= seed < 2**32:
        raise SystemExit(f"{name}: seed is {seed}; it takes an integer in [0, 2^32).")
    if not 0 < learning_rate <= 1000:
        raise SystemExit(
            f"{name}: learning-rate is {learning_rate}; it takes a number in (0, 1000]."
        )
    if steps < 1:
        raise SystemExit(f"{name}: steps is {steps}; it takes at least 1.")
    taken = next(path for path in (out, *out.parents) if path.exists())
    if not taken.is_dir():
        raise SystemExit(f"{name}: out takes a directory: {taken} is a file.")
