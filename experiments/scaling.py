"""How does the cost of a sweep grow with the batch, the network and the devices?

The batch is divided over up to 64 devices. The compiler knows what each of them has to do, so the
script compiles programs, for simulated devices, and runs none. Sharding is explicit:

  wire         bytes that each device sends, if the devices form a ring
  temporary    bytes of memory for what is computed on the way
  arguments    bytes of memory for the parameters and the batch
  FLOP         of the matrix products

The calls are the gradient (`value_and_grad`), the norms of all examples' gradients (`sq_norms`),
the clipped sum (`reweighted`) and the Kronecker factors (`kronecker`), of a perceptron with many
layers and of the GPT. The parameters are replicated, or divided over the devices as well (FSDP).

One of the batch size N, the number of layers L, the width and the number of devices changes at a
time; the others stay as the flags say.

Sources:
  "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations", Patarasuk, Yuan, 2009:
  bytes in a ring.
  "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", Zhao et al., 2023.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator
from tqdm import tqdm

import jaxbp as bp
from experiments import gpt
from experiments.common import devices, figures
from experiments.common.files import whole
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.programs import collectives, product_flop

LOSS = bp.softmax_cross_entropy
CLASSES, POSITIONS, HEADS = 64, 32, 4
QUICKLY = {"xla_backend_optimization_level": 0}
REPLICATED, DIVIDED = "replicated", "FSDP"
CALLS: dict[str, Callable] = {
    "gradient": lambda net: bp.value_and_grad(net, LOSS),
    "norms": lambda net: bp.backprop(net, LOSS, read=bp.sq_norms),
    "clipped sum": lambda net: bp.reweighted(net, LOSS, bp.clip_weights(1.0)),
    "factors": lambda net: bp.backprop(net, LOSS, read=bp.kronecker),
}
STYLES = {  # the lower curves have larger markers, where curves are equal
    "gradient": (figures.BLUE, "o", 10),
    "norms": (figures.GREEN, "^", 7),
    "clipped sum": (figures.RED, "s", 5),
    "factors": (figures.PURPLE, "v", 5),
}
COSTS = {
    "wire": "bytes on the wire",
    "temporary": "temporary bytes",
    "arguments": "bytes of arguments",
    "flop": "FLOP",
}
AXES = {"n": "batch size N", "layers": "layers L", "width": "width", "devices": "devices"}


@dataclass(frozen=True)
class Config:
    """Compiles sweeps for many devices, and draws how their costs grow."""

    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """The numbers of devices, each a power of two."""
    n: int = 128
    """The batch size N, a multiple of the largest number of devices."""
    layers: int = 4
    """The number of dense layers, or of blocks, L, an even number."""
    width: int = 128
    """The width of the layers, or of the residual stream, a multiple of 8."""
    out: Path = Path("out")
    """The folder for the figure and the record."""


class Case(NamedTuple):
    """One program: a call on a network, with parameters that lie somewhere."""

    network: str
    call: str
    parameters: str
    n: int
    layers: int
    width: int
    devices: int


class Cost(NamedTuple):
    """What a device does in one call.

    Attributes:
      wire: bytes that it sends.
      temporary: bytes of temporary memory.
      arguments: bytes of the arguments.
      flop: FLOP of the matrix products.
      collectives: for each kind of collective, how many run, and the bytes of their operands.
    """

    wire: float
    temporary: int
    arguments: int
    flop: int
    collectives: dict[str, tuple[int, int]]


def main(config: Config) -> dict[Case, Cost]:
    """Compiles, prints a table, writes a record and a figure, and returns the costs."""
    started = perf_counter()
    require(config)
    devices.make_data_mesh(max(config.devices))
    costs = {case: measure(case) for case in tqdm(cases(config), unit="program", disable=None)}
    print(f"{table(costs, config)}\n\n{growth_table(costs, config)}\n")
    write_record(costs, config.out / "scaling.json")
    figures.save(draw(costs, config), config.out / "scaling.png")
    print(f"done in {perf_counter() - started:.0f} s")
    return costs


def require(config):
    """Raises if a flag is wrong."""
    wrong = too_small(config, n=1, layers=1, width=1)
    multiples = {"layers": 2, "width": 2 * HEADS}
    if not config.devices or any(n < 1 or n & (n - 1) for n in config.devices):
        wrong.append(f"devices is {config.devices}; it takes powers of two")
    else:
        multiples["n"] = max(*config.devices, 2 * middle(config))
    for name, unit in multiples.items():
        if (size := getattr(config, name)) % unit:
            wrong.append(f"{name} is {size}; it takes a multiple of {unit}")
    raise_wrong(wrong + wrong_flags(seed=0, out=config.out))


# The programs.


def cases(config):
    """All programs: every number of devices; at a middle one, half and twice each other size."""
    sizes = {name: getattr(config, name) for name in ("n", "layers", "width")}
    points = [{**sizes, "devices": count} for count in config.devices]
    for name, size in sizes.items():
        points += [{**sizes, name: own, "devices": middle(config)} for own in (size // 2, 2 * size)]
    kinds = itertools.product(NETWORKS, CALLS, (REPLICATED, DIVIDED))
    return [Case(*kind, **point) for kind, point in itertools.product(kinds, points)]


def middle(config):
    """The number of devices at which the other sizes grow: 8, if the flags leave it."""
    return min(8, max(config.devices))


def make_perceptron(layers, width):
    """Returns the network, and the shape of an input."""
    hidden = [part for _ in range(layers) for part in (bp.dense(width), bp.relu())]
    return bp.chain(*hidden, bp.dense(CLASSES)), (width,)


def make_gpt(layers, width):
    sizes = gpt.Config(blocks=layers, features=width, heads=HEADS, positions=POSITIONS)
    return gpt.make_network(sizes, CLASSES), (POSITIONS,)


NETWORKS = {"MLP": make_perceptron, "GPT": make_gpt}


def compiled(case):
    """The program of a case, compiled from the shapes of its arguments and where they lie."""
    net, shape = NETWORKS[case.network](case.layers, case.width)
    chosen = jax.devices()[: case.devices]
    mesh = jax.make_mesh((case.devices,), ("data",), (AxisType.Explicit,), devices=chosen)

    def placed(array):
        divide = case.parameters == DIVIDED
        sharding = devices.divided(mesh, array) if divide else devices.replicated(mesh)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def batch(shape, dtype):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return jax.ShapeDtypeStruct((case.n, *shape), dtype, sharding=sharding)

    params = jax.tree.map(placed, jax.eval_shape(lambda: net.init(jax.random.key(0), shape)[0]))
    is_text = case.network == "GPT"
    inputs = batch(shape, jnp.int32 if is_text else jnp.float32)
    targets = batch(shape if is_text else (), jnp.int32)
    lowered = jax.jit(CALLS[case.call](net)).lower(params, inputs, targets)
    return lowered.compile(QUICKLY)


def measure(case):
    """The `Cost` of a case."""
    program = compiled(case)
    text, memory = program.as_text(), program.memory_analysis()
    found = collectives(text)
    times, operands = Counter(), Counter()
    for own in found:
        times[own.name] += own.times
        operands[own.name] += own.times * own.operand_bytes
    return Cost(
        sum(own.times * own.wire_bytes for own in found),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        product_flop(text),
        {name: (times[name], operands[name]) for name in sorted(times)},
    )


# Record, table and figure.


def write_record(costs, path):
    """Writes all costs, a program a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({**case._asdict(), **cost._asdict()}) for case, cost in costs.items())
    with whole(path) as unfinished:
        unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"record saved as {path}")


def read_record(path):
    """The costs that `write_record` has written."""
    costs = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        row["collectives"] = {name: tuple(pair) for name, pair in row["collectives"].items()}
        case = Case(*(row.pop(name) for name in Case._fields))
        costs[case] = Cost(**row)
    return costs


def table(costs, config):
    """The costs at the middle number of devices."""
    lines = [
        "| | parameters | collectives | kB on the wire | kB temporary | kB of arguments | MFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in base_cases(config):
        cost = costs[case]
        kinds = ", ".join(f"{n} {name}" for name, (n, _) in cost.collectives.items())
        numbers = " | ".join(
            f"{value:,.0f}"
            for value in (cost.wire / 1e3, cost.temporary / 1e3, cost.arguments / 1e3)
        )
        lines.append(
            f"| {case.network}, {case.call} | {case.parameters} | {kinds or 'none'} | {numbers} "
            f"| {cost.flop / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def growth_table(costs, config):
    """By which factors the bytes on the wire and the temporary bytes grow if one size doubles."""
    names = [name for name in AXES if name != "devices" or 2 * middle(config) in config.devices]
    lines = [
        f"| wire; temporary | parameters | {' | '.join(f'2 x {AXES[name]}' for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for case in base_cases(config):
        before, cells = costs[case], []
        for name in names:
            after = costs[case._replace(**{name: 2 * getattr(case, name)})]
            wire = f"{after.wire / before.wire:.2f}" if before.wire else "0"
            cells.append(f"{wire}; {after.temporary / before.temporary:.2f}")
        lines.append(f"| {case.network}, {case.call} | {case.parameters} | {' | '.join(cells)} |")
    return "\n".join(lines)


def base_cases(config):
    kinds = itertools.product(NETWORKS, CALLS, (REPLICATED, DIVIDED))
    sizes = config.n, config.layers, config.width, middle(config)
    return [Case(*kind, *sizes) for kind in kinds]


def draw(costs, config):
    """Draws all costs against the devices, and the bytes on the wire against the other sizes."""
    figure = Figure(figsize=(15, 10.5))
    panels = figure.subplots(3, 4)
    for row, network in zip(panels, NETWORKS, strict=False):
        for axes, name in zip(row, COSTS, strict=True):
            draw_growth(axes, costs, config, network, name, "devices")
            axes.set_title(f"{network}: {COSTS[name]}")
    for axes, name in zip(panels[2], ("n", "layers", "width"), strict=False):
        draw_growth(axes, costs, config, "GPT", "wire", name)
        axes.set_title(f"GPT on {middle(config)} devices: bytes on the wire")
    draw_legend(panels[2, 3])
    return figure


def draw_growth(axes, costs, config, network, cost, name):
    """Draws one cost against one size, on logarithmic axes; zero is not drawn."""
    for call, (color, marker, size) in STYLES.items():
        for parameters, line in ((REPLICATED, "-"), (DIVIDED, "--")):
            base = Case(network, call, parameters, *base_cases(config)[0][3:])
            points = sorted(
                (getattr(case, name), getattr(costs[case], cost))
                for case in costs
                if case._replace(**{name: getattr(base, name)}) == base
            )
            points = [(x, y) for x, y in points if y > 0]
            if points:
                filled = color if parameters == REPLICATED else "white"
                axes.loglog(
                    *zip(*points, strict=True), line, base=2, color=color, marker=marker, ms=size,
                    markerfacecolor=filled,
                )  # fmt: skip
    sizes = sorted({getattr(case, name) for case in costs})
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_yscale("log", base=10)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter("" if cost == "flop" else "B"))
    axes.minorticks_off()
    axes.set(xlabel=AXES[name], ylabel="per device")


def draw_legend(axes):
    axes.axis("off")
    for call, (color, marker, size) in STYLES.items():
        axes.plot([], [], color=color, marker=marker, ms=size, label=call)
    axes.plot([], [], "-", color=figures.BLACK, label="parameters on every device")
    axes.plot([], [], "--", color=figures.BLACK, label="parameters divided (FSDP)")
    axes.legend(loc="center", fontsize=12)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"scaling: {error}") from None
