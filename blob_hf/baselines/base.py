"""The interface of a method: what it trains or fits, how it draws a network or a prediction, what it saves."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from blob_hf.inference.predict import ClassPrediction, predict_classes
from blob_hf.tuner.adapter_files import METHOD_FILE
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.utils import files

_LORA = """@inproceedings{hu2022lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and others}, booktitle = {International Conference on Learning Representations}, year = {2022}
}"""


# What a method that trains nothing does not read (and what `--demo` does not set for all methods).
TRAINING_FLAGS = frozenset(
    {"lora_r", "lora_alpha", "lora_dropout", "target_modules", "weight_decay", "resume_from_checkpoint"}
)


class Method:
    """A way to a fine-tuned adapter and to its uncertainty; by itself maximum likelihood, which has none.

    A sampled method puts `SampledLinear` layers in the place of LoRA's A (or A and B): evaluation, generation and
    reports draw from those through `posterior_samples`, whatever they are drawn from.

    Attributes:
        name: As in `--method`.
        title, about, limits, tags, citation: What the model card says of its adapters.
        flags: Arguments that only some methods read, this one among them.
        facts: What method.json has to hold of an adapter of this method, and of which type.
        variational: Trains a posterior with the BLoB objective.
        sampled: Has networks to draw.
        post_hoc: Is fitted to an adapter that has been trained already.
        retrains: Trains several fresh models; the trainer then needs a `model_init`.
        summarizes: Works for encoder-decoder models.
        default_dropout: LoRA's dropout, unless it is given.
    """

    name = "lora"
    title = "LoRA adapter"
    about = "Plain LoRA (maximum likelihood), trained with blob_hf for comparison with BLoB."
    limits = "A point estimate: it does not know what it does not know."
    tags: tuple[str, ...] = ()
    citation = _LORA
    flags: frozenset[str] = frozenset()
    facts: Mapping[str, type | tuple[type, ...]] = {}
    variational = False
    sampled = False
    post_hoc = False
    retrains = False
    summarizes = True
    default_dropout = 0.0

    def check(self, args: Any) -> None:
        """Refuse arguments that this method cannot work with, before anything is loaded.

        Raises:
            BlobError: naming the argument.
        """

    def num_samples(self, model: Any, args: Any) -> int:
        """Networks that an evaluation draws: 0 for a point estimate, and as long as there is nothing to draw from."""
        return args.eval_samples if sampled_layers(model) else 0

    def attach(self, model: Any, facts: Mapping[str, Any], folder: Path | None = None) -> None:
        """Make a plain LoRA model one of this method, in place.

        Args:
            model: A `BlobModel` without a posterior.
            facts: Of method.json, empty for a new adapter.
            folder: Of the saved adapter, None for a new one.
        """

    def unread(self, args: Any) -> frozenset[str]:
        """Arguments beside other methods' flags that do nothing here, with these arguments."""
        return frozenset()

    def weight_decay(self, trainer: Any) -> float:
        """The optimizer's weight decay."""
        return trainer.args.weight_decay

    def train(self, trainer: Any, fit: Callable[[Any], TrainOutput], resume: Any) -> TrainOutput:
        """Train or fit the trainer's model.

        Args:
            fit: One training by gradient of the trainer's model; takes `resume`.
        """
        return fit(resume)

    def predict_classes(self, model: Any, inputs: dict[str, Any], args: Any) -> ClassPrediction:
        """Predictions of a classifier with `num_samples` samples and with the mean."""
        together = args.posterior_batch_size or 1
        count = self.num_samples(model, args)
        return predict_classes(model, inputs, count, args.eval_seed, together, args.antithetic)

    def settings(self, model: Any) -> dict[str, Any]:
        """What was found or chosen for a model, by the names that reports and model cards show."""
        return {
            name.replace("_", " "): value
            for name, value in getattr(model, "method_facts", {}).items()
            if isinstance(value, (int, float, str)) and name != "method"
        }

    def save(self, model: Any, folder: Path) -> None:
        """Write what the adapter's own files do not hold: method.json, for a model that has facts."""
        if model.method_facts:
            files.write_text(folder / METHOD_FILE, json.dumps(model.method_facts, indent=2) + "\n")
