"""Networks that generate images, sequences and vectors."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def autoencoder():
    """A deep autoencoder of binary pixels: the code in the middle is linear, as in the paper."""
    encoder = [bp.dense(5), bp.sigmoid(), bp.dense(4), bp.sigmoid(), bp.dense(2)]
    decoder = [bp.dense(4), bp.sigmoid(), bp.dense(5), bp.sigmoid(), bp.dense(6)]
    return bp.chain(*encoder, *decoder)


def autoencoder_torch(p, x, pixels):
    encoder1, encoder2, code, decoder1, decoder2, logits = filter(len, p)
    code = t.dense(code, t.dense(encoder2, t.dense(encoder1, x).sigmoid()).sigmoid())
    x = t.dense(decoder2, t.dense(decoder1, code).sigmoid()).sigmoid()
    return t.binary_cross_entropy(t.dense(logits, x), pixels)


def generator():
    """DCGAN's generator: noise, an image of one pixel, grows by transposed convolutions.

    Group norm stands in the place of batch norm, as in `vision_residual`.
    """
    return bp.chain(
        *(bp.conv_transpose(4, (2, 2), padding="VALID"), bp.group_norm(2), bp.relu()),
        *(bp.conv_transpose(4, (4, 4), strides=2), bp.group_norm(2), bp.relu()),
        *(bp.conv_transpose(2, (4, 4), strides=2), bp.tanh()),
    )


def discriminator():
    """DCGAN's discriminator: convolutions with strides and leaky ReLU, without pooling."""
    return bp.chain(
        *(bp.conv(2, (4, 4), strides=2), bp.leaky_relu(0.2)),
        *(bp.conv(4, (4, 4), strides=2), bp.group_norm(2), bp.leaky_relu(0.2)),
        *(bp.flatten(), bp.dense(1)),
    )


def gan():
    """The generator learns through the discriminator, whose answer to its images is to be 1.

    `freeze` would leave out the discriminator's gradients; here they are compared too.
    """
    return bp.chain(generator(), discriminator())


def generator_torch(p, noise):
    grow1, norm1, _, grow2, norm2, _, grow3, _ = p
    x = t.group_norm(norm1, t.conv_transpose(grow1, noise), 2).relu()
    x = t.group_norm(norm2, t.conv_transpose(grow2, x, stride=2, padding=1), 2).relu()
    return t.conv_transpose(grow3, x, stride=2, padding=1).tanh()


def discriminator_torch(p, x):
    def leaky(x):
        return x.maximum(0.2 * x)

    conv1, _, conv2, norm, _, _, logit = p
    x = leaky(t.conv(conv1, x, stride=2, padding=1))
    x = leaky(t.group_norm(norm, t.conv(conv2, x, stride=2, padding=1), 2))
    return t.dense(logit, x.flatten(1))


def gan_torch(p, noise, wanted):
    images = generator_torch(p[0], noise)
    return t.binary_cross_entropy(discriminator_torch(p[1], images), wanted)


ARCHITECTURES = {
    "autoencoder": Architecture(
        "Reducing the Dimensionality of Data with Neural Networks, Hinton, Salakhutdinov, 2006",
        autoencoder,
        (6,),
        bp.sigmoid_cross_entropy,
        Tokens(2, (6,)),
        autoencoder_torch,
    ),
    "DCGAN": Architecture(
        "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial "
        "Networks, Radford, Metz, Chintala, 2016",
        gan,
        (1, 1, 5),
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        gan_torch,
    ),
}
