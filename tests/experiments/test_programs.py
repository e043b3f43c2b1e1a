"""What is read from the text of a compiled program: collectives, and the FLOP of products."""

import jax
import jax.numpy as jnp
import pytest

from experiments.common.programs import Collective, collectives, product_flop


def program(*lines, others=""):
    body = "\n".join(f"  {line}" for line in lines)
    head = f"HloModule m, num_partitions=8\n{others}\nENTRY %main (p: f32[8,2]) -> f32[]"
    return f"{head} {{\n{body}\n}}"


X = "%x = f32[8,2]{1,0} parameter(0)"


@pytest.mark.parametrize(
    ("line", "name", "operand", "wire"),
    [
        ("%y = f32[8,2]{1,0} all-reduce(%x), to_apply=%add", "all-reduce", 64, 2 * 7 / 8 * 64),
        ("%y = f32[64,2]{1,0} all-gather(%x), dimensions={0}", "all-gather", 64, 7 * 64),
        ("%y = f32[1,2]{1,0} reduce-scatter(%x)", "reduce-scatter", 64, 7 / 8 * 64),
        ("%y = f32[8,2]{1,0} all-to-all(%x)", "all-to-all", 64, 7 / 8 * 64),
        ("%y = f32[8,2]{1,0} collective-permute(%x)", "collective-permute", 64, 64),
        ("%y = (f32[8,2], f32[64,2]) all-gather-start(%x)", "all-gather", 64, 7 * 64),
        ("%y = f32[8,2]{1,0} all-reduce(f32[8,2]{1,0} %x)", "all-reduce", 64, 2 * 7 / 8 * 64),
    ],
)
def test_a_collective_has_the_bytes_of_its_operands(line, name, operand, wire):
    assert collectives(program(X, line)) == [Collective(name, operand, wire, 1)]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{}", 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=4,'model'=2] {'data'}", 4),
        ("mesh['data'=4,'model'=2] {'data','model'}", 8),
        ("mesh['data'=8] {'data':(2)4}", 4),
    ],
)
def test_a_group_is_written_in_many_ways(groups, size):
    line = f"%y = f32[] all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    (found,) = collectives(program(X, line))
    assert found.wire_bytes == (size - 1) * 64


def test_operands_of_every_dtype_count():
    types = {"f64[3]": 24, "bf16[2,2]": 8, "s32[]": 4, "pred[5]": 5, "c64[2]": 16, "f8e4m3fn[4]": 4}
    lines = [f"%x{i} = {type_}{{0}} parameter({i})" for i, type_ in enumerate(types)]
    names = ", ".join(f"/*index={i}*/%x{i}" for i in range(len(types)))
    together = f"%y = ({', '.join(types)}) all-reduce({names}), to_apply=%add"
    (found,) = collectives(program(*lines, together))
    assert found.operand_bytes == sum(types.values())
    done = "%z = f32[8,2] all-reduce-done(%y), calls=%unknown"
    assert collectives(program(X, done)) == []


INNER = """
%inner (a: f32[4,3]) -> f32[4,5] {
  %a = f32[4,3]{1,0} parameter(0)
  %b = f32[3,5]{1,0} parameter(1)
  ROOT %c = f32[4,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (b: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %x = f32[8,2]{1,0} parameter(0)
  %f = f32[4,5]{1,0} fusion(%x), kind=kLoop, calls=%inner, metadata={op_name="a{b}/calls=%body"}
  ROOT %y = f32[8,2]{1,0} all-reduce(%x), to_apply=%add
}
"""


def loop(attributes):
    return f"%w = (s32[], f32[8,2]) while(%x), condition=%test, body=%body{attributes}"


def test_what_is_in_a_loop_counts_as_often_as_the_loop_runs():
    trips = ', backend_config={"known_trip_count":{"n":"6"},"other":[]}'
    text = program(X, loop(trips), others=INNER)
    assert [own.times for own in collectives(text)] == [6]
    assert product_flop(text) == 6 * 2 * 4 * 5 * 3
    with pytest.raises(ValueError, match="a loop of unknown length in main"):
        collectives(program(X, loop(""), others=INNER))


def test_both_branches_of_a_choice_count():
    both = "%w = f32[4,5] conditional(%x), branch_computations={%inner, %inner}"
    assert product_flop(program(X, both, others=INNER)) == 2 * 2 * 4 * 5 * 3


def test_a_compiled_loop_has_the_flop_of_its_products():
    def function(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 16), (16, 16)))
    text = jax.jit(function).lower(*shapes).compile().as_text()
    assert product_flop(text) == 7 * 2 * 32 * 16 * 16
    assert collectives(text) == []
