"""What is chosen by rows that were held out of the training: the step to stop at, and the scale of the posterior."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from blob_hf.baselines import PosteriorScale, fit_posterior_scale, scale_posterior
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import Route
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import Arguments, changed_arguments
from blob_hf.utils.errors import BlobError

EVALUATIONS = 20  # of a run that stops early, unless eval_steps says how often


def early_stopping(
    route: Route, args: Arguments, method_args: MethodArguments, num_rows: int
) -> tuple[Arguments, list[TrainerCallback]]:
    """Training arguments and callbacks of a run that keeps its best checkpoint; as they were without early stopping.

    Args:
        num_rows: Of the training set.
    """
    patience = method_args.early_stopping_patience
    if patience is None or not args.do_train or "early_stopping_patience" in route.unread(method_args, args):
        return args, []
    total = args.max_steps
    if total <= 0:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        total = int(args.num_train_epochs * max(1, num_rows // rows))
    steps = args.eval_steps or 1 / EVALUATIONS  # below 1 a share of the run, as transformers reads it
    steps = max(1, int(steps if steps >= 1 else steps * total))
    changed = changed_arguments(
        args, eval_strategy=IntervalStrategy.STEPS, eval_steps=steps, save_strategy=SaveStrategy.STEPS,
        save_steps=steps, load_best_model_at_end=True, metric_for_best_model="nll", greater_is_better=False,
    )  # fmt: skip
    return changed, [EarlyStoppingCallback(patience)]


def settle_scale(trainer: BlobTrainer, method_args: MethodArguments, held_out: Any) -> None:
    """Scale the posterior of a trainer's model as --posterior_scale says.

    Args:
        held_out: Rows to fit it to; None for a saved adapter, whose scale is settled.

    Raises:
        BlobError: There is nothing to fit it to.
    """
    wanted, model = method_args.posterior_scale, trainer.blob_model
    if wanted is None:
        return
    if not isinstance(wanted, str):
        scale_posterior(model, wanted)
    elif held_out is not None:
        fit_posterior_scale(model, lambda: trainer.predictive_nll(held_out))
    elif not isinstance(model.companion(PosteriorScale.slot), PosteriorScale):
        raise BlobError(
            "posterior_scale fit: the adapter was saved without a scale, and there are no held-out rows to fit one to; "
            "give --calibration_file, or train with it"
        )
