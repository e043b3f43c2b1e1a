"""Networks of sequences: [N, T, I], or tokens [N, T]."""

import sequence_convolutional
import sequence_recurrent

ARCHITECTURES = {**sequence_recurrent.ARCHITECTURES, **sequence_convolutional.ARCHITECTURES}
