"""Networks of patches: ConvMixer, and transformers of images."""

import numpy as np
import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def convmixer():
    """ConvMixer: patches, then convolutions that mix positions and channels in turn."""

    def activated(convolution):
        return convolution, bp.gelu(approximate=False), bp.group_norm(1)

    along_positions = bp.residual(*activated(bp.conv(4, (3, 3), groups=4)))
    along_channels = bp.chain(*activated(bp.conv(4, (1, 1))))
    patches = bp.chain(*activated(bp.conv(4, (2, 2), strides=2)))
    return bp.chain(patches, along_positions, along_channels, bp.global_pool(), bp.dense(3))


def convmixer_torch(p, x, labels):
    def activated(p, x, **options):
        convolution, _, norm = p
        return t.group_norm(norm, t.gelu(t.conv(convolution, x, **options)), 1)

    patches, along_positions, along_channels, _, logits = p
    x = activated(patches, x, stride=2)
    x = x + activated(along_positions, x, padding=1, groups=4)
    x = activated(along_channels, x)
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


def vit():
    """ViT: patches as a sequence, with a class token in front and learned positions."""
    patches = bp.chain(bp.conv(4, (2, 2), strides=2), bp.reshape(-1, 4))
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(4, 2)),
        bp.residual(bp.layer_norm(), bp.dense(8), bp.gelu(approximate=False), bp.dense(4)),
    )
    return bp.chain(
        *(patches, bp.prepend(), bp.learned_positions(10), block),
        *(bp.take(0), bp.layer_norm(), bp.dense(3)),
    )


def vit_torch(p, x, labels):
    (patches, _), token, positions, ((norm1, attention), (norm2, widen, _, narrow)), *head = p
    x = t.conv(patches, x, stride=2).flatten(1, 2)
    x = t.prepended(token["weight"], x)
    x = x + positions["weight"][: x.shape[1]]
    x = x + t.self_attention(attention, t.layer_norm(norm1, x), 2)
    x = x + t.dense(narrow, t.gelu(t.dense(widen, t.layer_norm(norm2, x))))
    _, norm, logits = head
    return t.cross_entropy(t.dense(logits, t.layer_norm(norm, x[:, 0])), labels)


def mixer():
    """MLP-Mixer: an MLP across the patches, and one across the channels, in turn."""

    def mlp(hidden, features):
        return bp.dense(hidden), bp.gelu(approximate=False), bp.dense(features)

    patches = bp.chain(bp.conv(4, (2, 2), strides=2), bp.reshape(-1, 4))
    across_patches = bp.residual(bp.layer_norm(), bp.permute(1, 0), *mlp(5, 9), bp.permute(1, 0))
    across_channels = bp.residual(bp.layer_norm(), *mlp(6, 4))
    return bp.chain(
        *(patches, across_patches, across_channels),
        *(bp.layer_norm(), bp.global_pool(), bp.dense(3)),
    )


def mixer_torch(p, x, labels):
    def mlp(hidden, out, x):
        return t.dense(out, t.gelu(t.dense(hidden, x)))

    (patches, _), (norm1, _, hidden1, _, out1, _), (norm2, hidden2, _, out2), norm3, _, logits = p
    x = t.conv(patches, x, stride=2).flatten(1, 2)
    x = x + mlp(hidden1, out1, t.layer_norm(norm1, x).mT).mT
    x = x + mlp(hidden2, out2, t.layer_norm(norm2, x))
    return t.cross_entropy(t.dense(logits, t.layer_norm(norm3, x).mean(1)), labels)


def swin():
    """Swin: attention within windows, which are shifted in every second block; then patches merge.

    A mask of pairs says which positions share a window. Those of a shifted window that crosses the
    border of the image are as many smaller windows.
    """

    def windows(shift):
        """Which of the 4 x 4 positions share a window of 2 x 2, [16, 16]."""
        row, column = np.divmod(np.arange(16), 4)
        window = np.stack([(row + shift) // 2, (column + shift) // 2])
        return np.all(window[:, :, None] == window[:, None, :], axis=0)

    def relative_bias():
        """A number for each offset between two positions, and each head, [1, 2, 16, 16]."""
        row, column = np.divmod(np.arange(16), 4)
        offsets = row[:, None] - row, column[:, None] - column
        return np.stack([np.sin(offsets[0] + 2 * offsets[1]), np.cos(offsets[0] - offsets[1])])[
            None
        ]

    def block(features, **options):
        return bp.chain(
            bp.residual(bp.layer_norm(), bp.attention(features, 2, **options)),
            bp.residual(bp.layer_norm(), bp.dense(6), bp.gelu(approximate=False), bp.dense(4)),
        )

    merge = bp.chain(
        *(bp.reshape(2, 2, 2, 2, 4), bp.permute(0, 2, 1, 3, 4), bp.reshape(4, 16)),
        *(bp.layer_norm(), bp.dense(4, use_bias=False)),
    )
    return bp.chain(
        *(bp.conv(4, (2, 2), strides=2), bp.reshape(16, 4), bp.layer_norm()),
        *(block(4, pair_mask=windows(shift), bias=relative_bias()) for shift in (0, 1)),
        *(merge, block(4)),
        *(bp.layer_norm(), bp.global_pool(), bp.dense(3)),
    )


def swin_torch(p, x, labels):
    """As in the paper: the image is rolled, cut into windows, and put together again."""
    import torch

    row, column = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    rows, columns = (row[:, None] - row).to(x.dtype), (column[:, None] - column).to(x.dtype)
    bias = torch.stack([torch.sin(rows + 2 * columns), torch.cos(rows - columns)])

    def cut(x):
        """The four windows of images [N, 4, 4, C] as examples, [4 N, 4, C]."""
        return (
            x.unflatten(1, (2, 2)).unflatten(3, (2, 2)).transpose(2, 3).reshape(-1, 4, x.shape[-1])
        )

    def whole(windows):
        images = windows.reshape(-1, 2, 2, 2, 2, windows.shape[-1])
        return images.transpose(2, 3).reshape(-1, 4, 4, windows.shape[-1])

    def windowed(p, x, shift):
        regions = torch.arange(4) < 4 - shift  # what was rolled across the border
        regions = (2 * regions[:, None] + regions)[None, :, :, None].expand(len(x), 4, 4, 1)
        regions = cut(regions)
        x = cut(x.roll((-shift, -shift), (1, 2)))
        queries_keys_values, _, out = p
        q, k, v = (t.heads(a, 2) for a in t.dense(queries_keys_values, x).chunk(3, -1))
        sees = (regions == regions.mT)[:, None]
        y = t.dense(out, t.joined(t.attend(q, k, v, sees, bias)))
        return whole(y).roll((shift, shift), (1, 2))

    def block(p, x, attend):
        (norm1, attention), (norm2, widen, _, narrow) = p
        x = x + attend(attention, t.layer_norm(norm1, x))
        return x + t.dense(narrow, t.gelu(t.dense(widen, t.layer_norm(norm2, x))))

    patches, _, norm1, block1, block2, merge, block3, norm2, _, logits = p
    x = t.layer_norm(norm1, t.conv(patches, x, stride=2))
    x = block(block1, x, lambda p, x: windowed(p, x, 0))
    x = block(block2, x, lambda p, x: windowed(p, x, 1))
    x = cut(x).reshape(-1, 4, 16)
    x = t.dense(merge[4], t.layer_norm(merge[3], x))
    x = block(block3, x, lambda p, x: t.self_attention(p, x, 2))
    return t.cross_entropy(t.dense(logits, t.layer_norm(norm2, x).mean(1)), labels)


ARCHITECTURES = {
    "ConvMixer": Architecture(
        "Patches Are All You Need?, Trockman, Kolter, 2022",
        convmixer,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        convmixer_torch,
    ),
    "ViT": Architecture(
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, Dosovitskiy, "
        "Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer, Heigold, Gelly, "
        "Uszkoreit, Houlsby, 2021",
        vit,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        vit_torch,
    ),
    "MLP-Mixer": Architecture(
        "MLP-Mixer: An all-MLP Architecture for Vision, Tolstikhin, Houlsby, Kolesnikov, Beyer, "
        "Zhai, Unterthiner, Yung, Steiner, Keysers, Uszkoreit, Lucic, Dosovitskiy, 2021",
        mixer,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        mixer_torch,
    ),
    "Swin Transformer": Architecture(
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, Liu, Lin, Cao, "
        "Hu, Wei, Zhang, Lin, Guo, 2021",
        swin,
        (8, 8, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        swin_torch,
    ),
}
