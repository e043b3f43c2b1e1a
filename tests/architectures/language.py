"""Networks of text: [N, T] tokens."""

import language_gated
import language_transformers
import language_words

ARCHITECTURES = {
    **language_words.ARCHITECTURES,
    **language_transformers.ARCHITECTURES,
    **language_gated.ARCHITECTURES,
}
