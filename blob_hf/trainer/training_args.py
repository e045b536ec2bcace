"""Training arguments: transformers' own, plus the BLoB ones."""

import copy
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar, TypeVar

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from blob_hf.trainer.class_weights import CLASS_WEIGHTS
from blob_hf.trainer.engines import join_deepspeed, require_deepspeed, require_device
from blob_hf.trainer.kl.schedule import KL_SCHEDULES
from blob_hf.trainer.reporters import check_reporters
from blob_hf.trainer.selection import lower_is_better
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.sampling import AUTO_TOLERANCE, DRAWS, Sampling, as_sampling
from blob_hf.utils.errors import BlobError
from blob_hf.utils.numbers import NumberOrWord, number_or_word, whole_or_word

SCHEDULES = ("auto", *KL_SCHEDULES, "adaptive", "target")
# Who changes one of these wants the published machinery, with its rate.
_OF_THE_KL = ("kl_schedule", "kl_cycle_steps", "kl_weight", "kl_target_nats_per_weight")
KL_GRADIENTS = ("decoupled", "loss")
DECODINGS = ("mean", "samples", "predictive", "mbr")

# Training arguments that make two runs different runs (the others only change what is shown or where it goes).
DEFINING = [
    "beta",
    "gamma",
    "kl_schedule",
    "kl_cycle_steps",
    "kl_weight",
    "kl_target_nats_per_weight",
    "kl_learning_rate",
    "kl_pull",
    "kl_gradient",
    "train_samples",
    "base_dropout",
    "class_weights",
    "seed",
    "data_seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "optim",
    "bf16",
    "fp16",
]


@dataclass
class BlobArguments:
    """The arguments that BLoB adds to `TrainingArguments`.

    Parameters:
        > The objective

        beta (`float`, *optional*): std sigma_p of the prior on A. It is *not* a factor in front of the KL.
        gamma (`float`): sets the period M of the KL re-weighting cycle, int(100 * n**(pi/gamma) / global batch).
        kl_schedule (`str`): a key of `kl.schedule.KL_SCHEDULES`, `adaptive` (`kl/adaptive.py`), `target`
            (`kl/target.py`) or `auto`: where the rate is from the pull `adaptive` for a classifier and `uniform` for a
            language model, else the paper's `geometric`.
        kl_cycle_steps (`int`, *optional*): M itself, instead of through gamma.
        kl_weight (`float`): the weight of the `constant` schedule.
        kl_target_nats_per_weight (`float`, *optional*): what the `target` schedule brings the KL down to.
        kl_learning_rate (`float` or `"auto"`): rate of the KL's own SGD step; `"auto"` sets it from the pull, unless
            the KL's schedule or cycle is given and the pull is not: then it is the published 0.002.
        kl_pull (`float`, *optional*): the KL's step on a mean one prior std from 0, in units of the optimizer's
            (`kl/rate.py`); by default that of the published runs, carried to n examples by gamma.
        kl_gradient (`str`): `decoupled` (own SGD step after the optimizer's) or `loss` (through the loss).
        train_samples (`int`): posterior samples per training step; their NLLs are averaged.
        base_dropout (`bool`): keep the backbone's own dropout on in training.
        class_weights (`str`, *optional*): `balanced` weighs a classifier's training examples by n / (classes * count of
            their class); the NLL of a step is the weighted mean over its whole accumulated batch on all processes.

        > Evaluation

        eval_samples (`int` or `"auto"`): posterior samples N of the predictive; 0 is the posterior mean, `"auto"` a
            classifier's as many as each input needs (`Sampling.auto`).
        eval_seed (`int`): names the posterior samples.
        draw (`str`, *optional*): how they depend on one another, see `Sampling`: `iid`, `antithetic` or `qmc`; default
            `iid`, and `antithetic` for as many as needed.
        eval_layers (`int`, *optional*): the samples differ in the last so many layers, all below is computed once.
        eval_tolerance (`float`, *optional*): an input takes samples until the standard error of its averaged
            probabilities is at most this; with `auto` 0.1 unless given.
        posterior_batch_size (`int`, *optional*): samples evaluated in one batch, to bound memory.
    """

    defining: ClassVar[list[str]] = DEFINING

    beta: float | None = field(
        default=None,
        metadata={
            "help": "Std sigma_p of the Gaussian prior on A (not a factor in front of the KL). "
            "Default: the model's BlobConfig.prior_std, 0.2 in the scripts."
        },
    )
    gamma: float = field(
        default=8.0,
        metadata={
            "help": "Sets the period M of the KL re-weighting cycle: M = int(100 * n**(pi/gamma) / global_batch_size) "
            "steps, n training examples, and the default of --kl_pull. Larger gamma: shorter cycle, more KL per step."
        },
    )
    kl_schedule: str = field(
        default="auto",
        metadata={
            "help": "How the KL is weighted over steps; auto, where its rate is from the pull: adaptive (the more, the "
            "lower the training NLL) for a classifier and uniform for a language model; else geometric.",
            "choices": list(SCHEDULES),
        },
    )
    kl_cycle_steps: int | None = field(default=None, metadata={"help": "Cycle length M in steps, instead of gamma."})
    kl_weight: float = field(default=0.0, metadata={"help": "Weight of the KL for --kl_schedule constant."})
    kl_target_nats_per_weight: float | None = field(
        default=None,
        metadata={"help": "KL per weight of A (nats) that --kl_schedule target brings the posterior down to."},
    )
    kl_learning_rate: NumberOrWord = field(
        default="auto",
        metadata={
            "help": "Rate of the KL's own SGD step, which follows the main schedule in shape. auto sets it from "
            "--kl_pull; in the published experiments, and where the KL's schedule or cycle is given: 0.002."
        },
    )
    kl_pull: float | None = field(
        default=None,
        metadata={
            "help": "The KL's step on a mean one prior std from 0, in units of the learning rate: the same in a run of "
            "any length; larger is more KL. Default: 6.4 n^(-pi/gamma), the published runs' for n training examples."
        },
    )
    kl_gradient: str = field(
        default="decoupled",
        metadata={
            "help": "decoupled: an SGD step on the KL after each optimizer step (as published); "
            "loss: the KL's gradient goes through the loss and the optimizer.",
            "choices": list(KL_GRADIENTS),
        },
    )
    train_samples: int = field(default=1, metadata={"help": "Posterior samples per training step."})
    eval_samples: NumberOrWord = field(
        default=10,
        metadata={
            "help": "Posterior samples N for evaluation; 0 evaluates the posterior mean alone, auto (classifier) takes "
            "as many as each input needs."
        },
    )
    eval_seed: int = field(default=0, metadata={"help": "Seed that names the posterior samples of evaluation."})
    draw: str | None = field(
        default=None,
        metadata={
            "help": "Samples of evaluation: iid; antithetic (pairs eps, -eps: fewer are enough for the same NLL); qmc "
            "(such pairs, evenly spread). Default: iid, with --eval_samples auto antithetic.",
            "choices": list(DRAWS),
        },
    )
    eval_layers: int | None = field(
        default=None,
        metadata={"help": "Samples of evaluation differ in the last so many layers; all below is computed once."},
    )
    eval_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Classifier: an input takes samples until the standard error of its averaged probabilities is at "
            f"most this. Default: {AUTO_TOLERANCE} with --eval_samples auto."
        },
    )
    posterior_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Posterior samples per batched forward in evaluation. Default: 1 for scores, all to generate."
        },
    )
    base_dropout: bool = field(
        default=False, metadata={"help": "Keep the backbone's own dropout in training (the paper has it off)."}
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "balanced: a classifier's rare classes count as much in its loss as frequent ones.",
            "choices": list(CLASS_WEIGHTS),
        },
    )

    @property
    def prior_std(self) -> float:
        """sigma_p of a fresh posterior: beta, or by default `BlobConfig`'s."""
        return BlobConfig.prior_std if self.beta is None else self.beta

    @property
    def rate_from_pull(self) -> bool:
        """Whether the KL's rate is set from its pull; else it is the given or the published one."""
        if self.kl_learning_rate != "auto" or self.kl_gradient == "loss":
            return False
        if self.kl_pull is not None or self.kl_schedule == "adaptive":
            return True
        return all(getattr(self, name) == _default(name) for name in _OF_THE_KL)

    @property
    def schedule(self) -> str:
        """The KL's schedule, `auto` settled as far as the model is not asked (`adaptive` is a classifier's)."""
        if self.kl_schedule != "auto":
            return self.kl_schedule
        return "adaptive" if self.rate_from_pull else "geometric"

    @property
    def sampling(self) -> Sampling:
        """The posterior samples of an evaluation."""
        return as_sampling(
            self.eval_samples, self.eval_tolerance, self.draw, seed=self.eval_seed,
            batch_size=self.posterior_batch_size, layers=self.eval_layers,
        )  # fmt: skip

    def _checked_sampling(self) -> Sampling:
        """The samples, refused by the names that they have here."""
        self.eval_samples = whole_or_word(self.eval_samples)
        for name, least in (("eval_samples", 0), ("posterior_batch_size", 1), ("eval_layers", 1)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise BlobError(f"{name} must be >= {least}, got {value}")
        if self.eval_tolerance is not None and not self.eval_tolerance > 0:
            raise BlobError(f"eval_tolerance must be > 0, got {self.eval_tolerance:g}")
        return self.sampling

    def _validate_blob(self) -> None:
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BlobError(f"{name} must be > 0, got {value}")
        self._checked_sampling()
        self.kl_learning_rate = rate = number_or_word(self.kl_learning_rate)
        if isinstance(rate, str) and rate != "auto":
            raise BlobError(f"kl_learning_rate must be a number or auto, got {rate!r}")
        if isinstance(rate, float) and not rate >= 0:
            raise BlobError(f"kl_learning_rate must be >= 0, got {rate:g}")
        if self.kl_pull is not None and not self.kl_pull >= 0:
            raise BlobError(f"kl_pull must be >= 0, got {self.kl_pull}")
        if self.kl_pull is not None and self.kl_learning_rate != "auto":
            raise BlobError(
                f"kl_pull sets the rate, but kl_learning_rate is given, too ({self.kl_learning_rate}); give one of them"
            )
        if self.kl_pull is not None and (self.kl_gradient == "loss" or self.kl_target_nats_per_weight is not None):
            raise BlobError(
                "kl_pull sets a rate that kl_gradient loss and kl_schedule target do not have; leave it out"
            )
        for name, least in (("train_samples", 1), ("kl_weight", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise BlobError(f"{name} must be >= {least}, got {value}")
        if self.kl_cycle_steps is not None and self.kl_cycle_steps < 1:
            raise BlobError(f"kl_cycle_steps must be >= 1, got {self.kl_cycle_steps}")
        for name, allowed in (
            ("kl_schedule", SCHEDULES),
            ("kl_gradient", KL_GRADIENTS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise BlobError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.class_weights not in (None, *CLASS_WEIGHTS):
            raise BlobError(f"class_weights must be {' or '.join(CLASS_WEIGHTS)}, got {self.class_weights!r}")
        self._validate_target()

    def _validate_target(self) -> None:
        target = self.kl_target_nats_per_weight
        if (self.kl_schedule == "target") != (target is not None):
            raise BlobError(
                "kl_schedule target and kl_target_nats_per_weight need each other, got kl_schedule "
                f"{self.kl_schedule} and kl_target_nats_per_weight {target}; give both or neither"
            )
        if target is None:
            return
        if not target > 0:
            raise BlobError(f"kl_target_nats_per_weight must be > 0, got {target}")
        if self.kl_gradient != "decoupled" or self.kl_learning_rate == 0:
            raise BlobError(
                "kl_schedule target steers the decoupled KL step: it needs kl_gradient decoupled and kl_learning_rate "
                f"> 0, got {self.kl_gradient} and {self.kl_learning_rate}"
            )


def _default(name: str) -> object:
    return next(field.default for field in fields(BlobArguments) if field.name == name)


@dataclass
class BlobTrainingArguments(BlobArguments, TrainingArguments):
    """`transformers.TrainingArguments` with `BlobArguments`."""

    def __post_init__(self) -> None:
        self._validate_blob()
        require_deepspeed(self.deepspeed)
        require_device(self)
        if self.greater_is_better is None and lower_is_better(self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers knows "loss" alone
        super().__post_init__()
        check_reporters(self.report_to or ())
        join_deepspeed(self)


@dataclass
class BlobSeq2SeqTrainingArguments(BlobTrainingArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with `BlobArguments`.

    Parameters:
        decoding (`str`): which text is the answer: the posterior `mean`'s alone; besides, those of the posterior
            `samples` (no single answer); the posterior `predictive`'s; or of the samples the one of minimum Bayes risk
            (`mbr`).
    """

    decoding: str = field(
        default="samples",
        metadata={
            "help": "mean: the posterior mean's text alone; samples: also one of each posterior sample; predictive: "
            "also one decoded from the samples' averaged probabilities; mbr: also the sample of least Bayes risk.",
            "choices": list(DECODINGS),
        },
    )

    def __post_init__(self) -> None:
        self._checked_sampling().for_texts()
        if self.class_weights is not None:
            raise BlobError("class_weights weighs the classes of a classifier; texts have none: leave it out")
        if self.decoding not in DECODINGS:
            raise BlobError(f"decoding must be one of {', '.join(DECODINGS)}, got {self.decoding!r}")
        if self.decoding in ("predictive", "mbr") and self.eval_samples == 0:
            raise BlobError(
                f"decoding={self.decoding!r} needs posterior samples, but eval_samples is 0; use decoding='mean'"
            )
        super().__post_init__()


Arguments = TypeVar("Arguments", bound=BlobTrainingArguments)


def as_blob_arguments(args: TrainingArguments | None, kind: type[Arguments]) -> Arguments:
    """Training arguments of the class that a trainer reads: all that was given stays, BLoB's are at their defaults.

    Args:
        args: transformers' own or ours; None for transformers' default of none.
        kind: `BlobTrainingArguments` or `BlobSeq2SeqTrainingArguments`.
    """
    if isinstance(args, kind):
        return args
    if args is None:
        return kind("tmp_trainer")
    made = object.__new__(kind)  # not by its constructor: the processes and devices of `args` are connected already
    made.__dict__.update({item.name: item.default for item in fields(kind) if item.default is not MISSING})
    made.__dict__.update(vars(args))
    made._validate_blob()
    if lower_is_better(made.metric_for_best_model or ""):
        made.greater_is_better = False  # True is what transformers takes for a name that it does not know
    return made


def changed_arguments(args: Arguments, **changes: object) -> Arguments:
    """A copy of training arguments with changes: the ones that were given stay as they were parsed."""
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
