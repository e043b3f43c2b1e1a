"""Networks that make images and vectors from a code or from noise, and those that learn the code.

A loss is a function of outputs and targets to the value of each example and its derivative. Two of
these are written here, because they add a term that depends on outputs alone.
"""

import jax.numpy as jnp
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


def leaky(x):
    return x.maximum(0.2 * x)


def discriminator_torch(p, x):
    conv1, _, conv2, norm, _, _, logit = p
    x = leaky(t.conv(conv1, x, stride=2, padding=1))
    x = leaky(t.group_norm(norm, t.conv(conv2, x, stride=2, padding=1), 2))
    return t.dense(logit, x.flatten(1))


def gan_torch(p, noise, wanted):
    images = generator_torch(p[0], noise)
    return t.binary_cross_entropy(discriminator_torch(p[1], images), wanted)


def style_gan():
    """StyleGAN's generator, and DCGAN's discriminator after it.

    A mapped code says at every step how to scale and shift each channel. Inputs are (code, noise);
    the first image is a learned constant.
    """
    mapping = bp.chain(bp.select(0), *(bp.dense(4), bp.leaky_relu(0.2)) * 2)
    as_sequence = bp.chain(bp.select(0), bp.reshape(1, 3))
    constant = bp.chain(as_sequence, bp.prepend(16), bp.take(slice(0, 16)), bp.reshape(4, 4, 3))

    def styled():
        """Of (image, style, noise): each channel is normalised, scaled and shifted."""
        normalised = bp.chain(bp.select(0), bp.group_norm(3, use_gain=False, use_bias=False))
        scale, shift = (bp.chain(bp.select(1), bp.dense(3)) for _ in range(2))
        return bp.chain(bp.fork(bp.gated(normalised, scale), shift), bp.add())

    def step():
        noise = bp.chain(bp.select(2), bp.conv(3, (1, 1), use_bias=False))
        return bp.chain(
            *(bp.residual(noise, at=0), bp.on(0, bp.leaky_relu(0.2))),
            bp.fork(styled(), bp.select(1), bp.select(2)),
        )

    return bp.chain(
        *(bp.fork(constant, mapping, bp.select(1)), step(), bp.on(0, bp.conv(3, (3, 3))), step()),
        *(bp.select(0), bp.conv(1, (1, 1)), discriminator()),
    )


def style_gan_torch(p, inputs, wanted):
    def step(p, image, style):
        (_, own_noise), _, ((((_, (_, scale)), (_, shift)), _), _, _) = p
        image = leaky(image + t.conv(own_noise, noise))
        mean = image.mean((1, 2), keepdim=True)
        variance = ((image - mean) ** 2).mean((1, 2), keepdim=True)
        factors, terms = (t.dense(p, style)[:, None, None, :] for p in (scale, shift))
        return (image - mean) / (variance + 1e-5).sqrt() * factors + terms

    code, noise = inputs
    ((_, constant, _, _), (_, map1, _, map2, _), _), step1, convolution, step2, _, rgb, judge = p
    style = leaky(t.dense(map2, leaky(t.dense(map1, code))))
    image = step(step1, constant["weight"].reshape(1, 4, 4, 3), style)
    image = step(step2, t.conv(convolution, image, padding=1), style)
    return t.binary_cross_entropy(discriminator_torch(judge, t.conv(rgb, image)), wanted)


def exp():
    return bp.elementwise(jnp.exp, jnp.exp, name="exp")


def variational_autoencoder():
    """A VAE: the code is a mean plus a learned deviation times noise, which is a second input.

    Inputs are (pixels, noise), outputs (logits of the pixels, means and log-variances).
    """
    encoder = bp.chain(bp.dense(5), bp.tanh(), bp.dense(4))
    mean = bp.chain(bp.select(0), bp.take(slice(0, 2), axis=-1))
    deviation = bp.chain(bp.select(0), bp.take(slice(2, 4), axis=-1), bp.scale(0.5), exp())
    code = bp.chain(bp.fork(mean, bp.gated(bp.select(1), deviation)), bp.add())
    decoder = bp.chain(bp.dense(5), bp.tanh(), bp.dense(6))
    return bp.chain(bp.on(0, encoder), bp.fork(bp.chain(code, decoder), bp.select(0)))


def variational_autoencoder_torch(p, inputs, targets):
    import torch
    from torch.distributions import Normal, kl_divergence

    (hidden, _, code_of), ((_, (widen, _, logits)), _) = p
    x, noise = inputs
    mean, log_variance = t.dense(code_of, t.dense(hidden, x).tanh()).chunk(2, -1)
    posterior = Normal(mean, torch.exp(log_variance / 2))
    code = posterior.mean + posterior.stddev * noise
    prior = Normal(torch.zeros(()).to(x), torch.ones(()).to(x))
    reconstruction = t.dense(logits, t.dense(widen, code).tanh())
    divergences = kl_divergence(posterior, prior).sum(-1)
    return t.binary_cross_entropy(reconstruction, targets[0]) + divergences


def real_nvp():
    """RealNVP: two couplings, in each of which one half says how to scale and shift the other.

    Outputs are ((z, log-scales of the second), log-scales of the first).
    """

    def coupling(seen, moved):
        hidden = [bp.take(seen), bp.dense(4), bp.tanh(), bp.dense(2)]
        log_scales, shifts = bp.chain(*hidden, bp.tanh()), bp.chain(*hidden)
        scaled = bp.gated(bp.select(1), bp.chain(bp.select(2), exp()))
        shifted = bp.chain(bp.fork(scaled, bp.select(3)), bp.add())
        return bp.chain(
            bp.fork(bp.take(seen), bp.take(moved), log_scales, shifts),
            bp.fork(bp.chain(bp.fork(bp.select(0), shifted), bp.concatenate()), bp.select(2)),
        )

    first, second = slice(0, 2), slice(2, 4)
    return bp.chain(coupling(first, second), bp.on(0, coupling(second, first)))


def flow_nll(outputs, targets):
    """The negative log-likelihood: sum z^2 / 2 for a normal z, less the log-determinant."""
    del targets
    (z, s2), s1 = outputs
    values = jnp.sum(z**2, axis=-1) / 2 - jnp.sum(s1, axis=-1) - jnp.sum(s2, axis=-1)
    return values, ((z, -jnp.ones_like(s2)), -jnp.ones_like(s1))


def real_nvp_torch(p, x, targets):
    """The log-determinant is computed from the Jacobian itself."""
    import torch

    def coupling(p, x):
        (_, _, (_, hidden_scale, _, scale, _), (_, hidden_shift, _, shift)), _ = p
        seen, moved = x[:2], x[2:]
        factor = t.dense(scale, t.dense(hidden_scale, seen).tanh()).tanh().exp()
        return seen, moved * factor + t.dense(shift, t.dense(hidden_shift, seen).tanh())

    def flow(x):
        seen, moved = coupling(p[0], x)
        seen, moved = coupling(p[1], torch.cat([moved, seen]))
        return torch.cat([seen, moved])

    def nll(x):
        jacobian = torch.autograd.functional.jacobian(flow, x, create_graph=True)
        return (flow(x) ** 2).sum() / 2 - torch.linalg.slogdet(jacobian).logabsdet

    return torch.stack([nll(example) for example in x])


def denoising_unet():
    """The U-Net of diffusion models: it predicts noise from a noisy image and the time step.

    Inputs are (image, time step). Every block adds what it computes from the time step.
    """

    def convolution(features):
        return bp.group_norm(1), bp.silu(), bp.conv(features, (3, 3))

    def block(features):
        """Of the pair (image, embedding of the time step)."""
        body = [
            *(bp.on(0, *convolution(features)), bp.on(1, bp.dense(features)), bp.add()),
            *convolution(features),
        ]
        return bp.residual(*body, at=0)

    time = bp.chain(bp.embedding(6, 4), bp.dense(4), bp.silu())
    attention = bp.residual(
        bp.group_norm(1), bp.reshape(4, 2), bp.attention(2, 1), bp.reshape(2, 2, 2)
    )
    deeper = bp.chain(
        *(bp.on(0, bp.avg_pool((2, 2))), block(2), bp.on(0, attention), block(2)),
        *(bp.select(0), bp.upsample(2), bp.conv(2, (3, 3))),
    )
    merged = bp.chain(bp.fork(bp.select(0), deeper), bp.concatenate())
    return bp.chain(
        *(bp.on(0, bp.conv(2, (3, 3))), bp.on(1, time), block(2)),
        *(bp.fork(merged, bp.select(1)), block(4), bp.select(0), *convolution(1)),
    )


def denoising_unet_torch(p, inputs, noise):
    def convolution(p, x):
        norm, _, conv = p
        x = t.group_norm(norm, x, 1)
        return t.conv(conv, x * x.sigmoid(), padding=1)

    def block(p, x, time):
        first, added, _, norm, _, conv = p
        hidden = convolution(first, x) + t.dense(added, time)[:, None, None, :]
        return x + convolution((norm, (), conv), hidden)

    def attend(p, x):
        norm, _, attention, _ = p
        positions = t.group_norm(norm, x, 1).flatten(1, 2)
        return x + t.self_attention(attention, positions, 1).reshape(x.shape)

    stem, (table, hidden, _), block1, (((_, deeper), _), _), block4, _, *last = p
    x, step = inputs
    time = t.dense(hidden, table["weight"][step])
    time = time * time.sigmoid()
    fine = block(block1, t.conv(stem, x, padding=1), time)
    _, block2, attention, block3, _, _, up = deeper
    x = attend(attention, block(block2, t.avg_pool(fine, 2), time))
    x = block(block3, x, time).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = block(block4, t.concatenate([fine, t.conv(up, x, padding=1)]), time)
    return t.squared_error(convolution(last, x), noise)


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
    "StyleGAN": Architecture(
        "A Style-Based Generator Architecture for Generative Adversarial Networks, Karras, Laine, "
        "Aila, 2019",
        style_gan,
        ((3,), (4, 4, 1)),
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        style_gan_torch,
    ),
    "VAE": Architecture(
        "Auto-Encoding Variational Bayes, Kingma, Welling, 2014",
        variational_autoencoder,
        ((6,), (2,)),
        bp.joint_loss((bp.sigmoid_cross_entropy, bp.standard_normal_kl)),
        (Tokens(2, (6,)), None),
        variational_autoencoder_torch,
    ),
    "RealNVP": Architecture(
        "Density estimation using Real NVP, Dinh, Sohl-Dickstein, Bengio, 2017",
        real_nvp,
        (4,),
        flow_nll,
        None,
        real_nvp_torch,
    ),
    "DDPM": Architecture(
        "Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, 2020",
        denoising_unet,
        ((4, 4, 1), Tokens(6)),
        bp.squared_error,
        (4, 4, 1),
        denoising_unet_torch,
    ),
}
