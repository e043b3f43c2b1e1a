"""Rules: which weights carry the error back.

`feedback` has the rules that replace weight matrices. `direct` has the rule that sends the output
error directly to every block. `credit` has the rules for recurrent layers that work forward in
time. `angles` measures how far a rule's backward pass is from the exact one.

A rule makes, chooses and updates the tree that `backward` reads. It may know layers and signals; no
layer knows a rule. A new rule goes into one of the first three modules.
"""

from jaxbp.rules.angles import Alignment as Alignment
from jaxbp.rules.angles import alignment as alignment
from jaxbp.rules.credit import eprop as eprop
from jaxbp.rules.credit import rtrl as rtrl
from jaxbp.rules.credit import snap1 as snap1
from jaxbp.rules.direct import DirectState as DirectState
from jaxbp.rules.direct import direct_feedback as direct_feedback
from jaxbp.rules.feedback import Magnitudes as Magnitudes
from jaxbp.rules.feedback import MirrorState as MirrorState
from jaxbp.rules.feedback import exact as exact
from jaxbp.rules.feedback import kolen_pollack as kolen_pollack
from jaxbp.rules.feedback import random_feedback as random_feedback
from jaxbp.rules.feedback import sign_symmetric as sign_symmetric
from jaxbp.rules.feedback import weight_mirror as weight_mirror
