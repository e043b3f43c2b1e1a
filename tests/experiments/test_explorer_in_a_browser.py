"""The page in a browser: it loads without errors, and what one touches does what it says."""

import json

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import jaxbp as bp
from experiments import perceptron as unit
from experiments.common.browser import MISSING, open_browser
from experiments.explorer import __main__ as command
from experiments.explorer import carriers, networks, own, page, perceptron
from experiments.explorer.still import HEIGHT, WIDTH, take_still

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {' and no '.join(MISSING)}: apt-get install chromium chromium-driver",
    ),
]
SECTIONS = "perceptron", "network", "carriers", "own"


@pytest.fixture(scope="module")
def small_page(tmp_path_factory):
    """A page with two problems, few stages and steps."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(own, "EXAMPLES", 2)
        patch.setattr(networks, "STAGES", 5)
        patch.setattr(carriers, "learn", learned)
        problems = networks.problems(0)
        two = {name: problems[name]._replace(hidden=(3, 2), steps=40) for name in ("xor", "moons")}
        patch.setattr(networks, "problems", lambda seed: two)
        runs = [{"name": name, **networks.record(problem, 0)} for name, problem in two.items()]
        run = {
            "perceptron": perceptron.collect(0),
            "networks": runs,
            "carriers": carriers.collect(0),
            "own": own.collect(own.lifted(0)),
        }
        path = tmp_path_factory.mktemp("page") / "explorer.html"
        path.write_text(page.page(run), encoding="utf-8")
    return path, run


def learned(problem, blocks, rule, seed, stages):
    """In the place of training by a rule: curves of the right shapes."""
    del problem, rule, seed
    points = carriers.STEPS // carriers.EVERY + 1
    size = len(stages), networks.GRID, networks.GRID
    return {
        "error": np.linspace(1, 0, points),
        "accuracy": np.linspace(0.5, 1, points),
        "angles": np.full((points, len(blocks)), 30.0),
        "regions": np.zeros(size, np.uint8),
    }


@pytest.fixture(scope="module")
def browser():
    with open_browser() as own_browser:
        yield own_browser


@pytest.fixture
def opened(browser, small_page):
    """The page at the width of a desk, just loaded."""
    browser.resize(1200, 2000)
    browser.messages()
    browser.open(small_page[0])
    assert browser.run("return document.documentElement.dataset.ready") == "true"
    yield browser
    assert browser.messages() == []


def numbers(browser, selector, attribute):
    """The numbers of an attribute of all elements of a selector."""
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.dataset[arguments[1]])"
    return [float(value) for value in browser.run(script, selector, attribute)]


def of_section(browser, section, part):
    return browser.run(
        "return document.querySelector(arguments[0]).textContent",
        f"#{section} [data-part={part}]",
    )


def state_of(browser):
    """The weights w, the points and the picked point that the first part draws."""
    script = "return document.querySelector('#perceptron [data-state]').dataset.state"
    return json.loads(browser.run(script))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_and_has_no_errors(opened, width, dark):
    opened.resize(width, 900, dark=dark)
    assert opened.run("return document.documentElement.scrollWidth") <= width
    for section in SECTIONS:
        script = "return document.getElementById(arguments[0]).getBoundingClientRect().height"
        assert opened.run(script, section) > 300
    # Every button says what it does, and is large enough for a finger.
    assert opened.run("""
      return [...document.querySelectorAll("button, [role=button]")].every((b) =>
        (b.textContent.trim() || b.getAttribute("aria-label"))
        && (b.tagName !== "BUTTON" || b.getBoundingClientRect().height >= 36));
    """)


def test_steps_follow_the_path_of_the_library_and_rewind(opened, small_page):
    run = small_page[1]["perceptron"]
    for k in range(3):
        here, there = (
            numbers(opened, f"#perceptron [data-{name}]", name) for name in ("mean", "library")
        )
        np.testing.assert_allclose(here, run["gradients"][k], rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(there, run["gradients"][k])
        opened.click("[data-do=step-all]")
    assert "Steps so far: 3" in of_section(opened, "perceptron", "status")
    opened.click("[data-do=step-one]")
    assert numbers(opened, "#perceptron [data-library]", "library") == []
    opened.click("[data-do=rewind]")
    assert "Steps so far: 0" in of_section(opened, "perceptron", "status")
    here = numbers(opened, "#perceptron [data-mean]", "mean")
    np.testing.assert_allclose(here, run["gradients"][0], rtol=1e-12, atol=1e-14)


def test_run_goes_on_until_pause(opened):
    opened.click("[data-do=run]")
    opened.command("/timeouts", script=5000)
    opened.command("/execute/async", script="setTimeout(arguments[0], 700)", args=[])
    opened.click("[data-do=run]")
    steps = int(of_section(opened, "perceptron", "status").split(".")[0].split(": ")[1])
    assert steps > 2


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_drag_moves_the_line_and_the_printed_gradient_is_the_librarys(opened, small_page, kind):
    """The line follows the pointer: it goes through the place to which a handle was dragged."""
    for handle, by in (("nth-child", (40, -30)), ("nth-last-child", (-20, -50))):
        selector = f"#perceptron .handle:{handle}(1 of .handle)"
        before, place = state_of(opened)["w"], centre_of(opened, selector) + by
        opened.drag(selector, *by, kind=kind)
        assert state_of(opened)["w"] != before
        assert distance_of_line(opened, *place) < 1.5  # a pointer is at whole pixels
        check_gradient(opened, small_page)


def centre_of(browser, selector):
    """The place of an element on the screen, in pixels."""
    script = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2]"""
    return np.array(browser.run(script, selector))


def distance_of_line(browser, x, y):
    """How far the drawn line is from a place on the screen, in pixels."""
    script = """
      const line = document.querySelector("#perceptron .boundary"), to = line.getScreenCTM();
      return [["x1", "y1"], ["x2", "y2"]].map(([x, y]) => {
        const end = new DOMPoint(+line.getAttribute(x), +line.getAttribute(y)).matrixTransform(to);
        return [end.x, end.y];
      });"""
    first, second = np.array(browser.run(script))
    normal = np.array([first[1] - second[1], second[0] - first[0]])
    return abs(normal @ (np.array([x, y]) - first)) / np.linalg.norm(normal)


def test_a_dragged_point_has_the_gradient_of_its_new_place(opened, small_page):
    before = numbers(opened, "#perceptron [data-gradient]", "gradient")
    opened.drag("#perceptron .picked", -35, 20)
    assert numbers(opened, "#perceptron [data-gradient]", "gradient") != before
    check_gradient(opened, small_page)


def test_what_is_chosen_by_the_keyboard_keeps_the_focus(opened):
    focus = "const e = document.activeElement; return [e.dataset.key, e.ariaPressed, e.value]"
    for section in ("network", "own"):
        opened.keys(f"#{section} [data-example]:nth-child(2)", "\ue007")
        assert opened.run(focus)[1] == "true"
    product = numbers(opened, "#network [data-product]", "product")
    opened.keys("#network select", "\ue015")  # the next weight
    assert opened.run(focus)[0] == "weight"
    assert numbers(opened, "#network [data-product]", "product") != product
    opened.keys("#network .point:not(.picked)", "\ue007")
    assert opened.run("return document.activeElement.classList.contains('picked')")


def test_the_keyboard_moves_points_and_line(opened, small_page):
    right, up = "\ue014", "\ue013"
    before = state_of(opened)["w"]
    opened.keys("#perceptron .handle", up + up)
    moved = state_of(opened)["w"]
    assert moved != before
    opened.keys("#perceptron .handle:last-child", right)
    assert state_of(opened)["w"] != moved
    gradient = numbers(opened, "#perceptron [data-gradient]", "gradient")
    opened.keys("#perceptron .picked", right)
    assert numbers(opened, "#perceptron [data-gradient]", "gradient") != gradient
    check_gradient(opened, small_page)


def check_gradient(browser, small_page):
    """The printed gradients are the library's, for the weights and the points of the page."""
    state = state_of(browser)
    weights, points, picked = state["w"], state["points"], state["picked"]
    params = {"weight": np.array(weights[:2])[:, None], "bias": np.array(weights[2:])}
    x, y = np.array([p["x"] for p in points]), np.array([[p["y"]] for p in points], float)
    assert len(x) == len(small_page[1]["perceptron"]["inputs"])
    for which, name in ((slice(picked, picked + 1), "gradient"), (slice(None), "mean")):
        _, grads = bp.value_and_grad(unit.NET, unit.LOSS)(params, x[which], y[which])
        printed = numbers(browser, f"#perceptron [data-{name}]", name)
        np.testing.assert_allclose(printed, unit.vector(grads), rtol=1e-12, atol=1e-14)


def test_a_touched_wire_has_factors_whose_product_is_the_gradient(opened, small_page):
    run = small_page[1]["networks"][0]
    stage, example = opened.run("""
      const chosen = document.querySelector("#network [aria-pressed=true][data-example]");
      return [document.querySelector("#network input").value, chosen.dataset.example];
    """)
    for layer, i, o in [(0, 1, 1), (1, 0, 1), (2, 1, 0)]:
        script = """document.querySelector(arguments[0]).dispatchEvent(
          new MouseEvent("click", { bubbles: true }))"""
        opened.run(script, f"[data-wire='{layer},{i},{o}']")
        factors = numbers(opened, "#network [data-factor]", "factor")
        (product,) = numbers(opened, "#network [data-product]", "product")
        (autodiff,) = numbers(opened, "#network [data-autodiff]", "autodiff")
        assert len(factors) == (2 if layer == 2 else 3)
        assert product == pytest.approx(np.prod(factors), rel=1e-14)
        assert product == pytest.approx(autodiff, rel=1e-12, abs=1e-15)
        assert autodiff == run["weightGradients"][layer][int(stage)][int(example)][i, o]


def test_values_go_forward_and_deltas_come_back(opened):
    def lit():
        script = "return document.querySelectorAll(`[data-cell=${arguments[0]}]`).length"
        return opened.run(script, "value"), opened.run(script, "delta")

    opened.click("#network [data-do=start]")
    seen = [lit()]
    for _ in range(6):
        opened.click("#network [data-do=forward]")
        seen.append(lit())
    # 2-3-2-1: the inputs and three layers; then the output's delta and those of two layers.
    assert seen == [(2, 0), (5, 0), (7, 0), (8, 0), (8, 1), (8, 3), (8, 6)]
    opened.click("#network [data-do=back]")
    assert lit() == (8, 3)


def test_sliders_and_problems_and_examples_change_what_is_shown(opened):
    text = of_section(opened, "network", "training")
    opened.click("#network .slider button")
    assert of_section(opened, "network", "training") != text
    text = of_section(opened, "network", "graph")
    opened.click("[data-problem=moons]")
    assert of_section(opened, "network", "graph") != text
    for section in ("network", "own"):
        opened.click(f"#{section} [data-example]:nth-child(2)")
        script = "return document.querySelector(arguments[0]).getAttribute('aria-pressed')"
        assert opened.run(script, f"#{section} [data-example]:nth-child(2)") == "true"
    text = of_section(opened, "carriers", "cards")
    opened.click("#carriers .slider button")
    assert of_section(opened, "carriers", "cards") != text
    assert "30°" in text


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")
def test_the_whole_command_makes_a_page_under_the_limit(browser, tmp_path):
    path = command.main(command.Config(digits=True, out=tmp_path))
    assert path.stat().st_size < page.LARGEST
    browser.messages()
    browser.open(path)
    assert browser.run("return document.documentElement.dataset.ready") == "true"
    for name in ("moons", "xor", "circles", "spiral", "digits"):
        browser.click(f"[data-problem={name}]")
        (product,) = numbers(browser, "#network [data-product]", "product")
        (autodiff,) = numbers(browser, "#network [data-autodiff]", "autodiff")
        assert product == pytest.approx(autodiff, rel=1e-12, abs=1e-15)
    assert "ŷ 9" in of_section(browser, "network", "graph")
    browser.resize(390, 900)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.messages() == []


def test_a_still_is_the_network_at_the_end_of_its_backward_pass(small_page, tmp_path):
    still = tmp_path / "still.png"
    take_still(small_page[0], still)
    pixels = plt.imread(still)
    assert pixels.shape[:2] == (HEIGHT, WIDTH)
    assert pixels.std() > 0.05  # not one colour


def test_a_still_needs_a_folder_that_is_there(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        command.main(command.Config(still=tmp_path / "missing" / "still.png"))
