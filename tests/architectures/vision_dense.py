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
}
