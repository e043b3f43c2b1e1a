"""The same training three times: by jaxbp, by PyTorch and by scikit-learn.

Each is written as its own users write it, and gives a run of all epochs from the same start that
returns the mean loss of the last one.
"""

import copy
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp
from experiments.common.measuring import compile_program, cores, measure

LOSS = bp.softmax_cross_entropy
ACTIVATIONS = {"relu": (bp.relu, jax.nn.relu), "gelu": (bp.gelu, jax.nn.gelu)}
OPTIMIZERS = {
    "SGD": (optax.sgd(0.02, momentum=0.9), {"lr": 0.02, "momentum": 0.9}),
    "Adam": (optax.adam(1e-3), {"lr": 1e-3}),
}


class Training(NamedTuple):
    """Epochs of a relu network on this many examples."""

    sizes: tuple[int, ...]
    examples: int
    batch: int
    optimizer: str
    epochs: int

    def __str__(self):
        sizes = "-".join(map(str, self.sizes))
        return f"{sizes}, {self.optimizer}, {self.examples} in batches of {self.batch}"


def make_net(sizes, activation="relu"):
    make, _ = ACTIVATIONS[activation]
    layers = []
    for units in sizes[1:-1]:
        layers += [bp.dense(units, dtype=jnp.float32), make()]
    return bp.chain(*layers, bp.dense(sizes[-1], dtype=jnp.float32))


def mean_cross_entropy(logits, labels):
    """The mean over examples of the sum over positions, if there are any."""
    terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(terms) / len(terms)


def plain_mean_loss(activation="relu"):
    """The mean loss of the same network without the library, as one would write it for autodiff."""
    _, function = ACTIVATIONS[activation]

    def mean_loss(params, x, labels):
        *hidden, last = params[::2]
        for layer in hidden:
            x = function(x @ layer["weight"] + layer["bias"])
        logits = x @ last["weight"] + last["bias"]
        return mean_cross_entropy(logits, labels)

    return mean_loss


def train_jaxbp(case, inputs, labels, seed):
    """A run of all epochs from the same start, which returns the last one's loss; its program."""
    net, (optimizer, _) = make_net(case.sizes), OPTIMIZERS[case.optimizer]
    start = bp.init_state(net, optimizer, jax.random.key(seed), case.sizes[:1])
    data = jnp.asarray(inputs), jnp.asarray(labels)
    epoch = bp.make_epoch(net, LOSS, optimizer, batch_size=case.batch)
    program = compile_program(epoch, start, *data)

    def run():
        state = start
        for _ in range(case.epochs):
            state, record = program.compiled(state, *data)
        return float(jax.block_until_ready((state, record))[1]["loss"])

    return run, program


def train_torch(case, inputs, labels, seed):
    """The same in PyTorch, with one thread or as many as there are cores: whichever is faster."""
    import torch

    torch.manual_seed(seed)
    layers = []
    for i, o in zip(case.sizes[:-2], case.sizes[1:-1], strict=True):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    start = torch.nn.Sequential(*layers, torch.nn.Linear(*case.sizes[-2:]))
    loss_function = torch.nn.CrossEntropyLoss()
    make_optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[case.optimizer]
    x, t = torch.from_numpy(inputs), torch.from_numpy(labels).long()

    def run():
        model = copy.deepcopy(start)
        optimizer = make_optimizer(model.parameters(), **OPTIMIZERS[case.optimizer][1])
        for _ in range(case.epochs):
            total = torch.zeros(())
            for indices in torch.randperm(len(x)).split(case.batch):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_function(model(x[indices]), t[indices])
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(indices)
        return float(total) / len(x)

    seconds = {}
    for threads in sorted({1, cores()}):
        torch.set_num_threads(threads)
        seconds[threads] = float(measure([run], 1)[0, 0])
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    return f"PyTorch, {best} thread{'s' * (best > 1)}", run


def train_sklearn(case, inputs, labels, seed):
    """The same in scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier(
        case.sizes[1:-1],
        solver=case.optimizer.lower(),
        alpha=0,
        batch_size=case.batch,
        learning_rate_init=OPTIMIZERS[case.optimizer][1]["lr"],
        momentum=0.9,
        nesterovs_momentum=False,
        max_iter=case.epochs,
        tol=0,
        n_iter_no_change=case.epochs + 1,
        random_state=seed,
    )

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is to stop when told to
            return float(classifier.fit(inputs, labels).loss_)

    return "scikit-learn", run
