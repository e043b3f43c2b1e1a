"""scikit-learn's training loop for a relu network. It has no GPU."""

import warnings

from experiments.bench.loops import OPTIMIZERS


def train_sklearn(training, inputs, labels, seed):
    """A run of all epochs that returns the mean loss of the last."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    _, options = OPTIMIZERS[training.optimizer]
    classifier = MLPClassifier(
        training.network.sizes[1:-1],
        solver=training.optimizer.lower(),
        alpha=0,
        batch_size=training.network.n,
        learning_rate_init=options["lr"],
        momentum=0.9,
        nesterovs_momentum=False,
        max_iter=training.epochs,
        tol=0,
        n_iter_no_change=training.epochs + 1,
        random_state=seed,
    )

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are limited on purpose
            return float(classifier.fit(inputs, labels).loss_)

    return run
