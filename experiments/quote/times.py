"""How long the command of each experiment takes."""

import subprocess
import sys
import time

from experiments.quote.text import OTHERS, Quote, table

QUESTIONS = {
    "explorer": "What does the backward pass look like, step by step, in a page that one can "
    "touch?",
    "perceptron": "How does one gradient step move the line of a single sigmoid unit?",
    "multilayer": "How do hidden units combine to a boundary that bends?",
    "digits": "Does a network trained by explicit backpropagation read handwritten digits?",
    "mislabeled": "Which training labels are wrong?",
    "private": "How much accuracy does differential privacy cost?",
    "curvature": "How many steps does KFAC save over Adam and SGD?",
    "alignment": "Do networks learn when other weights than their own carry the error back?",
    "ensemble": "Is it faster to train many networks by one `vmap`?",
    "gpt": "Does a small GPT learn to write, and what does one sweep say about its training?",
    "memory": "Which ways of assigning credit through time bridge which delay?",
    "scaling": "How does the cost of a sweep grow with the batch, the network and the devices?",
}


def measure_times(out):
    seconds = {}
    for name in QUESTIONS:
        started = time.perf_counter()
        command = [sys.executable, "-m", f"experiments.{name}", "--out", str(out / OTHERS)]
        subprocess.run(command, check=True)
        seconds[name] = time.perf_counter() - started
    return seconds


def write_times(found):
    places = {"scaling": "several-devices-and-hosts"}
    rows = [
        (f"[{name}](#{places.get(name, name)})", question, f"{found[name]:.0f} s")
        for name, question in QUESTIONS.items()
    ]
    return (
        f"{table(('experiment', 'question', 'time'), *rows)}\n\nA time is that of the whole "
        "command with its defaults, compilation included. Measured on DATE, with LOAD."
    )


QUOTES = {"times": Quote(measure_times, {"times": write_times})}
