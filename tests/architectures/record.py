"""Records PyTorch's values: `python tests/architectures/record.py [FAMILY ...]`, all by default.

Needs PyTorch (the extra `bench`). Run it again after a change of an architecture.
"""

import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))

from architecture import RECORDED, fingerprint, problem_of, torch_values_of
from families import FAMILIES


def main(names: list[str]) -> None:
    """Writes the fingerprints of these families, or of all."""
    jax.config.update("jax_enable_x64", True)
    for family in names or FAMILIES:
        prints = {
            name: fingerprint(torch_values_of(architecture, problem_of(architecture)))
            for name, architecture in sorted(FAMILIES[family].items())
        }
        (RECORDED / f"{family}.json").write_text(json.dumps(prints, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
