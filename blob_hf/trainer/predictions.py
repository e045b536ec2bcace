"""What `predict` and `compute_metrics` get of a classifier: arrays by name that act as the predictive's alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class ClassPredictions(tuple[Any, ...]):
    """The fields of a `ClassPrediction` for all examples; as an array it is the predictive's log-probabilities.

    (`networks` comes last, and only with as many samples as needed.)

    So `np.argmax(predictions, axis=-1)`, `predictions[:, 1]` and `predictions.shape` mean what they mean for any
    classifier of transformers, while `predictions.mean_log_probs` and unpacking give all there is. It stays a tuple
    (of tensors inside the evaluation, of arrays in the end): transformers and accelerate pad, gather and join those.

    Attributes:
        log_probs: Of the posterior predictive, `(examples, classes)`, nats.
        sample_log_probs: Of each posterior sample, `(examples, samples, classes)`, nats.
        mean_log_probs: Of the posterior mean, `(examples, classes)`, nats.
        networks: With as many samples as needed, how many each example took, `(examples,)`; else None.
    """

    @property
    def log_probs(self) -> Any:
        return self[0]

    @property
    def sample_log_probs(self) -> Any:
        return self[1]

    @property
    def mean_log_probs(self) -> Any:
        return self[2]

    @property
    def networks(self) -> Any | None:
        return self[3] if len(self) > 3 else None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self[0], dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        """A field by its number, or rows and classes of the predictive by any other index of an array."""
        if isinstance(index, (int, slice)):
            return super().__getitem__(index)
        return self[0][index]

    def __getattr__(self, name: str) -> Any:
        """What an array has and a tuple has not: `argmax`, `shape`, `astype`, ..."""
        if name.startswith("_"):  # protocols that this does not take part in
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self[0], name)
