"""The mistakes that are planted: small changes of an expression, found in the syntax tree.

sign           a + b becomes a - b, -a becomes a
factor         a * b and a / b become a; a float becomes twice as large
off by one     an integer becomes larger by 1; < becomes <=
axis           the same for an axis
transpose      x.T, x.transpose(...), swapaxes and moveaxis leave x as it is; einsum swaps the
               last two letters of its result
mask           where(m, a, b) becomes a, or b
accumulation   widened(x) and x.astype(...) leave x as it is
key            every part gets the same random key
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    """One planted mistake.

    Attributes:
      operator: the kind of mistake.
      line: where it is, counted from 1.
      before: the expression.
      after: what it becomes.
      source: the whole module with the mistake.
    """

    operator: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.operator}: {self.before}  ->  {self.after}"


OPPOSITES = {ast.Add: ast.Sub, ast.Sub: ast.Add}
NEIGHBOURS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


def mutations(source: str) -> list[Mutation]:
    """All mistakes that can be planted in a module, in the order of its lines."""
    offsets = [0]
    for line in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    text, found = source.encode(), []
    for node in _expressions(ast.parse(source)):
        start = offsets[node.lineno - 1] + node.col_offset
        end = offsets[node.end_lineno - 1] + node.end_col_offset
        for operator, changed in _changes(node):
            after = f"({ast.unparse(changed)})"
            mutated = (text[:start] + after.encode() + text[end:]).decode()
            found.append(Mutation(operator, node.lineno, ast.unparse(node), after[1:-1], mutated))
    return sorted(found, key=lambda mutation: mutation.line)


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """All expressions that are computed: no annotations, messages or documentation."""
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            if not isinstance(child, ast.AST) or name in (
                "annotation",
                "returns",
                "decorator_list",
            ):
                continue
            if isinstance(child, ast.Raise | ast.JoinedStr) or _is_text(child):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from _expressions(child)


def _is_text(node: ast.AST) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else node
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def _changes(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPPOSITES:
            yield "sign", ast.BinOp(left, OPPOSITES[type(op)](), right)
        case ast.BinOp(left, ast.Mult() | ast.Div(), _):
            yield "factor", left
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign", operand
        case ast.Constant(float() as value):
            yield "factor", ast.Constant(2 * value if value else 1.0)
        case ast.Constant(int() as value) if not isinstance(value, bool):
            yield "off by one", ast.Constant(value + 1)
        case ast.Compare(left, [op], others) if type(op) in NEIGHBOURS:
            yield "off by one", ast.Compare(left, [NEIGHBOURS[type(op)]()], others)
        case ast.Attribute(value, "T"):
            yield "transpose", value
        case ast.Call():
            yield from _changes_of_call(node)


def _changes_of_call(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    for i, keyword in enumerate(call.keywords):
        if keyword.arg == "preferred_element_type":
            rest = call.keywords[:i] + call.keywords[i + 1 :]
            yield "accumulation", ast.Call(call.func, call.args, rest)
    match call:
        case ast.Call(ast.Attribute(_, "where"), [_, value, other]):
            yield "mask", value
            yield "mask", other
        case ast.Call(ast.Attribute(_, "moveaxis" | "swapaxes"), [array, *_]):
            yield "transpose", array
        case ast.Call(ast.Attribute(array, "transpose")):
            yield "transpose", array
        case ast.Call(ast.Attribute(_, "einsum"), [ast.Constant(str() as letters), *arrays]):
            operands, _, result = letters.partition("->")
            if len(result) > 1 and "." not in result[-2:]:
                changed = f"{operands}->{result[:-2]}{result[-1]}{result[-2]}"
                arguments = [ast.Constant(changed), *arrays]
                yield "transpose", ast.Call(call.func, arguments, call.keywords)
        case ast.Call(ast.Name("widened" | "widen"), [value]):
            yield "accumulation", value
        case ast.Call(ast.Attribute(value, "astype")):
            yield "accumulation", value
        case ast.Call(ast.Name("split_keys") | ast.Attribute(_, "split"), [key, count]):
            yield "key", ast.BinOp(ast.Tuple([key], ast.Load()), ast.Mult(), count)
        case ast.Call(ast.Attribute(_, "split"), [key]):
            yield "key", ast.Tuple([key, key], ast.Load())
