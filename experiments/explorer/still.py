"""A still of the page, for documents: the network on the moons, with the chain rule of a weight."""

from pathlib import Path

from experiments.common.browser import MISSING, open_browser
from experiments.common.files import whole

WIDTH, HEIGHT = 1060, 940  # pixels
LEARNT = 0.68  # how far training is, as a share of the slider

PREPARE = """
const part = name => document.querySelector(`#network [data-part=${name}]`);
const slider = part("training").querySelector("input[type=range]");
slider.value = Math.round(arguments[0] * slider.max);
slider.dispatchEvent(new Event("input", {bubbles: true}));
const forward = () => [...part("buttons").querySelectorAll("button")]
  .find(button => button.textContent.startsWith("Forward"));
while (!forward().disabled) forward().click();
document.activeElement.blur();
window.scrollTo(0, document.querySelector("#network").getBoundingClientRect().top + scrollY);
"""


def require_browser() -> list[str]:
    """What is missing for a still, as a list of clauses."""
    if not MISSING:
        return []
    return [f"still needs {' and '.join(MISSING)}: apt-get install chromium chromium-driver"]


def take_still(page: Path, still: Path) -> None:
    """Opens a page, steps to the end of the backward pass, and saves a PNG."""
    with open_browser() as browser:
        browser.resize(WIDTH, HEIGHT)
        browser.open(page)
        browser.run(PREPARE, LEARNT)
        with whole(still) as unfinished:
            browser.screenshot(unfinished, height=HEIGHT)
