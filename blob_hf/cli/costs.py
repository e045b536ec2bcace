"""What a method costs, as a run measures it: costs.json, from which the grid's report makes its table."""

import resource
import sys
from typing import Any

import torch

COSTS_FILE = "costs.json"


def training_costs(trainer: Any, output: Any) -> dict[str, float]:
    """The costs of a finished training or fit.

    Args:
        output: Of `trainer.train`.

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
        "trained_parameters": trainer.trained_parameters,
        "train_steps": output.global_step,
        "train_runtime": output.metrics.get("train_runtime", 0.0),
        "fit_forwards": output.metrics.get("fit_forwards", 0),
        "fit_runtime": output.metrics.get("fit_runtime", 0.0),
        "peak_memory": memory,
    }
