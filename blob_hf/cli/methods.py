"""--method: how the scripts come from arguments to an adapter. Each method is a route; all else stays equal."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import TrainOutput, has_length

from blob_hf import baselines
from blob_hf.baselines.ensemble import check_size
from blob_hf.baselines.laplace import PRECISION_GRID, PREDICTIVES, PRIORS, SUBSETS, LaplaceState, require_library
from blob_hf.baselines.mc_dropout import DEFAULT_DROPOUT
from blob_hf.baselines.tfb import anchor_rows
from blob_hf.cli.adapters import (
    AdapterArguments,
    adapter_to_evaluate,
    holds_adapter,
    load_posterior,
    lora_settings,
    posterior_settings,
    saved_method,
)
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.engines import require_whole_models
from blob_hf.trainer.summary import BLOB_CARD, LORA_CARD
from blob_hf.trainer.trainer import BlobTrainer, num_trained
from blob_hf.trainer.training_args import (
    Arguments,
    BlobSeq2SeqTrainingArguments,
    BlobTrainingArguments,
    changed_arguments,
)
from blob_hf.tuner.adapter_files import resolve
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel, get_blob_model, get_lora_model, load_lora
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

MEMBERS_FOLDER = "_members"  # of a run: the trainings of an ensemble's members; pushes leave out names with _

# What a method that trains nothing does not read (and what `--demo` does not set for all methods).
_TRAINING_FLAGS = frozenset(
    {"lora_r", "lora_alpha", "lora_dropout", "target_modules", "weight_decay", "resume_from_checkpoint"}
)
_SAMPLING_FLAGS = frozenset({"eval_samples", "eval_seed", "antithetic", "posterior_batch_size"})


@dataclass
class MethodArguments:
    """Which method makes the adapter, and what that method needs to know."""

    method: str = field(
        default="blob",
        metadata={
            "help": "blob, or one of its peers: lora (maximum likelihood), map, mc_dropout, ensemble; laplace and tfb "
            "are fitted to a trained adapter (--adapter_name_or_path).",
            "choices": ["blob", "lora", "map", "mc_dropout", "ensemble", "laplace", "tfb"],
        },
    )
    temperature_scaling: bool = field(
        default=False,
        metadata={"help": "Also report a classifier with a temperature fitted to held-out training rows."},
    )
    calibration_samples: int | None = field(
        default=None, metadata={"help": "Training rows to hold out for that. Default: a tenth, at most 500."}
    )
    ensemble_size: int = field(default=3, metadata={"help": "Members K of --method ensemble, trained in sequence."})
    ensemble_members: list[str] | None = field(
        default=None, metadata={"help": "Trained adapters (folders or Hub repos) to make the ensemble of instead."}
    )
    num_anchors: int = field(default=200, metadata={"help": "Training rows on which TFB measures the loss."})
    tfb_tolerance: float = field(
        default=baselines.TFBConfig.tolerance,
        metadata={"help": "Relative increase of the anchors' NLL that TFB allows."},
    )
    tfb_bound: float = field(default=baselines.TFBConfig.bound, metadata={"help": "Largest sigma_q that TFB tries."})
    tfb_samples: int = field(
        default=baselines.TFBConfig.num_samples, metadata={"help": "Posterior samples in TFB's loss."}
    )
    laplace_subset: str = field(
        default=baselines.LaplaceConfig.subset,
        metadata={"help": "LoRA weights with a Laplace posterior.", "choices": list(SUBSETS)},
    )
    laplace_prior: str = field(
        default=baselines.LaplaceConfig.prior,
        metadata={"help": "Prior precision by marginal likelihood or held-out rows.", "choices": list(PRIORS)},
    )
    laplace_predictive: str = field(
        default=baselines.LaplaceConfig.predictive,
        metadata={"help": "Predict with the linearised network, or sampled ones.", "choices": list(PREDICTIVES)},
    )

    def __post_init__(self) -> None:
        if self.calibration_samples is not None and self.calibration_samples < 1:
            raise BlobError(f"calibration_samples must be >= 1, got {self.calibration_samples}")
        find_route(self.method).check(self)

    @property
    def holds_out(self) -> bool:
        """Whether some of the training rows are kept for calibration."""
        return self.temperature_scaling or (self.method == "laplace" and self.laplace_prior == "validation")

    def tfb_config(self) -> baselines.TFBConfig:
        """The search of TFB; its errors have the names of the flags."""
        return _with_flag_names(
            lambda: baselines.TFBConfig(self.tfb_tolerance, self.tfb_bound, self.tfb_samples),
            {"tolerance": "tfb_tolerance", "bound": "tfb_bound", "num_samples": "tfb_samples"},
        )

    def laplace_config(self) -> baselines.LaplaceConfig:
        """The fit of Laplace."""
        return _with_flag_names(
            lambda: baselines.LaplaceConfig(self.laplace_subset, self.laplace_prior, self.laplace_predictive),
            {"subset": "laplace_subset", "prior": "laplace_prior", "predictive": "laplace_predictive"},
        )


def _with_flag_names(make: Callable[[], Any], flags: Mapping[str, str]) -> Any:
    try:
        return make()
    except BlobError as error:
        name, _, rest = str(error).partition(" ")
        raise BlobError(f"{flags.get(name, name)} {rest}") from error


@dataclass
class Job:
    """What a script brings to a route.

    Attributes:
        make_model: A fresh model, or the saved adapter that the run starts from.
        make_trainer: A trainer of a model with training arguments.
        calibration_rows: Training rows that were held out.
    """

    args: BlobTrainingArguments
    method_args: MethodArguments
    make_model: Callable[[], BlobModel]
    make_trainer: Callable[[BlobModel, BlobTrainingArguments], BlobTrainer]
    calibration_rows: Any = None


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
        if saved_method(folder) != self.name:
            require_plain(folder, self.name)
        return load_lora(base, folder, args.do_train)

    def arguments(self, args: Arguments, train_rows: Any) -> Arguments:
        """The training arguments that it trains with."""
        return args

    def train(self, job: Job, trainer: BlobTrainer) -> Outcome:
        """Train or fit the trainer's model."""
        output = trainer.train(resume_from_checkpoint=job.args.resume_from_checkpoint)
        return Outcome(output, num_trained(trainer.model))


class BlobRoute(Route):
    """A Gaussian posterior over A, trained by backpropagation."""

    name = "blob"
    flags = _SAMPLING_FLAGS | {
        "beta", "gamma", "kl_schedule", "kl_cycle_steps", "kl_weight", "kl_target_nats_per_weight",
        "kl_learning_rate", "kl_gradient", "train_samples", "init_eps", "std_parameterization", "noise",
    }  # fmt: skip

    @property
    def card(self) -> MethodCard:
        return BLOB_CARD

    def folder_name(self, data: str, args: BlobTrainingArguments) -> str:
        beta = args.beta or BlobConfig.prior_std
        return f"{data}-{self.name}-beta{beta:g}-gamma{args.gamma:g}-seed{args.seed}"

    def fresh_model(self, base: PreTrainedModel, lora: Mapping[str, Any], posterior: Mapping[str, Any]) -> BlobModel:
        return get_blob_model(base, BlobConfig(**lora, **posterior))

    def load_model(
        self, base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, posterior: Mapping[str, Any]
    ) -> BlobModel:
        return load_posterior(base, adapter, args, posterior)


class MapRoute(Route):
    """LoRA with the weight decay of its prior, unless a weight_decay > 0 is given."""

    name = "map"
    flags = frozenset({"beta"})

    def unread(self, method_args: MethodArguments, args: BlobTrainingArguments) -> frozenset[str]:
        return frozenset({"beta"}) if args.weight_decay else frozenset()

    def arguments(self, args: Arguments, train_rows: Any) -> Arguments:
        if args.weight_decay or train_rows is None:
            return args
        if not has_length(train_rows):
            raise BlobError("method map needs the size of the training set for its prior; give --weight_decay")
        beta = getattr(args, "beta", None) or BlobConfig.prior_std
        return changed_arguments(args, weight_decay=baselines.prior_weight_decay(len(train_rows), beta))

    def train(self, job: Job, trainer: BlobTrainer) -> Outcome:
        trainer.blob_model.set_companion(baselines.MapState(trainer.args.weight_decay))
        return super().train(job, trainer)


class DropoutRoute(Route):
    """LoRA trained with dropout, whose masks are its samples."""

    name = "mc_dropout"
    flags = _SAMPLING_FLAGS
    default_dropout = DEFAULT_DROPOUT

    def fresh_model(self, base: PreTrainedModel, lora: Mapping[str, Any], posterior: Mapping[str, Any]) -> BlobModel:
        return baselines.attach_mc_dropout(super().fresh_model(base, lora, posterior))

    def load_model(
        self, base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, posterior: Mapping[str, Any]
    ) -> BlobModel:
        return baselines.attach_mc_dropout(super().load_model(base, adapter, args, posterior))


class EnsembleRoute(Route):
    """Adapters of several seeds, trained one after another, or each elsewhere and put together here."""

    name = "ensemble"
    flags = frozenset({"ensemble_size", "ensemble_members", "eval_samples", "posterior_batch_size"})

    def check(self, method_args: MethodArguments) -> None:
        members = method_args.ensemble_members
        size = method_args.ensemble_size if members is None else len(members)
        if size < 2:
            what = "ensemble_size" if members is None else "the number of ensemble_members"
            raise BlobError(f"{what} must be >= 2, got {size}; one adapter is method lora")

    def unread(self, method_args: MethodArguments, args: BlobTrainingArguments) -> frozenset[str]:
        return frozenset({"ensemble_size"}) if method_args.ensemble_members else frozenset()

    def start(self, adapter_args: AdapterArguments, method_args: MethodArguments) -> str | None:
        members = method_args.ensemble_members
        if members and adapter_args.adapter_name_or_path:
            raise BlobError("--ensemble_members are put together by --do_train, and without --adapter_name_or_path")
        return members[0] if members else adapter_args.adapter_name_or_path

    def train(self, job: Job, trainer: BlobTrainer) -> Outcome:
        require_whole_models(trainer.accelerator, f"method {self.name}")
        given = job.method_args.ensemble_members
        if given:  # the trainer's model is the first one
            model, trained = trainer.blob_model, []
            others = [resolve(member) for member in given[1:]]
        else:
            check_size(job.method_args.ensemble_size)
            folder = Path(str(job.args.output_dir), MEMBERS_FOLDER)
            trained = baselines.train_members(
                lambda own: _fresh_trainer(job, own), job.args, job.method_args.ensemble_size, folder
            )
            model = job.make_model()
            model.load_adapter(trained[0].folder, str(model.active_adapter))
            others = [member.folder for member in trained[1:]]
        baselines.join_members(model, others)
        trainer.set_model(model)
        loss = sum(member.loss for member in trained) / len(trained) if trained else math.nan
        metrics = {"train_runtime": sum(member.runtime for member in trained), "train_loss": loss} if trained else {}
        output = TrainOutput(sum(member.steps for member in trained), loss, metrics)
        return Outcome(output, sum(member.trained_parameters for member in trained))


def _fresh_trainer(job: Job, args: BlobTrainingArguments) -> BlobTrainer:
    set_seed(args.seed)
    return job.make_trainer(job.make_model(), args)


class FittedRoute(Route):
    """A method that is fitted to a trained adapter, without gradient steps."""

    def unread(self, method_args: MethodArguments, args: BlobTrainingArguments) -> frozenset[str]:
        return _TRAINING_FLAGS

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


class LaplaceRoute(FittedRoute):
    """A Kronecker-factored Laplace approximation."""

    name = "laplace"
    flags = _SAMPLING_FLAGS | {"laplace_subset", "laplace_prior", "laplace_predictive"}

    def check(self, method_args: MethodArguments) -> None:
        method_args.laplace_config()

    def check_run(self, method_args: MethodArguments, args: BlobTrainingArguments) -> None:
        if method_args.laplace_prior == "validation" and args.eval_samples == 0:
            raise BlobError(
                "laplace_prior validation compares predictives of samples: eval_samples must be >= 1, got 0"
            )
        if args.do_train:
            require_library()

    def check_texts(self) -> None:
        raise BlobError(f"method {self.name} predicts classes; for summaries take another method")

    def fit(self, job: Job, trainer: BlobTrainer) -> int:
        rows: Any = trainer.train_dataset
        held_out = job.calibration_rows
        if rows is None or len(rows) == 0:
            raise BlobError("method laplace needs the training data, but there is none; give train_dataset")
        config = job.method_args.laplace_config()
        validates = config.prior == "validation"
        held_out_loader = trainer.plain_loader(held_out) if validates and held_out is not None else None
        loader = trainer.plain_loader(rows)
        baselines.fit_laplace(trainer.blob_model, loader, config, held_out_loader, trainer.args.sampling)
        return len(rows) + (len(PRECISION_GRID) * len(held_out) if validates else 0)


class TFBRoute(FittedRoute):
    """Training-free Bayesianization."""

    name = "tfb"
    flags = _SAMPLING_FLAGS | {"num_anchors", "tfb_tolerance", "tfb_bound", "tfb_samples"}

    def check(self, method_args: MethodArguments) -> None:
        if method_args.num_anchors < 1:
            raise BlobError(f"num_anchors must be >= 1, got {method_args.num_anchors}")
        method_args.tfb_config()

    def fit(self, job: Job, trainer: BlobTrainer) -> int:
        anchors = anchor_rows(trainer.train_dataset, job.method_args.num_anchors)
        config = job.method_args.tfb_config()
        state = baselines.fit_tfb(
            trainer.blob_model, lambda count: trainer.mean_nll(anchors, count), config, len(anchors)
        )
        return (1 + len(state.tried) * config.num_samples) * len(anchors)


ROUTES: dict[str, Route] = {
    route.name: route
    for route in (BlobRoute(), Route(), MapRoute(), DropoutRoute(), EnsembleRoute(), LaplaceRoute(), TFBRoute())
}


def find_route(name: str) -> Route:
    """The route of a method.

    Raises:
        BlobError: There is none of this name.
    """
    if name not in ROUTES:
        raise BlobError(f"method must be one of {', '.join(ROUTES)}, got {name!r}")
    return ROUTES[name]


def choose_route(adapter_args: AdapterArguments, method_args: MethodArguments, args: BlobTrainingArguments) -> Route:
    """The route of a run: the one asked for, or without training that of the saved adapter.

    Raises:
        BlobError: The saved adapter is not of the method asked for, which it would have to be fitted to.
    """
    asked = find_route(method_args.method)
    if isinstance(asked, EnsembleRoute) and method_args.ensemble_members and not args.do_train:
        raise BlobError("--ensemble_members are put together by --do_train, and without --adapter_name_or_path")
    adapter = adapter_args.adapter_name_or_path or str(args.output_dir)
    if args.do_train or not (adapter_args.adapter_name_or_path or holds_adapter(adapter)):
        return asked
    saved = saved_method(resolve(adapter))
    if saved in ("blob", "lora"):
        if isinstance(asked, (FittedRoute, EnsembleRoute)):
            raise BlobError(f"{adapter} is not of method {asked.name}: fit it with --do_train, or name its own method")
        return asked
    if asked.name not in (saved, MethodArguments.method):
        logger.warning("%s is of method %s and evaluated as that, not as --method %s", adapter, saved, asked.name)
    return find_route(saved)


def make_model(
    route: Route,
    base: PreTrainedModel,
    adapter_args: AdapterArguments,
    method_args: MethodArguments,
    args: BlobTrainingArguments,
    targets: list[str] | str,
    task_type: str,
    adapter: str | None,
) -> BlobModel:
    """The model that a run starts with: a new adapter, or a saved one to train or to evaluate."""
    posterior = posterior_settings(adapter_args, args)
    if adapter is None:
        # PEFT knows this word, but not in a list
        names = "all-linear" if targets == ["all-linear"] else targets
        lora = lora_settings(adapter_args, route.default_dropout)
        return route.fresh_model(base, {**lora, "target_modules": names, "task_type": task_type}, posterior)
    folder = resolve(adapter)
    if args.do_train or saved_method(folder) in ("blob", "lora"):
        return route.load_model(base, adapter, args, posterior)
    model = BlobModel.from_pretrained(folder, model=base)
    state = model.companion("method")
    if isinstance(state, LaplaceState):
        model.set_companion(dataclasses.replace(state, predictive=method_args.laplace_predictive))
    return model


def starting_adapter(
    route: Route, adapter_args: AdapterArguments, method_args: MethodArguments, args: BlobTrainingArguments
) -> str | None:
    """The saved adapter that a run starts from, or evaluates; None for a new one."""
    if args.do_train:
        return route.start(adapter_args, method_args)
    return adapter_to_evaluate(adapter_args, args)


def require_plain(folder: Path, method: str) -> None:
    """Refuse an adapter that has a posterior or members already.

    Args:
        folder: Of the adapter.
        method: What it is needed for.

    Raises:
        BlobError: It is not a plain LoRA adapter.
    """
    name = saved_method(folder)
    if find_route(name).card.sampled:
        raise BlobError(f"{folder} is of method {name}, with samples already; --method {method} needs plain LoRA")


def check_texts(route: Route, method_args: MethodArguments, args: BlobSeq2SeqTrainingArguments) -> None:
    """Refuse what is for classes alone, where texts are written.

    Raises:
        BlobError: The method or --temperature_scaling is of classes, or a way of decoding needs samples.
    """
    route.check_texts()
    if args.decoding in ("predictive", "mbr") and not route.card.sampled:
        raise BlobError(
            f"decoding={args.decoding!r} needs posterior samples, but method is {route.name!r}; use decoding='mean'"
        )
    if method_args.temperature_scaling:
        raise BlobError("temperature_scaling calibrates class probabilities; for summaries leave it out")


def warn_of_ignored(route: Route, method_args: MethodArguments, args: BlobTrainingArguments, *others: Any) -> None:
    """Name the arguments that the method of this run does not read."""
    names = ignored_flags(route, method_args, args, *others)
    if method_args.calibration_samples is not None and not method_args.holds_out:
        names.append("calibration_samples")
    if names:
        logger.warning("--method %s ignores %s", route.name, ", ".join(f"--{name}" for name in names))


def ignored_flags(route: Route, method_args: MethodArguments, args: BlobTrainingArguments, *others: Any) -> list[str]:
    """Arguments that are not at their defaults, but that a method does not read."""
    unread = frozenset().union(*(one.flags for one in ROUTES.values())) - route.flags
    unread |= route.unread(method_args, args)
    return [
        one.name
        for part in (args, method_args, *others)
        for one in dataclasses.fields(part)
        if one.name in unread and getattr(part, one.name) != one.default
    ]
