"""Networks that weigh channels or positions by factors, which they compute from all of them."""

import torch_functions as t
from architecture import Architecture, Tokens
from vision_residual import conv3

import jaxbp as bp


def squeeze_excite(channels, activation, gate_activation):
    """A factor for each channel, computed from the means of all channels."""
    return bp.chain(
        bp.global_pool(), bp.dense(3), activation(), bp.dense(channels), gate_activation()
    )


def squeeze_excite_torch(activation, gate_activation):
    def factors(p, x):
        _, squeeze, _, excite, _ = p
        return gate_activation(t.dense(excite, activation(t.dense(squeeze, x.mean((1, 2))))))

    return factors


def gated_resnet(gates):
    """Blocks of a ResNet, each of which weighs its channels, or its positions, before the sum."""

    def block(features):
        return bp.chain(
            bp.residual(
                *(conv3(features), bp.group_norm(2), bp.relu()),
                *(conv3(features), bp.group_norm(2), *gates(features)),
            ),
            bp.relu(),
        )

    return bp.chain(conv3(4), block(4), bp.global_pool(), bp.dense(3))


def gated_resnet_torch(gates):
    def network(p, x, labels):
        stem, ((conv1, norm1, _, conv2, norm2, *own), _), _, logits = p
        x = t.conv(stem, x, padding=1)
        y = t.group_norm(norm1, t.conv(conv1, x, padding=1), 2).relu()
        y = gates(own, t.group_norm(norm2, t.conv(conv2, y, padding=1), 2))
        return t.cross_entropy(t.dense(logits, (x + y).relu().mean((1, 2))), labels)

    return network


def senet_gates(features):
    return [bp.gated(bp.chain(), squeeze_excite(features, bp.relu, bp.sigmoid))]


def senet_gates_torch(p, x):
    factors = squeeze_excite_torch(lambda x: x.relu(), lambda x: x.sigmoid())
    return x * factors(p[0][1], x)[:, None, None, :]


def cbam_gates(features):
    """A factor for each channel, then one for each position, both from means and maxima."""

    def mean_and_max(*layers):
        return bp.fork(
            bp.chain(*layers, bp.global_pool()), bp.chain(*layers, bp.global_pool("max"))
        )

    mlp = bp.shared(bp.dense(2), bp.relu(), bp.dense(features))
    by_channel = bp.chain(mean_and_max(), mlp, bp.add(), bp.sigmoid())
    channels_as_positions = bp.chain(bp.reshape(-1, features), bp.permute(1, 0))
    by_position = bp.chain(
        mean_and_max(channels_as_positions),
        bp.shared(bp.reshape(5, 5, 1)),
        *(bp.concatenate(), bp.conv(1, (3, 3), use_bias=False), bp.sigmoid()),
    )
    return [bp.gated(bp.chain(), by_channel), bp.gated(bp.chain(), by_position)]


def cbam_gates_torch(p, x):
    (_, (_, (hidden, _, out), _, _)), (_, (*_, convolution, _)) = p
    descriptions = x.mean((1, 2)), x.amax((1, 2))
    scores = sum(t.dense(out, t.dense(hidden, d).relu()) for d in descriptions)
    x = x * scores.sigmoid()[:, None, None, :]
    maps = t.concatenate([x.mean(-1, keepdim=True), x.amax(-1, keepdim=True)])
    return x * t.conv(convolution, maps, padding=1).sigmoid()


ARCHITECTURES = {
    "SENet": Architecture(
        "Squeeze-and-Excitation Networks, Hu, Shen, Sun, 2018",
        lambda: gated_resnet(senet_gates),
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        gated_resnet_torch(senet_gates_torch),
    ),
    "CBAM": Architecture(
        "CBAM: Convolutional Block Attention Module, Woo, Park, Lee, Kweon, 2018",
        lambda: gated_resnet(cbam_gates),
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        gated_resnet_torch(cbam_gates_torch),
    ),
}
