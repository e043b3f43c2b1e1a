"""Runs one case: translates it, and compares it with PyTorch."""

from experiments.peers_suite.cases import Case, without_warnings
from experiments.peers_suite.compare import find_differences
from experiments.peers_suite.report import Outcome
from experiments.peers_suite.translate import translate
from experiments.peers_suite.written import CannotBeWrittenError


def run(case: Case) -> Outcome:
    """What came of the case."""
    try:
        with without_warnings():
            wrong = find_differences(case, translate(case))
    except CannotBeWrittenError as reason:
        return Outcome(case.name, reason=str(reason))
    except Exception as error:  # a case that raises is wrong, and no reason to stop
        wrong = [f"raised {type(error).__name__}: {error}"]
    return Outcome(case.name, tuple(wrong))
