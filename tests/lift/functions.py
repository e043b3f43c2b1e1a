"""Plain functions that use parameters in all sorts of ways, each as a user would write it.

A new way to use a parameter joins every property of `test_functions` by a line in `FUNCTIONS`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from opened import Model, N, normal, tokens

ONE = {"per_example": True}


def affine():
    def f(p, x):
        return p["gain"] * jnp.einsum("ni,oi->no", jnp.tanh(x @ p["w"] + p["b"]), p["u"])

    p = {"w": normal(1, 7, 6), "b": normal(2, 6), "u": normal(3, 5, 6), "gain": normal(4)}
    return Model(f, p, normal(0, N, 7))


def elementwise():
    """A bias and a gain of every shape that broadcasts, on both sides of the operation."""

    def f(p, x):
        h = jnp.tanh((x + p["all"]) * p["features"] - p["positions"])
        h = p["ones"] - h * p["one"]
        return p["features"] / (2 + h**2) + p["number"] * x[:, :1]

    p = {
        "all": normal(1, 3, 4),
        "features": normal(2, 4),
        "positions": normal(3, 3, 1),
        "ones": normal(4, 1, 1),
        "one": normal(5, 1),
        "number": normal(6),
    }
    return Model(f, p, normal(0, N, 3, 4))


def power_and_comparison():
    def f(p, x):
        h = jnp.exp(x) ** p["power"]
        h = jnp.where(x > p["threshold"], h, p["floor"]) + jnp.maximum(x, p["floor"])
        # Several parameters in one operation, and one of them in two places.
        h = h + lax.clamp(p["floor"], x, p["floor"] + p["power"] ** 2)
        return h * lax.select(x > 0, p["floor"], p["power"]) + lax.clamp(p["power"], x, p["power"])

    p = {"power": normal(1, 5), "threshold": normal(2, 5), "floor": normal(3, 5)}
    return Model(f, p, normal(0, N, 5), ONE)


def axes_of_a_product():
    """Contractions over several axes, in any order of the parameter's axes."""

    def f(p, x):
        q = jnp.einsum("nti,hik->nthk", x, p["q"])
        k = jnp.einsum("nti,khi->nthk", x, p["k"])
        scores = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k), axis=-1)
        return jnp.einsum("nhts,nshk,okh->nto", scores, k, p["o"])

    p = {"q": normal(1, 2, 5, 3), "k": normal(2, 3, 2, 5), "o": normal(3, 4, 3, 2)}
    return Model(f, p, normal(0, N, 3, 5))


def three_operands():
    def f(p, x):
        return jnp.einsum("ni,ij,jk,nk->n", x, p["a"], p["b"], jnp.sin(x))

    return Model(f, {"a": normal(1, 4, 3), "b": normal(2, 3, 4)}, normal(0, N, 4))


def low_rank():
    def f(p, x):
        w = p["w"] + 0.5 * p["a"] @ p["b"] - p["c"]
        return jnp.tanh(x @ w) @ -p["o"]

    p = {
        "w": normal(1, 5, 4),
        "a": normal(2, 5, 2),
        "b": normal(3, 2, 4),
        "c": normal(4, 5, 4),
        "o": normal(5, 4, 3),
    }
    return Model(f, p, normal(0, N, 2, 5))


def standardised_convolution():
    def f(p, x):
        k = p["k"]
        k = (k - k.mean((0, 1, 2))) / jnp.sqrt(k.var((0, 1, 2)) + 1e-5) * p["gain"]
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(y).mean((1, 2)) @ p["o"]

    p = {"k": normal(1, 3, 2, 2, 3), "gain": normal(2, 3), "o": normal(3, 3, 2)}
    return Model(f, p, normal(0, N, 4, 3, 2))


def normalised_weights():
    def f(p, x):
        mixed = jnp.einsum("k,kio->io", jax.nn.softmax(p["mix"]), p["w"])
        return x @ (mixed / jnp.linalg.norm(mixed, axis=0))

    return Model(f, {"mix": normal(1, 3), "w": normal(2, 3, 5, 4)}, normal(0, N, 5))


def shared_and_transposed():
    def f(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"] + p["b"])
        return x @ p["w"].T

    p = {"w": normal(1, 4, 4), "b": normal(2, 4), "unused": normal(3, 2)}
    return Model(f, p, normal(0, N, 4))


def side_by_side():
    """Matrices and biases that are put together, and one that is taken apart."""

    def f(p, x):
        w, b = jnp.concatenate([p["u"], p["v"]], 1), jnp.concatenate([p["b"], p["c"]])
        i, o = jnp.split(x @ w + b, 2, axis=-1)
        h = jax.nn.sigmoid(i) * jnp.tanh(o)
        both = jnp.concatenate([h, x[:, :1]], 1) @ jnp.concatenate([p["s"], p["t"]], 0)
        a, z = p["both"][0], lax.slice_in_dim(p["both"], 1, 2)[0]
        return both @ a + x @ z[:, ::-1] - x @ jnp.flip(z, 0)

    p = {
        "u": normal(1, 5, 2),
        "v": normal(2, 5, 4),
        "b": normal(3, 2),
        "c": normal(4, 4),
        "s": normal(5, 3, 5),
        "t": normal(6, 1, 5),
        "both": normal(7, 2, 5, 2),
    }
    return Model(f, p, normal(0, N, 5))


def experts():
    def f(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        h = jax.nn.relu(jnp.einsum("nti,eio->nteo", x, p["up"]))
        return jnp.einsum("ntei,nte->nti", jnp.einsum("nteo,eoi->ntei", h, p["down"]), gates)

    p = {"up": normal(1, 3, 4, 5), "down": normal(2, 3, 5, 4), "gate": normal(3, 4, 3)}
    return Model(f, p, normal(0, N, 2, 4))


def routed_experts():
    """The best expert alone, by `top_k` and a gather of its matrix."""

    def f(p, x):
        gate, best = lax.top_k(jax.nn.softmax(x @ p["gate"]), 1)
        order = jnp.sort(x)
        return gate * (order @ p["up"][best[0]])

    p = {"up": normal(1, 3, 4, 5), "gate": normal(2, 4, 3)}
    return Model(f, p, normal(0, N, 4), ONE)


def heads():
    """`vmap` over heads, with parameters that the heads share and parameters of their own."""

    def f(p, x):
        head = lambda q, b: jnp.tanh(x @ q + b) @ p["shared"]  # noqa: E731
        return jax.vmap(head)(p["q"], p["b"]).sum(0)

    p = {"q": normal(1, 3, 5, 2), "b": normal(2, 3, 2), "shared": normal(3, 2, 4)}
    return Model(f, p, normal(0, N, 6, 5))


def batch_in_rows():
    def f(p, x):
        rows = x.reshape(-1, x.shape[-1]) @ p["w"] + p["b"]
        return jnp.tanh(rows).reshape(*x.shape[:-1], -1).sum(1)

    return Model(f, {"w": normal(1, 4, 3), "b": normal(2, 3)}, normal(0, N, 3, 4))


def rows_of_a_table(mode):
    def f(p, x):
        return p["table"].at[x].get(mode=mode, fill_value=0.0) * p["scale"]

    at = jnp.array([[0, -1, 5], [6, 2, 2], [-7, 9, 1], [3, 3, 3]])
    return Model(f, {"table": normal(1, 6, 2), "scale": normal(2, 2)}, at)


def tied_table():
    def f(p, x):
        h = jnp.tanh(p["table"][x] @ p["w"] + p["positions"][: x.shape[1]])
        return h @ p["table"].T + jnp.take(p["bias"], x, axis=0)[..., None]

    p = {
        "table": normal(1, 11, 3),
        "w": normal(2, 3, 3),
        "positions": normal(3, 7, 3),
        "bias": normal(4, 11),
    }
    return Model(f, p, tokens(0, N, 5))


def columns_of_a_table():
    """What is no whole row: columns, entries and blocks, by integers of the example."""

    def f(p, x):
        block = jax.vmap(lambda i: lax.dynamic_slice(p["w"], (i, 1), (2, 3)))(x[:, 0])
        row = jax.vmap(lambda i: lax.dynamic_index_in_dim(p["w"], i, 0))(x[:, 1])
        entries = p["w"][:, x].sum((0, 2)) + p["w"][x[:, 0], x[:, 1]]
        return entries + jnp.sum(block.sum(1) * row[:, 0, :3], axis=1)

    return Model(f, {"w": normal(1, 5, 6)}, tokens(0, N, 2, vocabulary=5))


def positions_of_a_table():
    """Rows of tables at constants, some of them twice, which are added or multiplied."""

    def f(p, x):
        at = jnp.arange(x.shape[1])
        h = x + p["positions"][at] + jnp.take(p["bias"], jnp.array([2, 0, 2, 1]), axis=0)[:, None]
        h = h + p["positions"][jnp.array([0, 0, 4, -1])] * p["gain"][at][:, None]
        return h @ p["weights"][jnp.array([1, 1])].sum(0)

    p = {
        "positions": normal(1, 6, 3),
        "bias": normal(2, 3),
        "gain": normal(3, 5),
        "weights": normal(4, 2, 3, 2),
    }
    return Model(f, p, normal(0, N, 4, 3))


def output_of_parameters():
    def f(p, x):
        return {"mean": x @ p["w"], "log_scale": p["s"], "constant": jnp.ones(2)}

    return Model(f, {"w": normal(1, 5, 3), "s": normal(2, 3)}, normal(0, N, 5), ONE)


def stopped():
    def f(p, x):
        h = jnp.tanh(x @ p["w"] + lax.stop_gradient(p["b"]))
        return h + lax.stop_gradient(h @ p["v"]) + x @ lax.stop_gradient(p["w"])

    return Model(
        f, {"w": normal(1, 4, 4), "b": normal(2, 4), "v": normal(3, 4, 4)}, normal(0, N, 4)
    )


def mask_of_a_parameter():
    def f(p, x):
        mask = jnp.abs(p["w"]) > 0.5
        rounded = p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])
        return x @ jnp.where(mask, p["w"], 0) + x @ rounded * (p["b"] > 0).astype(x.dtype)

    return Model(f, {"w": normal(1, 5, 4), "b": normal(2, 4)}, normal(0, N, 5))


def matrix_functions():
    def f(p, x):
        turned = x @ jax.scipy.linalg.expm(p["a"] - p["a"].T)
        return jnp.linalg.solve(jnp.eye(4) + p["s"] @ p["s"].T, turned)

    return Model(f, {"a": normal(1, 4, 4) / 3, "s": normal(2, 4, 4) / 3}, normal(0, N, 4), ONE)


def solve_by_example():
    """A matrix of the example in which there are parameters."""

    def f(p, x):
        return jnp.linalg.solve(jnp.diag(2 + x**2) + p["w"] @ p["w"].T / 5, p["b"])

    return Model(f, {"w": normal(1, 3, 3), "b": normal(2, 3)}, normal(0, N, 3), ONE)


def own_vjp():
    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (2 * g @ r[1].T, r[0].T @ g))

    def f(p, x):
        return jax.nn.silu(linear(x, p["w"])) @ p["v"]

    return Model(f, {"w": normal(1, 5, 4), "v": normal(2, 4, 3)}, normal(0, N, 5))


def own_jvp():
    @jax.custom_jvp
    def clipped(x, w):
        return jnp.clip(x * w, -1, 1)

    @clipped.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return clipped(x, w), dx * w + 3 * x * dw

    def f(p, x):
        return clipped(jax.nn.relu(x @ p["w"]), p["g"])

    return Model(f, {"w": normal(1, 5, 4), "g": normal(2, 4)}, normal(0, N, 5))


def convolutions():
    """Of one axis, channels first and last, in groups, dilated, and by an einsum of patches."""

    def f(p, x):
        conv = lax.conv_general_dilated
        h = conv(x, p["first"], (2,), [(1, 2)], dimension_numbers=("NWC", "WIO", "NWC"))
        h = jnp.tanh(h + p["b"]).transpose(0, 2, 1)
        h = conv(h, p["groups"], (1,), "SAME", rhs_dilation=(2,), feature_group_count=2)
        h = conv(h, p["depth"], (1,), "VALID", feature_group_count=4)
        cut = conv(h, p["cut"], (1,), [(-1, 0)])
        return (
            h,
            lax.conv_transpose(h, p["up"], (2,), "SAME", dimension_numbers=("NCH", "HIO", "NCH")),
            cut,
        )

    p = {
        "first": normal(1, 3, 2, 4),
        "b": normal(2, 4),
        "groups": normal(3, 4, 2, 2),
        "depth": normal(4, 4, 1, 2),
        "cut": normal(5, 2, 4, 2),
        "up": normal(6, 2, 4, 3),
    }
    return Model(f, p, normal(0, N, 8, 2))


def inputs_in_a_tree():
    """Several inputs and outputs, integers among them."""

    def f(p, x):
        h = jnp.tanh(x["image"] @ p["w"] + p["table"][x["label"]] + p["by"] * x["pair"][0][:, None])
        return {"h": h, "pair": (x["pair"][1] + h @ p["w"].T, h.sum(1))}

    p = {"w": normal(1, 4, 3), "table": normal(2, 11, 3), "by": normal(3, 3)}
    pair = normal(5, N), normal(6, N, 4)
    return Model(f, p, {"image": normal(4, N, 4), "label": tokens(0, N), "pair": pair})


def parameters_in_trees():
    """Parameters in tuples, lists and None, with the same array used under two names."""

    def f(p, x):
        (w, b), [v, nothing] = p
        assert nothing is None
        return jnp.tanh(x @ w + b) @ v + b @ v

    return Model(f, ((normal(1, 4, 3), normal(2, 3)), [normal(3, 3, 2), None]), normal(0, N, 4))


# Loops, checkpoints and branches.


def stack_of_layers(how="scan", *, width=3, layers=3):
    """Layers in a loop; `how` says with which checkpoint."""

    def f(p, x):
        def body(h, own):
            w, b = own
            return h + jnp.tanh(h @ w + b), None

        if how == "checkpoint of turns":
            body = jax.checkpoint(body)
        if how == "checkpoint that saves":
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable)
        run = lambda x: lax.scan(body, x, (p["w"], p["b"]))[0]  # noqa: E731
        if how == "checkpoint of the loop":
            run = jax.checkpoint(run, prevent_cse=False)
        return run(x) @ p["out"]

    p = {
        "w": normal(1, layers, width, width),
        "b": normal(2, layers, width),
        "out": normal(3, width, 2),
    }
    return Model(f, p, normal(0, N, width))


def loop_in_a_loop():
    def f(p, x):
        def inner(h, w):
            return jnp.tanh(h @ w + p["shared"]), h.sum(-1)

        def outer(h, own):
            h, sums = lax.scan(inner, h, own["w"])
            return h + own["b"], sums

        h, sums = lax.scan(outer, x, {"w": p["w"], "b": p["b"]})
        return h, jnp.moveaxis(sums, 2, 0)

    p = {"w": normal(1, 2, 3, 4, 4), "b": normal(2, 2, 4), "shared": normal(3, 4)}
    return Model(f, p, normal(0, N, 4))


def checkpoint_around():
    """A checkpoint of operations, a loop and a call, with a parameter used inside and outside."""

    def f(p, x):
        @jax.checkpoint
        def inside(p, x):
            h = jnp.tanh(x @ p["w"])
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum(-1)), h, p["stack"])

        h, sums = inside(p, x)
        return h @ p["w"] + sums.sum(0)[:, None]

    return Model(f, {"w": normal(1, 4, 4), "stack": normal(2, 2, 4, 4)}, normal(0, N, 4))


def scanned_and_outside():
    def f(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        return h @ p["w"][1] + (x * p["w"][0, 0]).sum(1, keepdims=True)

    return Model(f, {"w": normal(1, 3, 4, 4)}, normal(0, N, 4))


def scanned_in_two_loops():
    def f(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), h, p["w"], reverse=True)
        return h

    return Model(f, {"w": normal(1, 3, 4, 4)}, normal(0, N, 4))


def weight_norm_in_a_loop():
    def f(p, x):
        def body(h, own):
            v, g = own
            return jnp.tanh(h @ (v / jnp.linalg.norm(v, axis=0) * g)), None

        return lax.scan(body, x, (p["v"], p["g"]))[0]

    return Model(f, {"v": normal(1, 3, 4, 4), "g": normal(2, 3, 4)}, normal(0, N, 4))


def in_time():
    """A loop over time, backwards, with outputs, a learned first state, and shared parameters."""

    def f(p, x):
        def step(h, now):
            h = jnp.tanh(h @ (p["w"] * p["by"]) + now @ p["in"] + p["b"])
            return h, h * p["by"] + h[:2] @ p["w"][:2]

        last, ys = lax.scan(step, p["h"], x, reverse=True)
        return last, ys

    p = {
        "w": normal(1, 3, 3) / 2,
        "by": normal(2, 3),
        "h": normal(3, 3),
        "in": normal(4, 2, 3),
        "b": normal(5, 3),
    }
    return Model(f, p, normal(0, N, 4, 2), ONE)


def lookup_and_convolution_in_time():
    """Of a table and of a kernel the operands of all turns stand side by side."""

    def f(p, x):
        def step(h, token):
            h = jnp.tanh(h + p["table"][token])
            h = lax.conv_general_dilated(h[None, None], p["kernel"], (1,), "SAME")[0, 0]
            return h, token + 1

        return lax.scan(step, jnp.zeros(4), x)[0]

    return Model(f, {"table": normal(1, 11, 4), "kernel": normal(2, 1, 1, 3)}, tokens(0, N, 3), ONE)


def carry_that_grows():
    """A first state that is constant, and made of parameters, and an integer that counts."""

    def f(p, x):
        def step(carry, now):
            i, h, constant = carry
            return (i + 1, jnp.tanh(h * p["w"][i] + now), constant * 2), (h * constant, i)

        start = jnp.array(0), jnp.zeros(3), p["s"] * 1.5
        (i, h, constant), (ys, at) = lax.scan(step, start, x)
        return h * i, constant, ys, at * ys[:, 0]

    return Model(f, {"w": normal(1, 4, 3), "s": normal(2, 3)}, normal(0, N, 4, 3), ONE)


def counted_layers():
    def f(p, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i] + p["b"][i]), x)

    return Model(f, {"w": normal(1, 3, 4, 4), "b": normal(2, 3, 4)}, normal(0, N, 4))


def mapped():
    def f(p, x):
        return lax.map(lambda row: jnp.tanh(row @ p["w"]) * p["g"], x).sum(0)

    return Model(f, {"w": normal(1, 4, 3), "g": normal(2, 3)}, normal(0, N, 5, 4), ONE)


def no_turns():
    """A loop that takes no turn, and one that takes one."""

    def f(p, x):
        turn = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        h, _ = lax.scan(turn, x @ p["out"], p["none"])
        return lax.scan(turn, h, p["one"])[0]

    p = {"none": normal(1, 0, 4, 4), "one": normal(2, 1, 4, 4), "out": normal(3, 4, 4)}
    return Model(f, p, normal(0, N, 4))


def branches():
    def f(p, x):
        return lax.cond(
            x.sum() > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x @ p["b"] * p["c"], x
        )

    p = {"a": normal(1, 5, 4), "b": normal(2, 5, 4), "c": normal(3, 4)}
    return Model(f, p, normal(0, N, 5), ONE)


def branches_by_index():
    """A switch with an index out of range, in a loop, and branches by a parameter."""

    def f(p, x):
        ways = [lambda h: h @ p["w"], lambda h: jnp.tanh(h) * p["g"], lambda h: h + 1.0]

        def turn(h, i):
            return lax.switch(i, ways, h), None

        h, _ = lax.scan(turn, x["h"], x["at"])
        h = lax.cond(p["g"][0] > 0, lambda h: h * p["g"], lambda h: h @ p["w"], h)
        return lax.cond(h.sum() > 0, lambda: p["g"], lambda: h)

    x = {"h": normal(0, N, 3), "at": jnp.array([[0, 1, 7], [2, -4, 0], [1, 1, 1], [0, 2, 0]])}
    return Model(f, {"w": normal(1, 3, 3), "g": normal(2, 3)}, x, ONE)


def branch_in_a_checkpoint():
    def f(p, x):
        @jax.checkpoint
        def inside(x):
            return lax.cond(x[0] > 0, lambda x: x @ p["w"], lambda x: jnp.tanh(x) @ p["w"].T, x)

        return inside(inside(x))

    return Model(f, {"w": normal(1, 3, 3)}, normal(0, N, 3), ONE)


def infinite_where_not_taken(to_infinity):
    """Each branch is infinite or nan for the examples that do not take it."""

    def f(p, x):
        def over(x):
            return to_infinity(x) @ p["w"] + to_infinity(x) * p["a"]

        return lax.cond(x[0] > 0, over, lambda x: jnp.sqrt(-x) @ p["w"] + x / p["a"], x)

    x = jnp.abs(normal(0, N, 3)) * jnp.array([1.0, -1.0, 1.0, -1.0])[:, None]
    return Model(f, {"a": normal(1, 3), "w": normal(2, 3, 3)}, x, ONE)


def infinite_parameters():
    """What a branch makes of parameters is infinite, and no example takes it."""

    def f(p, x):
        def over(x):
            return x @ jnp.log(p["w"] * 0) + x * jnp.sqrt(p["b"] * 0)

        return lax.cond(x[0] > 100, over, lambda x: x @ p["w"] * p["b"], x)

    return Model(f, {"w": normal(1, 3, 3), "b": normal(2, 3)}, normal(0, N, 3), ONE)


def loop_in_a_branch():
    """A loop whose turns are infinite for the examples that do not take the branch."""

    def f(p, x):
        def loop(x):
            return lax.scan(lambda h, w: (jnp.log(jnp.abs(h)) * w, None), 1 / x, p["w"])[0]

        return lax.cond(x[0] != 0, loop, lambda x: x + p["b"], x)

    x = normal(0, N, 3).at[1].set(0)
    return Model(f, {"w": normal(1, 2, 3), "b": normal(2, 3)}, x, ONE)


def while_without_parameters():
    """A loop of an unknown number of turns, off the way from parameters to outputs."""

    def f(p, x):
        n = lax.while_loop(lambda n: n < x.sum(), lambda n: n + 1, -3.0)
        return x @ p["w"] * lax.stop_gradient(n)

    return Model(f, {"w": normal(1, 3, 2)}, normal(0, N, 3), ONE)


def of_closed_over():
    """Constants and frozen parameters, which the function closes over."""
    frozen, table = normal(1, 4, 4), np.arange(12.0).reshape(3, 4)

    def f(p, x):
        h = jnp.tanh(x @ frozen + table[1])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w @ frozen), None), h, p["w"])[0]

    return Model(f, {"w": normal(2, 2, 4, 4)}, normal(0, N, 4))


def calls_of_the_same():
    """Equal calls of one jitted function, which share one program."""
    layer = jax.jit(lambda x, w: jax.nn.gelu(x @ w))

    def f(p, x):
        return layer(layer(x, p["a"]), p["b"]) + layer(x, p["a"])

    return Model(f, {"a": normal(1, 4, 4), "b": normal(2, 4, 4)}, normal(0, N, 4))


def numbers():
    """The simplest: one number, for each example one number."""
    return Model(lambda p, x: p * x, normal(1), normal(0, N), ONE)


def blocks_almost_alike():
    """Blocks of the same operations, with another number, axis or order of operands."""

    def block(weight, x, number=2.0, axis=0, swapped=False):
        first, second = number * jnp.sin(x), jnp.tanh(x @ weight)
        return jnp.cumsum(second - first if swapped else first - second, axis)

    def f(p, x):
        changes = {}, {}, {"swapped": True}, {}, {"number": 3.0}, {"axis": 1}, {}
        for weight, changed in zip(p, changes, strict=True):
            x = block(weight, x, **changed)
        return x

    return Model(f, [0.5 * normal(i, 3, 3) for i in range(7)], normal(9, N, 3, 3), ONE)


FUNCTIONS = {
    "numbers": numbers,
    "affine": affine,
    "elementwise": elementwise,
    "power and comparison": power_and_comparison,
    "axes of a product": axes_of_a_product,
    "three operands": three_operands,
    "low rank": low_rank,
    "standardised convolution": standardised_convolution,
    "normalised weights": normalised_weights,
    "shared and transposed": shared_and_transposed,
    "side by side": side_by_side,
    "experts": experts,
    "routed experts": routed_experts,
    "heads": heads,
    "batch in rows": batch_in_rows,
    "rows, clipped": functools.partial(rows_of_a_table, "clip"),
    "rows, filled": functools.partial(rows_of_a_table, "fill"),
    "tied table": tied_table,
    "columns of a table": columns_of_a_table,
    "positions of a table": positions_of_a_table,
    "output of parameters": output_of_parameters,
    "stopped": stopped,
    "mask of a parameter": mask_of_a_parameter,
    "matrix functions": matrix_functions,
    "solve by example": solve_by_example,
    "own vjp": own_vjp,
    "own jvp": own_jvp,
    "convolutions": convolutions,
    "inputs in a tree": inputs_in_a_tree,
    "parameters in trees": parameters_in_trees,
    "stack of layers": stack_of_layers,
    "stack, checkpoint of turns": functools.partial(stack_of_layers, "checkpoint of turns"),
    "stack, checkpoint that saves": functools.partial(stack_of_layers, "checkpoint that saves"),
    "stack, checkpoint of the loop": functools.partial(stack_of_layers, "checkpoint of the loop"),
    "loop in a loop": loop_in_a_loop,
    "checkpoint around": checkpoint_around,
    "scanned and outside": scanned_and_outside,
    "scanned in two loops": scanned_in_two_loops,
    "weight norm in a loop": weight_norm_in_a_loop,
    "in time": in_time,
    "lookup and convolution in time": lookup_and_convolution_in_time,
    "carry that grows": carry_that_grows,
    "counted layers": counted_layers,
    "mapped": mapped,
    "no turns": no_turns,
    "branches": branches,
    "branches by index": branches_by_index,
    "branch in a checkpoint": branch_in_a_checkpoint,
    "infinite where not taken, log": functools.partial(infinite_where_not_taken, jnp.log),
    "infinite where not taken, 1/0": functools.partial(
        infinite_where_not_taken, lambda x: 1 / jnp.maximum(x, 0)
    ),
    "infinite parameters": infinite_parameters,
    "loop in a branch": loop_in_a_branch,
    "while without parameters": while_without_parameters,
    "closed over": of_closed_over,
    "calls of the same": calls_of_the_same,
    "blocks almost alike": blocks_almost_alike,
}
