"""Batches whose iterator has a state, as those of grain have, for the tests of checkpoints."""


class StopError(Exception):
    """What a callback or an iterator raises to stop a run."""


class Resumable:
    """Batches that go on from the state of their iterator: how many it has given, and a label.

    Attributes:
      batches: what is given.
      label: bytes behind the number in a state.
      stop_after: how many batches may be drawn, in all epochs, before a StopError.
      drawn: the position of each batch that was drawn, counted from 1.
      restored: each state that an iterator was set to.
    """

    def __init__(self, batches, label=b"", stop_after=None):
        self.batches, self.label, self.stop_after = batches, label, stop_after
        self.drawn, self.restored = [], []

    def __iter__(self):
        return _Iterator(self)


class _Iterator:
    def __init__(self, source):
        self.at, self.source = 0, source

    def __iter__(self):
        return self

    def __next__(self):
        if len(self.source.drawn) == self.source.stop_after:
            raise StopError
        if self.at == len(self.source.batches):
            raise StopIteration
        self.at += 1
        self.source.drawn.append(self.at)
        return self.source.batches[self.at - 1]

    def get_state(self):
        return bytes([self.at]) + self.source.label

    def set_state(self, state):
        self.source.restored.append(state)
        self.at = state[0]
