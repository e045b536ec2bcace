"""What a method costs, as a run measures it: costs.json, from which the grid's report makes its table."""

import resource
import sys

import torch

from blob_hf.cli.route import Outcome

COSTS_FILE = "costs.json"


def training_costs(outcome: Outcome) -> dict[str, float]:
    """The costs of a finished training or fit.

    Returns:
        trained_parameters: By gradient, over all trainings of the run.
        train_steps, train_runtime [s]: Optimizer steps, and their time with saving and evaluation between them.
        fit_forwards, fit_runtime [s]: Rows that were passed through the network to fit without gradient steps.
        peak_memory [bytes]: Most memory held so far: allocated on the GPU; without one, this process's resident set.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    return {
        "trained_parameters": outcome.trained_parameters,
        "train_steps": outcome.output.global_step,
        "train_runtime": outcome.output.metrics.get("train_runtime", 0.0),
        "fit_forwards": outcome.fit_forwards,
        "fit_runtime": outcome.fit_runtime,
        "peak_memory": memory,
    }
