"""A Gaussian prior on the adapter's weights, as weight decay."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput, has_length

from blob_hf.baselines.base import Method
from blob_hf.tuner.config import BlobConfig
from blob_hf.utils.errors import BlobError


class Map(Method):
    """LoRA with the weight decay that the prior N(0, beta^2) stands for, unless a `weight_decay` > 0 is given.

    AdamW's decay is decoupled from its step sizes (Loshchilov & Hutter, ICLR 2019), so where training ends is near the
    maximum of the posterior, not exactly there. As usual with this baseline, all trained weights decay.
    """

    name = "map"
    title = "MAP LoRA adapter"
    about = (
        "LoRA trained with a Gaussian prior on its weights, in the usual form of AdamW's weight decay. It is a point, "
        "and loads as any LoRA adapter."
    )
    flags = frozenset({"beta"})

    def unread(self, args: Any) -> frozenset[str]:
        return frozenset({"beta"}) if args.weight_decay else frozenset()

    def attach(self, model: Any, facts: Mapping[str, Any], folder: Path | None = None) -> None:
        model.method_facts = dict(facts) or model.method_facts or {"method": self.name}

    def weight_decay(self, trainer: Any) -> float:
        args = trainer.args
        if args.weight_decay:
            return args.weight_decay
        if not has_length(trainer.train_dataset):
            raise BlobError("method map needs the size of the training set for its prior; give --weight_decay")
        return prior_weight_decay(len(trainer.train_dataset), args.beta or BlobConfig.prior_std)

    def train(self, trainer: Any, fit: Callable[[Any], TrainOutput], resume: Any) -> TrainOutput:
        output = fit(resume)
        trainer.model.method_facts = {"method": self.name, "weight_decay": self.weight_decay(trainer)}
        return output


def prior_weight_decay(num_examples: int, prior_std: float) -> float:
    """The decay that stands for the prior N(0, prior_std^2) beside a mean NLL over n examples.

    -log posterior / n = mean NLL + sum_i w_i^2 / (2 n prior_std^2) + const, whose gradient adds w / (n prior_std^2).
    """
    return 1 / (num_examples * prior_std**2)
