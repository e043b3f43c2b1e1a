"""A small GPT in plain JAX, with blocks that are unrolled, scanned, or scanned with checkpoints."""

import jax
import jax.numpy as jnp
from jax import lax


def gpt_params(*, blocks, width, vocabulary, length, stacked, heads=2, dtype=None):
    """Parameters, those of the blocks as a list or stacked."""
    keys = iter(jax.random.split(jax.random.key(3), 99))

    def normal(*shape):
        return 0.2 * jax.random.normal(next(keys), shape, dtype or jnp.result_type(float))

    def norm():
        return {"gain": 1 + normal(width), "bias": normal(width)}

    def block():
        size = width // heads
        return {
            "norm": norm(),
            "query": normal(width, heads, size),
            "key": normal(width, heads, size),
            "value": normal(width, heads, size),
            "out": normal(heads, size, width),
            "second": norm(),
            "up": normal(width, 4 * width),
            "down": normal(4 * width, width),
            "bias": normal(width),
        }

    body = [block() for _ in range(blocks)]
    return {
        "table": normal(vocabulary, width),
        "positions": normal(length, width),
        "blocks": jax.tree.map(lambda *p: jnp.stack(p), *body) if stacked else body,
        "head": normal(width, vocabulary),
    }


def normalised(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["gain"] + p["bias"]


def block(p, x):
    h = normalised(p["norm"], x)
    q, k, v = (jnp.einsum("ntd,dhi->nthi", h, p[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("nthi,nshi->nhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    x = x + jnp.einsum("nthi,hio->nto", jnp.einsum("nhts,nshi->nthi", weights, v), p["out"])
    h = jax.nn.gelu(normalised(p["second"], x) @ p["up"])
    return x + h @ p["down"] + p["bias"]


def gpt(blocks, how):
    """`function(params, tokens) -> logits`; the table embeds tokens, and adds to the logits."""

    def f(p, x):
        h = p["table"][x] + p["positions"][: x.shape[1]]
        if how == "unrolled":
            for i in range(blocks):
                h = block(p["blocks"][i], h)
        else:
            body = lambda h, own: (block(own, h), None)  # noqa: E731
            if how == "scan and checkpoint":
                body = jax.checkpoint(body, prevent_cse=False)
            h, _ = lax.scan(body, h, p["blocks"])
        return h @ p["head"] + h @ p["table"].T

    return f
