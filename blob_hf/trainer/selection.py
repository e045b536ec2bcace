"""Which checkpoint is the best: the metric that says so, and whether less of it is better."""

from collections.abc import Iterable, Mapping

from blob_hf.utils.errors import BlobError

# Last words of the names of metrics of which less is better.
_LOWER = frozenset(
    ["loss", "nll", "kl", "ece", "brier", "error", "fpr95", "perplexity", "mse", "rmse", "mae", "wer", "cer"]
)
_NO_MEASURE = ("runtime", "per_second", "preparation_time", "num_samples", "epoch")
# What an evaluation of a `BlobTrainer` measures whatever compute_metrics adds.
ALWAYS_MEASURED = ("loss", "nll", "mean_nll", "sample_nll")


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better, by its name: `nll`, `eval_ece`, `mean_brier`, but not `accuracy`."""
    return metric.rsplit("_", 1)[-1] in _LOWER or metric.endswith(("loss", "_sample_std"))


def check_metric(metric: str, known: Iterable[str], prefix: str = "eval_") -> None:
    """Refuse a metric that an evaluation does not measure.

    Args:
        metric: Its name, with or without the prefix.
        known: The names that there are, with or without the prefix.

    Raises:
        BlobError: It is not among them.
    """
    names = sorted(
        {name.removeprefix(prefix) for name in known if not any(part in name for part in _NO_MEASURE)},
        key=lambda name: (name not in ALWAYS_MEASURED, name),
    )
    if metric.removeprefix(prefix) not in names:
        raise BlobError(f"metric_for_best_model must be one of {', '.join(names)}, got {metric!r}")


def eval_nll(metrics: Mapping[str, float]) -> float:
    """NLL of the predictive on the evaluation set, nats: what a search minimises."""
    return metrics["eval_nll"]
