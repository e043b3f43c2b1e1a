"""Networks with an answer for each pixel, or for each object of an image."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def unet():
    """U-Net: what is seen at each resolution is concatenated to what comes up from below it."""

    def convolutions(features):
        return [bp.conv(features, (3, 3)), bp.relu(), bp.conv(features, (3, 3)), bp.relu()]

    def level(features, *below):
        up = bp.conv_transpose(features, (2, 2), strides=2)
        deeper = bp.chain(bp.max_pool((2, 2)), *below, up)
        skip = bp.parallel(bp.chain(), deeper, combine="concatenate")
        return bp.chain(*convolutions(features), skip, *convolutions(features))

    bottom = convolutions(3)
    return bp.chain(level(2, *bottom), bp.conv(3, (1, 1)))  # level(2, level(3, ...)) is deeper


def unet_torch(p, x, labels):
    def convolutions(first, second, x):
        return t.conv(second, t.conv(first, x, padding=1).relu(), padding=1).relu()

    (down1, _, down2, _, (_, deeper), up1, _, up2, _), classes = p
    _, bottom1, _, bottom2, _, up = deeper
    seen = convolutions(down1, down2, x)
    below = convolutions(bottom1, bottom2, t.max_pool(seen, 2))
    joined = t.concatenate([seen, t.conv_transpose(up, below, stride=2)])
    return t.cross_entropy(t.conv(classes, convolutions(up1, up2, joined)), labels)


def fully_convolutional():
    """FCN: scores of the last stage are enlarged and added to those of the stage before."""

    def stage(features):
        return [bp.conv(features, (3, 3)), bp.relu(), bp.max_pool((2, 2))]

    def enlarged(factor):
        return bp.conv_transpose(3, (2 * factor,) * 2, strides=factor, use_bias=False)

    fine_scores = bp.conv(3, (1, 1))
    coarse_scores = bp.chain(*stage(5), bp.conv(3, (1, 1)), enlarged(2))
    return bp.chain(*stage(4), bp.parallel(fine_scores, coarse_scores), enlarged(2))


def fully_convolutional_torch(p, x, labels):
    def stage(p, x):
        return t.max_pool(t.conv(p, x, padding=1).relu(), 2)

    stage1, _, _, (fine_scores, (stage2, _, _, coarse_scores, enlarge1)), enlarge2 = p
    x = stage(stage1, x)
    coarse = t.conv(coarse_scores, stage(stage2, x))
    coarse = t.conv_transpose(enlarge1, coarse, stride=2, padding=1)
    scores = t.conv(fine_scores, x) + coarse
    return t.cross_entropy(t.conv_transpose(enlarge2, scores, stride=2, padding=1), labels)


def deeplab():
    """DeepLabv3: dilated convolutions of different reach, and a mean of the whole image."""

    def unit(features, size, dilation=1):
        return bp.conv(features, (size, size), dilation=dilation), bp.relu()

    whole_image = [bp.adaptive_pool((1, 1)), *unit(3, 1), bp.resize((4, 4))]
    pyramid = bp.parallel(
        *(bp.chain(*unit(3, 1)), bp.chain(*unit(2, 3, 1)), bp.chain(*unit(2, 3, 2))),
        bp.chain(*whole_image),
        combine="concatenate",
    )
    backbone = bp.chain(*unit(3, 3), bp.max_pool((2, 2)), *unit(4, 3, 2))
    return bp.chain(backbone, pyramid, *unit(4, 1), bp.conv(3, (1, 1)), bp.resize((8, 8)))


def deeplab_torch(p, x, labels):
    from torch.nn.functional import interpolate

    (stem, _, _, dilated, _), ((one, _), (three, _), (wide, _), (_, whole, *_)), *head = p
    x = t.max_pool(t.conv(stem, x, padding=1).relu(), 2)
    x = t.conv(dilated, x, padding=2, dilation=2).relu()
    seen = [
        t.conv(one, x),
        t.conv(three, x, padding=1),
        t.conv(wide, x, padding=2, dilation=2),
        t.conv(whole, x.mean((1, 2), keepdim=True)).expand(-1, 4, 4, -1),
    ]
    hidden, _, classes, _ = head
    scores = t.conv(classes, t.conv(hidden, t.concatenate(seen).relu()).relu())
    large = interpolate(t.first(scores), (8, 8), mode="bilinear", align_corners=False)
    return t.cross_entropy(t.last(large), labels)


def espcn():
    """ESPCN: convolutions at low resolution, whose last channels become pixels of a large one."""
    pixel_shuffle = bp.chain(
        bp.reshape(4, 4, 1, 2, 2), bp.permute(0, 3, 1, 4, 2), bp.reshape(8, 8, 1)
    )
    return bp.chain(
        *(bp.conv(4, (5, 5)), bp.tanh(), bp.conv(3, (3, 3)), bp.tanh()),
        *(bp.conv(4, (3, 3)), pixel_shuffle),
    )


def espcn_torch(p, x, images):
    from torch.nn.functional import pixel_shuffle

    conv1, _, conv2, _, conv3, _ = p
    x = t.conv(conv2, t.conv(conv1, x, padding=2).tanh(), padding=1).tanh()
    pixels = pixel_shuffle(t.first(t.conv(conv3, x, padding=1)), 2)
    return t.squared_error(t.last(pixels), images)


def retinanet():
    """RetinaNet: a feature pyramid, and one head for all of its levels.

    Coarse features are enlarged and added to fine ones, so that both levels know what is seen.
    """

    def stage(features):
        return bp.chain(bp.conv(features, (3, 3)), bp.relu(), bp.max_pool((2, 2)))

    levels = bp.chain(stage(3), bp.fork(bp.chain(), stage(4)))
    lateral = bp.chain(bp.on(0, bp.conv(3, (1, 1))), bp.on(1, bp.conv(3, (1, 1))))
    merged = bp.chain(bp.on(1, bp.upsample(2)), bp.add())
    pyramid = bp.fork(merged, bp.select(1))
    head = bp.shared(bp.conv(3, (3, 3)), bp.relu(), bp.conv(2, (3, 3)))
    return bp.chain(levels, lateral, pyramid, head)


def retinanet_torch(p, x, targets):
    def stage(p, x):
        return t.max_pool(t.conv(p[0], x, padding=1).relu(), 2)

    def focal(logits, targets):
        right = (logits.sigmoid() - (1 - targets)).abs()
        return (-((1 - right) ** 2) * right.log()).flatten(1).sum(1)

    (stage1, (_, stage2)), (lateral1, lateral2), _, (hidden, _, scores) = p
    fine = stage(stage1, x)
    coarse = t.conv(lateral2, stage(stage2, fine))
    fine = t.conv(lateral1, fine) + coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    outputs = (
        t.conv(scores, t.conv(hidden, level, padding=1).relu(), padding=1)
        for level in (fine, coarse)
    )
    return sum(focal(logits, own) for logits, own in zip(outputs, targets, strict=True))


def detr():
    """DETR: learned queries attend to an image, and each answers with a class and a box.

    The loss is that of targets which are matched to the queries already.
    """

    def mlp():
        return bp.residual(bp.dense(6), bp.relu(), bp.dense(4)), bp.layer_norm()

    image = bp.chain(bp.conv(4, (2, 2), strides=2), bp.reshape(9, 4), bp.learned_positions(9))
    encoder = bp.chain(bp.residual(bp.attention(4, 2)), bp.layer_norm(), *mlp())
    queries = bp.chain(bp.prepend(2), bp.take(slice(0, 2)))
    decoder = bp.chain(
        bp.on(0, bp.residual(bp.attention(4, 2)), bp.layer_norm()),
        bp.residual(bp.cross_attention(4, 2), at=0),
        bp.on(0, bp.layer_norm(), *mlp()),
        bp.select(0),
    )
    answers = bp.fork(bp.dense(3), bp.chain(bp.dense(4), bp.relu(), bp.dense(4), bp.sigmoid()))
    return bp.chain(image, encoder, bp.fork(queries, bp.chain()), decoder, answers)


def detr_torch(p, x, targets):
    def mlp(hidden, out, norm, x):
        return t.layer_norm(norm, x + t.dense(out, t.dense(hidden, x).relu()))

    (patches, _, positions), encoder, ((queries, _), _), decoder, answers = p
    attention, norm1, (hidden, _, out), norm2 = encoder
    memory = t.conv(patches, x, stride=2).flatten(1, 2) + positions["weight"]
    memory = t.layer_norm(norm1, memory + t.self_attention(attention, memory, 2))
    memory = mlp(hidden, out, norm2, memory)

    (attention, norm1), cross, (norm2, (hidden, _, out), norm3), _ = decoder
    x = queries["weight"].expand(len(x), 2, 4)
    x = t.layer_norm(norm1, x + t.self_attention(attention, x, 2))
    x = t.layer_norm(norm2, x + t.cross_attention(cross, x, memory, 2))
    x = mlp(hidden, out, norm3, x)

    (classes, (hidden, _, box, _)), (labels, boxes) = answers, targets
    errors = (t.dense(box, t.dense(hidden, x).relu()).sigmoid() - boxes).abs().sum((1, 2))
    return t.cross_entropy(t.dense(classes, x), labels) + errors


ARCHITECTURES = {
    "U-Net": Architecture(
        "U-Net: Convolutional Networks for Biomedical Image Segmentation, Ronneberger, Fischer, "
        "Brox, 2015",
        unet,
        (4, 4, 1),
        bp.softmax_cross_entropy,
        Tokens(3, (4, 4)),
        unet_torch,
    ),
    "FCN": Architecture(
        "Fully Convolutional Networks for Semantic Segmentation, Long, Shelhamer, Darrell, 2015",
        fully_convolutional,
        (8, 8, 3),
        bp.softmax_cross_entropy,
        Tokens(3, (8, 8)),
        fully_convolutional_torch,
    ),
    "DeepLabv3": Architecture(
        "Rethinking Atrous Convolution for Semantic Image Segmentation, Chen, Papandreou, "
        "Schroff, Adam, 2017",
        deeplab,
        (8, 8, 3),
        bp.softmax_cross_entropy,
        Tokens(3, (8, 8)),
        deeplab_torch,
    ),
    "ESPCN": Architecture(
        "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel "
        "Convolutional Neural Network, Shi, Caballero, Huszar, Totz, Aitken, Bishop, Rueckert, "
        "Wang, 2016",
        espcn,
        (4, 4, 1),
        bp.squared_error,
        (8, 8, 1),
        espcn_torch,
    ),
    "RetinaNet": Architecture(
        "Focal Loss for Dense Object Detection, Lin, Goyal, Girshick, He, Dollar, 2017; with "
        "Feature Pyramid Networks for Object Detection, Lin, Dollar, Girshick, He, Hariharan, "
        "Belongie, 2017",
        retinanet,
        (8, 8, 3),
        bp.joint_loss((bp.make_sigmoid_focal(), bp.make_sigmoid_focal())),
        (Tokens(2, (4, 4, 2)), Tokens(2, (2, 2, 2))),
        retinanet_torch,
    ),
    "DETR": Architecture(
        "End-to-End Object Detection with Transformers, Carion, Massa, Synnaeve, Usunier, "
        "Kirillov, Zagoruyko, 2020",
        detr,
        (6, 6, 3),
        bp.joint_loss((bp.softmax_cross_entropy, bp.absolute_error)),
        (Tokens(3, (2,)), (2, 4)),
        detr_torch,
    ),
}
