"""Functions that the architectures share in PyTorch: they read parameters in the library's form.

Parameters are the library's dicts: `{"weight", "bias"}` of dense layers [I, O] and of convolutions
[*K, I / groups, O]. Images are [N, H, W, C], sequences [N, T, C], as in the library.
"""

import math
import operator


def _functional():
    import torch.nn.functional

    return torch.nn.functional


def dense(p, x):
    """An affine map of the last axis."""
    y = x @ p["weight"]
    return y + p["bias"] if "bias" in p else y


def conv(p, x, *, stride=1, padding=0, dilation=1, groups=1):
    """A convolution over one or two axes of positions."""
    functional = _functional()
    weight = p["weight"]
    rank = weight.ndim - 2
    kernel = weight.permute(rank + 1, rank, *range(rank)).contiguous()
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    y = convolve(first(x), kernel, p.get("bias"), stride, padding, dilation, groups)
    return last(y)


def conv_transpose(p, x, *, stride=1, padding=0):
    """A transposed convolution of an image."""
    weight = p["weight"].permute(2, 3, 0, 1).contiguous()
    y = _functional().conv_transpose2d(first(x), weight, p.get("bias"), stride, padding)
    return last(y)


def max_pool(x, size, stride=None, padding=0):
    """The maximum of each window of an image."""
    return last(_functional().max_pool2d(first(x), size, stride, padding))


def avg_pool(x, size, stride=None, padding=0):
    """The mean of each window of an image; padding does not count."""
    pool = _functional().avg_pool2d
    return last(pool(first(x), size, stride, padding, count_include_pad=False))


def concatenate(parts):
    """Side by side along the last axis."""
    import torch

    return torch.cat(parts, -1)


def prepended(vectors, x):
    """Learned vectors [K, O] before the positions of sequences [N, T, O]."""
    import torch

    return torch.cat([vectors.expand(len(x), *vectors.shape), x], 1)


def first(x):
    """Channels first, as PyTorch has them."""
    return x.movedim(-1, 1)


def last(x):
    """Channels last, as the library has them."""
    return x.movedim(1, -1)


def embedded(p, tokens):
    """The rows of a table that belong to tokens."""
    return p["weight"][tokens]


def layers(p):
    """The parameters of each layer of a stack."""
    import jax

    count = len(jax.tree.leaves(p.layers)[0])
    return [jax.tree.map(operator.itemgetter(k), p.layers) for k in range(count)]


def gelu(x, approximate="none"):
    """The exact one, by the error function, or the approximation by `tanh`."""
    return _functional().gelu(x, approximate=approximate)


def layer_norm(p, x, eps=1e-5):
    """Layer norm of the last axis, with a gain and perhaps a bias."""
    return _functional().layer_norm(x, x.shape[-1:], p["gain"], p.get("bias"), eps)


def rms_norm(p, x, eps=1e-5):
    """RMS norm of the last axis."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * p["gain"]


def group_norm(p, x, groups, eps=1e-5):
    """Group norm over the positions and each group of channels."""
    y = _functional().group_norm(first(x), groups, p["gain"], p.get("bias"), eps)
    return last(y)


def attend(q, k, v, sees=None, bias=None, scale=None):
    """Attention of heads [N, H, T, d]; `sees` [T, S] are booleans, `bias` is added to scores."""
    import torch

    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores = scores + bias
    if sees is not None:
        scores = scores.masked_fill(~sees, -math.inf)
    return torch.softmax(scores, -1) @ v


def heads(x, n):
    """Heads side by side in the last axis [N, T, H d], as [N, H, T, d]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def joined(x):
    """The inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


def causal(t):
    """Which positions see which, [T, T]: t sees those up to itself."""
    import torch

    return torch.ones(t, t, dtype=torch.bool).tril()


def self_attention(p, x, n, sees=None, **options):
    """The library's `attention`: parameters of a dense layer, of nothing, and of a dense layer."""
    queries_keys_values, _, out = p
    q, k, v = dense(queries_keys_values, x).chunk(3, -1)
    return dense(out, joined(attend(*(heads(a, n) for a in (q, k, v)), sees, **options)))


def cross_attention(p, x, memory, n, sees=None, **options):
    """The library's `cross_attention`: queries from x, keys and values from a memory."""
    q, k, v = dense(p["query"], x), dense(p["key"], memory), dense(p["value"], memory)
    return dense(p["out"], joined(attend(*(heads(a, n) for a in (q, k, v)), sees, **options)))


def lstm(p, x, state=None):
    """The outputs of an LSTM from a state (h, c), zeros if it is None, and the last state."""
    import torch

    weights = [p["weight"].mT, p["recurrent"].mT, p["bias"], torch.zeros_like(p["bias"])]
    memory = x.new_zeros(len(x), len(p["bias"]) // 4)
    output = x.new_zeros(len(x), len(p["recurrent"]))
    if "projection" in p:
        weights.append(p["projection"].mT)
    h, c = state or (output, memory)
    y, h, c = torch.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, False, False, True)
    return y, (h[0], c[0])


def cross_entropy(logits, labels):
    """The value of each example; summed over positions, if there are any."""
    values = _functional().cross_entropy(first(logits), labels, reduction="none")
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def binary_cross_entropy(logits, targets):
    """The value of each example, summed over all outputs."""
    values = _functional().binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), reduction="none"
    )
    return values.flatten(1).sum(1)


def squared_error(outputs, targets):
    """Half the squared distance of each example."""
    return ((outputs - targets) ** 2).flatten(1).sum(1) / 2
