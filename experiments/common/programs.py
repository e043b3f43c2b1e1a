"""What a compiled program does on each device: its collectives, and the FLOP of its products.

Both are read from the text of the program, `compiled.as_text()`. What is inside a loop counts as
often as the loop runs; `cost_analysis` counts it once.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
NAMES = re.compile(r'op_name="(?:[^"\\]|\\.)*"')  # the user's words may look like anything
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      name: such as `all-reduce`.
      operand_bytes: the bytes that it takes from each device.
      wire_bytes: the bytes that each device sends, if the devices form a ring.
      times: how often the program runs it.
    """

    name: str
    operand_bytes: int
    wire_bytes: float
    times: int


class Instruction(NamedTuple):
    """An instruction of a program: `result` and `operands` are types, `rest` are its attributes."""

    name: str
    result: str
    operands: list[str]
    rest: str


def collectives(text: str) -> list[Collective]:
    """All collectives of a program, each once, with how often it runs."""
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    found = []
    for times, instruction in _instructions(text):
        name = instruction.name.removesuffix("-start")
        if name in COLLECTIVES:
            size = sum(map(_bytes, instruction.operands))
            sent = size * _shares_sent(name, _group_size(instruction.rest, devices))
            found.append(Collective(name, size, sent, times))
    return found


def product_flop(text: str) -> int:
    """The FLOP of all matrix products of a program, two for each multiplication."""
    flop = 0
    for times, instruction in _instructions(text):
        if instruction.name == "dot":
            (shape,), (left,) = _shapes(instruction.result), _shapes(instruction.operands[0])
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            summed = math.prod(left[int(axis)] for axis in _split(axes[1])) if axes else 1
            flop += 2 * times * math.prod(shape) * summed
    return flop


def _instructions(text: str) -> Iterator[tuple[int, Instruction]]:
    """Every instruction of a program, with how often it runs; those of fusions too."""
    computations, entry = _computations(text)
    todo = [(1, entry)]
    while todo:
        times, name = todo.pop()
        for instruction in computations[name]:
            yield times, instruction
            inner = times
            if instruction.name == "while":
                trips = TRIPS.search(instruction.rest)
                if trips is None:
                    raise ValueError(f"the program has a loop of unknown length in {name}.")
                inner *= int(trips[1])
            called = CALLED.findall(instruction.rest)
            for branches in BRANCHES.findall(instruction.rest):
                called += [branch.strip(" %") for branch in branches.split(",")]
            todo += [(inner, own) for own in called if own in computations]


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation of a program, and the name of the first to run."""
    computations: dict[str, list[Instruction]] = {}
    entry, types = "", {}
    for line in text.splitlines():
        if head := HEAD.match(line):
            computations[head[2]] = instructions = []
            types = {}
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(NAMES.sub("", line)):
            name, result, operation, rest = found.groups()
            types[name] = result
            operands, _, rest = rest.partition(")")
            known = [types[own] for own in re.findall(r"%([\w.\-]+)", operands) if own in types]
            instructions.append(Instruction(operation, result, known, rest))
    return computations, entry


def _shapes(type_: str) -> list[list[int]]:
    return [list(map(int, _split(lengths))) for _, _, lengths in ARRAY.findall(type_)]


def _bytes(type_: str) -> int:
    """The bytes of an array, or of all arrays of a tuple."""
    return sum(
        math.prod(map(int, _split(lengths))) * max(int(bits or 8) // 8, 1)  # pred has no number
        for _, bits, lengths in ARRAY.findall(type_)
    )


def _split(numbers: str) -> list[str]:
    return numbers.split(",") if numbers else []


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one collective."""
    groups = re.search(r"replica_groups=(\S.*?)(?:, [a-z_]+=|$)", attributes)
    text = groups[1] if groups else ""
    if mesh := re.match(r"mesh\[(.*?)\] \{(.*?)\}", text):  # as axes of a mesh
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if tiles := re.match(r"\[\d+,(\d+)\]", text):  # as the shape [groups, devices of a group]
        return int(tiles[1])
    if first := re.match(r"\{\{([\d,]+)\}", text):  # as lists
        return len(_split(first[1]))
    return devices


def _shares_sent(name: str, devices: int) -> float:
    """The bytes that each device of a ring sends for each byte of its operand."""
    others = devices - 1
    if name == "all-reduce":  # a reduce-scatter, and an all-gather of the parts
        return 2 * others / devices
    if name == "all-gather":
        return others
    if name in ("reduce-scatter", "all-to-all"):
        return others / devices
    return 1.0
