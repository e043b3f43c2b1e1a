"""The benchmark, one command: `python -m experiments.bench`.

It compares programs that do the same work and prints ratios of their times, one section after
another; `--update` records the tables in experiments/README.md.

  gradient      the gradient of a perceptron's mean loss, against `jax.value_and_grad`
  training      epochs of training, against PyTorch and scikit-learn
  quantities    per-example norms and other quantities beside the gradient, and the same in peers
  rules         training steps under other feedback weights, and the same in BioTorch
  transformers  a GPT against Flax, PyTorch and autodiff
  convolutions  convolutional networks against the same
  recurrence    LSTM and GRU layers against the same
  lift          models of Flax and Equinox, lifted, against autodiff, jax_privacy and kfac-jax
  fused         training steps that update inside the sweep, against ordinary ones
  health        training steps that record health, against the step alone

How the modules depend on each other, each on those above it only:

  machine       CPU or GPU: sizes, rounds, peak rates
  tables        rows of figures, and tables of rows in markdown
  networks/     each network in the library and in plain JAX, with its data
  quantities    what the library computes beside a gradient
  loops         the library's training step and loop, and the settings that the peers share
  peers/        the same networks, quantities and loops in other libraries
  comparing     measures two programs in turns and makes a row of it
  sections/     the cases, the peers and the wanted figures of each section
  recorded      the tables in experiments/README.md
  runner        the command: flags, and the sections one after another

How times are taken: the two programs take turns in one process, in reversed order every other
round, so that drift and order affect both alike. A figure is the median over the rounds of the
ratio within a round, with the quartiles in parentheses. Compilation is not part of any time.

The first calls after another program has run are slower, because threads sleep and caches are cold:
by up to a third for a small program. A sample of a program that takes less than 10 ms is therefore
many calls, after one that is not timed.

Two further figures come from the compiler and are the same in every run: the bytes that a program
allocates beyond its inputs and outputs, and its FLOP, where the body of a loop counts once. They
show whether a sweep computes something twice.
"""
