"""What a route is: the way of a --method from arguments to an adapter, of which plain LoRA's is the simplest."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from blob_hf import baselines
from blob_hf.cli.adapters import AdapterArguments, saved_method
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.engines import require_whole_models
from blob_hf.trainer.summary import LORA_CARD
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import Arguments, BlobTrainingArguments
from blob_hf.tuner.adapter_files import resolve
from blob_hf.tuner.build import get_lora_model, load_lora
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import num_trained

# What a method that trains nothing does not read (and what `--demo` does not set for all methods).
TRAINING_FLAGS = frozenset(
    {
        "lora_r", "lora_alpha", "lora_dropout", "target_modules", "weight_decay", "class_weights", "train_head",
        "resume_from_checkpoint",
    }
)  # fmt: skip
SAMPLING_FLAGS = frozenset(
    {"eval_samples", "eval_seed", "draw", "eval_layers", "eval_tolerance", "posterior_batch_size"}
)


@dataclass
class Job:
    """What a script brings to a route.

    Attributes:
        make_model: A fresh model, or the saved adapter that the run starts from.
        make_trainer: A trainer of a model with training arguments.
        calibration_rows: Training rows that were held out.
        conformal_rows: Others of these, for decisions alone.
    """

    args: BlobTrainingArguments
    method_args: MethodArguments
    make_model: Callable[[], BlobModel]
    make_trainer: Callable[[BlobModel, BlobTrainingArguments], BlobTrainer]
    calibration_rows: Any = None
    conformal_rows: Any = None


@dataclass(frozen=True)
class Outcome:
    """What a training or a fit came to, and what it cost.

    Attributes:
        trained_parameters: By gradient, over all trainings of the run.
        fit_forwards: Rows that were passed through the network to fit without gradient steps.
        fit_runtime: Seconds of that.
    """

    output: TrainOutput
    trained_parameters: int = 0
    fit_forwards: int = 0
    fit_runtime: float = 0.0

    def metrics(self) -> dict[str, float]:
        """For train_results.json."""
        found = dict(self.output.metrics)
        if self.fit_forwards:
            found |= {"fit_runtime": self.fit_runtime, "fit_forwards": self.fit_forwards}
        return found


class Route:
    """Maximum likelihood: plain LoRA, trained as it is. The other methods say what they do otherwise.

    Attributes:
        name: As in `--method`.
        flags: Arguments that only some methods read, this one among them.
        default_dropout: LoRA's dropout, unless it is given.
    """

    name: ClassVar[str] = "lora"
    flags: ClassVar[frozenset[str]] = frozenset()
    default_dropout: ClassVar[float] = 0.0

    @property
    def card(self) -> MethodCard:
        """What is said of its adapters."""
        return LORA_CARD if self.name == "lora" else baselines.find_method(self.name).card

    def check(self, method_args: MethodArguments) -> None:
        """Refuse arguments of the method that it cannot work with."""

    def check_run(self, method_args: MethodArguments, args: BlobTrainingArguments) -> None:
        """Refuse them together with the training arguments."""
        if method_args.posterior_scale is not None:
            if not self.card.sampled or self.name == "ensemble":
                raise BlobError(
                    f"posterior_scale scales noise around a mean, which method {self.name} has not; leave it out"
                )
            if args.push_to_hub and not args.do_train:
                raise BlobError("posterior_scale changes the adapter, which is not trained here: leave out push_to_hub")
            if method_args.posterior_scale == "fit" and args.eval_samples == 0:
                raise BlobError("posterior_scale fit compares predictives of samples: eval_samples must be >= 1, got 0")

    def holds_out(self, method_args: MethodArguments) -> bool:
        """Whether some of the training rows are kept for calibration."""
        return method_args.needs_held_out

    def check_texts(self) -> None:
        """Refuse to write texts, for a method that cannot."""

    def unread(self, method_args: MethodArguments, args: BlobTrainingArguments) -> frozenset[str]:
        """Arguments beside other methods' flags that do nothing here, with these arguments."""
        return frozenset()

    def folder_name(self, data: str, args: BlobTrainingArguments) -> str:
        """Of a run, after the settings that one varies most."""
        return f"{data}-{self.name}-seed{args.seed}"

    def start(self, adapter_args: AdapterArguments, method_args: MethodArguments) -> str | None:
        """The saved adapter that a training starts from, None for a new one."""
        return adapter_args.adapter_name_or_path

    def fresh_model(self, base: PreTrainedModel, lora: Mapping[str, Any], posterior: Mapping[str, Any]) -> BlobModel:
        """A model with a new adapter."""
        return get_lora_model(base, LoraConfig(**lora))

    def load_model(
        self, base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, posterior: Mapping[str, Any]
    ) -> BlobModel:
        """A model with a saved adapter to train, or to evaluate as plain LoRA."""
        folder = resolve(adapter)
        if saved_method(folder) not in ("blob", self.name):  # of a BLoB adapter the mean is a LoRA
            require_plain(folder, self.name)
        return load_lora(base, folder, args.do_train)

    def configure(self, model: BlobModel, method_args: MethodArguments) -> None:
        """Give a model that is to be trained what the method's own arguments say."""

    def arguments(self, args: Arguments, train_rows: Any) -> Arguments:
        """The training arguments that it trains with."""
        return args

    def train(self, job: Job, trainer: BlobTrainer) -> Outcome:
        """Train or fit the trainer's model."""
        output = trainer.train(resume_from_checkpoint=job.args.resume_from_checkpoint)
        return Outcome(output, num_trained(trainer.model))


class FittedRoute(Route):
    """A method that is fitted to a trained adapter, without gradient steps."""

    def unread(self, method_args: MethodArguments, args: BlobTrainingArguments) -> frozenset[str]:
        return TRAINING_FLAGS | {"early_stopping_patience"}

    def holds_out(self, method_args: MethodArguments) -> bool:
        return method_args.fits_held_out or method_args.conformal_alpha is not None

    def start(self, adapter_args: AdapterArguments, method_args: MethodArguments) -> str | None:
        if not adapter_args.adapter_name_or_path:
            raise BlobError(
                f"--method {self.name} is fitted to a trained adapter: train one with --method lora, then "
                "name it with --adapter_name_or_path"
            )
        return adapter_args.adapter_name_or_path

    def load_model(
        self, base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, posterior: Mapping[str, Any]
    ) -> BlobModel:
        require_plain(resolve(adapter), self.name)
        return load_lora(base, resolve(adapter), args.do_train)

    def train(self, job: Job, trainer: BlobTrainer) -> Outcome:
        require_whole_models(trainer.accelerator, f"method {self.name}")
        start = time.perf_counter()
        forwards = self.fit(job, trainer)
        return Outcome(TrainOutput(0, 0.0, {}), fit_forwards=forwards, fit_runtime=time.perf_counter() - start)

    def fit(self, job: Job, trainer: BlobTrainer) -> int:
        """Fit the trainer's model; the rows that it took."""
        raise NotImplementedError


def require_plain(folder: Path, method: str) -> None:
    """Refuse an adapter that has a posterior or members already.

    Args:
        folder: Of the adapter.
        method: What it is needed for.

    Raises:
        BlobError: It is not a plain LoRA adapter.
    """
    name = saved_method(folder)
    if name == "blob" or (name != "lora" and baselines.find_method(name).card.sampled):
        raise BlobError(f"{folder} is of method {name}, with samples already; --method {method} needs plain LoRA")
