"""Networks of tables: rows of numbers [N, I], and categories, which are integers."""

import tabular_categories
import tabular_plain

ARCHITECTURES = {**tabular_plain.ARCHITECTURES, **tabular_categories.ARCHITECTURES}
