"""Temperature scaling (Guo et al., ICML 2017): one number, fitted to held-out rows, that every method has to beat.

For a predictive of several networks it is applied to the averaged probabilities: pool, then calibrate (Rahaman &
Thiery, NeurIPS 2021).
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

_BOUNDS = (np.log(0.02), np.log(50.0))  # of log T


def scale(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities `(examples, classes)`, nats, of p^(1/T) normalised."""
    return log_softmax(log_probs / temperature, axis=-1)


def fit_temperature(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which the labels have the smallest NLL.

    The NLL is convex in 1/T, so what a bounded search finds is the minimum.

    Args:
        log_probs: `(examples, classes)`, nats.
        labels: Class ids `(examples,)`.
    """
    rows = np.arange(len(labels))

    def nll(log_temperature: float) -> float:
        return float(-scale(log_probs, np.exp(log_temperature))[rows, labels].mean())

    return float(np.exp(minimize_scalar(nll, bounds=_BOUNDS, method="bounded", options={"xatol": 1e-5}).x))
