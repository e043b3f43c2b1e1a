"""The backward pass as a page that one can touch: `python -m experiments.explorer`.

It writes one HTML file without links, `explorer.html`, which opens from disk in any browser. Its
parts are one perceptron, a network on points in the plane, the rules that carry the error back by
other weights, and a network of your own. All networks are trained and explained here; the page
holds their numbers.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from experiments.common.files import whole
from experiments.common.flags import raise_wrong, wrong_flags
from experiments.explorer import carriers, networks, own, perceptron
from experiments.explorer.page import page
from experiments.explorer.still import require_browser, take_still


@dataclass(frozen=True)
class Config:
    """Makes a page that shows how backpropagation works, with networks that are trained here."""

    digits: bool = False
    """Whether the last part shows a network that reads handwritten digits."""
    run: Path | None = None
    """A Python file that makes `net`, `params`, `inputs` and `targets`; the last part shows them.
    It also makes `loss`, if that is neither the softmax cross-entropy of integers nor the squared
    error."""
    seed: int = 0
    """The seed of the points and of all initial weights."""
    out: Path = Path("out")
    """The folder for the page, explorer.html."""
    still: Path | None = None
    """A file for a picture of the page, a PNG. Needs Chromium and its driver."""


def main(config: Config) -> Path:
    """Makes the page and returns its path."""
    wrong = wrong_flags(seed=config.seed, out=config.out)
    if config.digits and config.run is not None:
        wrong.append("digits and run are both given; the last part shows one network")
    if config.still is not None:
        wrong += require_browser()
        if not config.still.parent.is_dir():
            wrong.append(f"still is {config.still}; there is no folder {config.still.parent}")
    raise_wrong(wrong)
    with jax.enable_x64(True):  # so that gradients agree to the last digits
        run = {
            "own": own.collect(choose(config)),  # first: a file may be wrong
            "perceptron": perceptron.collect(config.seed),
            "networks": networks.collect(config.seed),
            "carriers": carriers.collect(config.seed),
        }
    text = page(run)
    path = config.out / "explorer.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    print(f"page saved as {path}, {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    if config.still is not None:
        take_still(path, config.still)
        print(f"still saved as {config.still}")
    return path


def choose(config: Config) -> own.Network:
    """The network of the last part."""
    if config.run is not None:
        return own.from_file(config.run)
    return own.digits(config.seed) if config.digits else own.lifted(config.seed)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        raise SystemExit(f"explorer: {error}") from None
