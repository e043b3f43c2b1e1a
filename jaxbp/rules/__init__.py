"""Rules: which weights carry the error back.

`feedback` has the rules that replace weight matrices. `direct` has the rule that sends the output
error directly to every block. `credit` has the rules for recurrent layers that work forward in
time. `angles` measures how far a rule's backward pass is from the exact one.

A rule makes, chooses and updates the tree that `backward` reads. It may know layers and signals; no
layer knows a rule. A new rule goes into one of the first three modules.
"""

from jaxbp.rules import angles, credit, direct, feedback
from jaxbp.rules.angles import *
from jaxbp.rules.credit import *
from jaxbp.rules.direct import *
from jaxbp.rules.feedback import *

__all__ = [
    *angles.__all__,
    *credit.__all__,
    *direct.__all__,
    *feedback.__all__,
]
