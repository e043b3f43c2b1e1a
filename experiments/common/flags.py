"""What the flags of a gradient descent must be, said before any work is done."""


def wrong_flags(*, seed, out, learning_rate=None, steps=None):
    """What is wrong with those that are given, or with writing to `out`: a list of clauses."""
    wrong = []
    if not 0 <= seed < 2**32:
        wrong.append(f"seed is {seed}; it takes an integer in [0, 2^32)")
    if learning_rate is not None and not 0 < learning_rate <= 1000:
        wrong.append(f"learning-rate is {learning_rate}; it takes a number in (0, 1000]")
    if steps is not None and steps < 1:
        wrong.append(f"steps is {steps}; it takes at least 1")
    taken = next(path for path in (out, *out.parents) if path.exists())
    if not taken.is_dir():
        wrong.append(f"out takes a directory: {taken} is a file")
    return wrong


def require_flags(name, *, seed, learning_rate, out, steps=None):
    """Ends the program with a message if a flag is wrong, or if nothing can be written to `out`."""
    wrong = wrong_flags(seed=seed, out=out, learning_rate=learning_rate, steps=steps)
    if wrong:
        raise SystemExit(f"{name}: {wrong[0]}.")
