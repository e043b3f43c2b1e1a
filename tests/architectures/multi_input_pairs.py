"""Networks that compare inputs: each goes through a network, and the results are compared."""

import torch_functions as t
from architecture import Among, Architecture, Tokens

import jaxbp as bp


def of_image():
    """A small convolutional network: an image becomes a vector."""
    return bp.chain(
        *(bp.conv(3, (3, 3)), bp.relu(), bp.max_pool((2, 2)), bp.flatten(), bp.dense(3))
    )


def of_image_torch(p, image):
    conv, _, _, _, out = p
    return t.dense(out, t.max_pool(t.conv(conv, image, padding=1).relu(), 2).flatten(1))


def siamese_network():
    """A siamese net: the same network for both images. The loss compares the two vectors."""
    return bp.shared(of_image())


def siamese_network_torch(p, images, are_similar):
    distances = (of_image_torch(p, images[0]) - of_image_torch(p, images[1])).norm(dim=-1)
    similar, other = distances**2 / 2, (3 - distances).relu() ** 2 / 2
    return similar.where(are_similar == 1, other)


def triplet_network():
    """FaceNet: an image is nearer to one of the same person than to one of another, by a margin.

    Inputs are (anchor, positive, negative), three images. Outputs are the squared distances of the
    negative and of the positive from the anchor: the first has to be the larger one.
    """

    def from_anchor(k):
        return bp.chain(bp.fork(bp.select(0), bp.select(k)), bp.distance("squared"))

    return bp.chain(bp.shared(of_image(), bp.l2_norm()), bp.fork(from_anchor(2), from_anchor(1)))


def triplet_network_torch(p, images, ones):
    from torch.nn.functional import normalize

    anchor, positive, negative = (normalize(of_image_torch(p[0][0], image)) for image in images)
    near, far = ((anchor - x).pow(2).sum(-1) for x in (positive, negative))
    return (near - far + 4).relu()


def two_towers():
    """DSSM: a query and three documents become vectors, and cosines are the logits.

    Inputs are (query, (document, document, document)), as counts of letters.
    """

    def tower():
        return bp.dense(5), bp.tanh(), bp.dense(4), bp.tanh()

    def cosine(k):
        document = bp.chain(bp.select(1), bp.select(k))
        return bp.chain(bp.fork(bp.select(0), document), bp.cosine_similarity())

    return bp.chain(
        *(bp.on(0, *tower()), bp.on(1, bp.shared(*tower()))),
        *(bp.fork(*map(cosine, range(3))), bp.concatenate(), bp.scale(5.0)),
    )


def two_towers_torch(p, inputs, clicked):
    import torch

    def tower(p, x):
        hidden, _, out, _ = p
        return t.dense(out, t.dense(hidden, x).tanh()).tanh()

    of_query, of_document, *_ = p
    query, documents = inputs
    query = tower(of_query, query)[:, None]
    documents = torch.stack([tower(of_document, x) for x in documents], 1)
    return t.cross_entropy(5 * torch.cosine_similarity(query, documents, -1), clicked)


ARCHITECTURES = {
    "siamese": Architecture(
        "Dimensionality Reduction by Learning an Invariant Mapping, Hadsell, Chopra, LeCun, 2006; "
        "Signature Verification using a Siamese Time Delay Neural Network, Bromley, Guyon, LeCun, "
        "Saeckinger, Shah, 1993",
        siamese_network,
        ((4, 4, 1), (4, 4, 1)),
        bp.make_contrastive(margin=3.0),
        Among((-1, 1)),
        siamese_network_torch,
    ),
    "FaceNet": Architecture(
        "FaceNet: A Unified Embedding for Face Recognition and Clustering, Schroff, Kalenichenko, "
        "Philbin, 2015",
        triplet_network,
        ((4, 4, 1), (4, 4, 1), (4, 4, 1)),
        bp.make_margin_ranking(margin=4.0),
        Among((1,), (1,)),
        triplet_network_torch,
    ),
    "DSSM": Architecture(
        "Learning Deep Structured Semantic Models for Web Search using Clickthrough Data, Huang, "
        "He, Gao, Deng, Acero, Heck, 2013",
        two_towers,
        ((6,), ((6,), (6,), (6,))),
        bp.softmax_cross_entropy,
        Tokens(3),
        two_towers_torch,
    ),
}
