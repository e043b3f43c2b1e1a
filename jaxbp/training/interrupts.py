"""Interrupts: Ctrl-C and SIGTERM end a run of `fit` after the current step, not inside it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jaxbp.training.state import TrainState

__all__ = ["Interrupted"]


class Interrupted(KeyboardInterrupt):
    """A run of `fit` was interrupted by Ctrl-C or SIGTERM; it ended its step first.

    Attributes:
      epoch: the epoch that was not finished, counted from 1.
      state: the state after the last step.
      records: the records of the epochs before.
    """

    def __init__(self, epoch: int, state: TrainState, records: list[dict[str, Any]], stored: bool):
        """Takes the attributes in their order, and whether a checkpoint was stored."""
        again = "The same call goes on from its checkpoint" if stored else "Its last state is in"
        rest = "." if stored else " this error's `state`."
        super().__init__(f"fit: interrupted in epoch {epoch}. {again}{rest}")
        self.epoch, self.state, self.records = epoch, state, records


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Notes the first SIGINT or SIGTERM in the list that it yields; a second acts as always.

    Python delivers signals to the main thread only. In another thread nothing is noted.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {}

    def note(number, frame):
        del frame
        noted.append(number)
        give_back()

    def give_back():
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        give_back()
