"""Findings and the report that lists them."""

import math
from typing import NamedTuple

__all__ = ["Finding", "Report"]

AUTODIFF_TOLERANCE = 1e-10


class Finding(NamedTuple):
    """One comparison of a check.

    Attributes:
      what: the parameter, by its path, the inputs or the outputs.
      witness: what it was compared with, such as `autodiff`; the module has the list.
      error: the largest difference, relative to the size of the expected values; inf where there is
        nothing to compare, because the contract is broken.
      tolerance: the largest error that is accepted.
      problem: if something is wrong, a sentence that says what to do, where one is known.
    """

    what: str
    witness: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance; an error of nan is not."""
        return self.error <= self.tolerance


class Report(NamedTuple):
    """The result of a check. Prints as a table.

    Attributes:
      name: the name of the layer or loss.
      findings: one for each quantity and witness.
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every finding is ok."""
        return all(finding.ok for finding in self.findings)

    @property
    def largest_error(self) -> float:
        """The largest error against autodiff; inf if a broken contract left nothing to compare."""
        errors = [f.error for f in self.findings if f.witness == "autodiff"]
        return max(errors, default=0.0 if self.ok else math.inf)

    def raise_if_wrong(self) -> "Report":
        """Returns the report, or raises an `AssertionError` with every finding that is not ok."""
        wrong = [finding for finding in self.findings if not finding.ok]
        if wrong:
            raise AssertionError(f"check failed\n{Report(self.name, tuple(wrong))}")
        return self

    def __str__(self) -> str:
        width = max(len(finding.what) for finding in self.findings)
        lines = [f"{self.name}: {'right' if self.ok else 'WRONG'}"]
        for f in self.findings:
            row = f"  {'ok   ' if f.ok else 'WRONG'}  {f.what:{width}}  {f.witness:18}"
            if f.error != math.inf:
                row += f"  {f.error:8.1e} (at most {f.tolerance:.0e})"
            lines += [row.rstrip(), *([f"         {f.problem}"] if f.problem else [])]
        return "\n".join(lines)


def broken(what: str, witness: str, problem: str) -> Finding:
    """The finding that a contract is broken, so that there is nothing to compare."""
    return Finding(what, witness, math.inf, 0.0, problem)
