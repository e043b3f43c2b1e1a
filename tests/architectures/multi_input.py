"""Networks of several inputs, or of sets."""

import multi_input_pairs
import multi_input_questions
import multi_input_sets
import multi_input_translation

ARCHITECTURES = {
    **multi_input_translation.ARCHITECTURES,
    **multi_input_pairs.ARCHITECTURES,
    **multi_input_questions.ARCHITECTURES,
    **multi_input_sets.ARCHITECTURES,
}
