"""The route of each --method from arguments to an adapter; all else stays equal."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import TrainOutput, has_length

from blob_hf import baselines
from blob_hf.baselines.laplace import PRECISION_GRID, require_library
from blob_hf.baselines.mc_dropout import DEFAULT_DROPOUT
from blob_hf.baselines.tfb import anchor_rows
from blob_hf.cli.adapters import AdapterArguments, load_posterior, saved_method
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import SAMPLING_FLAGS, FittedRoute, Job, Outcome, Route
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.engines import require_whole_models
from blob_hf.trainer.summary import BLOB_CARD
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import Arguments, BlobTrainingArguments, changed_arguments
from blob_hf.tuner.adapter_files import resolve
from blob_hf.tuner.build import get_blob_model
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampled_layers
from blob_hf.utils.errors import BlobError

MEMBERS_FOLDER = "_members"  # of a run: the trainings of an ensemble's members; pushes leave out names with _


class BlobRoute(Route):
    """A Gaussian posterior over A, trained by backpropagation."""

    name = "blob"
    flags = SAMPLING_FLAGS | {
        "beta", "gamma", "kl_schedule", "kl_cycle_steps", "kl_weight", "kl_target_nats_per_weight",
        "kl_learning_rate", "kl_pull", "kl_gradient", "train_samples", "init_eps", "std_parameterization", "noise",
        "posterior_layers",
    }  # fmt: skip

    @property
    def card(self) -> MethodCard:
        return BLOB_CARD

    def folder_name(self, data: str, args: BlobTrainingArguments) -> str:
        return f"{data}-{self.name}-beta{args.prior_std:g}-gamma{args.gamma:g}-seed{args.seed}"

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
        return changed_arguments(args, weight_decay=baselines.prior_weight_decay(len(train_rows), args.prior_std))

    def train(self, job: Job, trainer: BlobTrainer) -> Outcome:
        trainer.blob_model.set_companion(baselines.MapState(trainer.args.weight_decay))
        return super().train(job, trainer)


class DropoutRoute(Route):
    """LoRA trained with dropout, whose masks are its samples."""

    name = "mc_dropout"
    flags = SAMPLING_FLAGS
    default_dropout = DEFAULT_DROPOUT

    def fresh_model(self, base: PreTrainedModel, lora: Mapping[str, Any], posterior: Mapping[str, Any]) -> BlobModel:
        return baselines.attach_mc_dropout(super().fresh_model(base, lora, posterior))

    def load_model(
        self, base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, posterior: Mapping[str, Any]
    ) -> BlobModel:
        return baselines.attach_mc_dropout(super().load_model(base, adapter, args, posterior))


class VariationalRoute(Route):
    """A method that trains a posterior of its own, from a new adapter, from plain LoRA, or from an adapter of its."""

    def attach(self, model: BlobModel, method_args: MethodArguments) -> BlobModel:
        """Give a plain LoRA model the posterior that it is trained from."""
        raise NotImplementedError

    def load_model(
        self, base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, posterior: Mapping[str, Any]
    ) -> BlobModel:
        if saved_method(resolve(adapter)) != self.name:
            return super().load_model(base, adapter, args, posterior)
        model = BlobModel.from_pretrained(adapter, model=base, is_trainable=args.do_train)
        state = model.companion("method")
        model.companions.clear()  # a temperature or scale that was fitted to it is not of what comes out now
        if state is not None:
            model.set_companion(state)
        for layer in sampled_layers(model):
            layer.noise_scale = 1.0
        return model

    def configure(self, model: BlobModel, method_args: MethodArguments) -> None:
        if not sampled_layers(model):
            self.attach(model, method_args)


class ScalaBLRoute(VariationalRoute):
    """A Gaussian over one number for each rank of a layer, trained by backpropagation."""

    name = "scalabl"
    flags = SAMPLING_FLAGS | {"beta", "gamma", "kl_cycle_steps", "kl_learning_rate", "train_samples"}

    def attach(self, model: BlobModel, method_args: MethodArguments) -> BlobModel:
        return baselines.attach_scalabl(model)


class IVONRoute(VariationalRoute):
    """A Gaussian over A and B, which the optimizer IVON trains."""

    name = "ivon"
    flags = SAMPLING_FLAGS | {"beta", "ivon_ess", "ivon_hess_init"}

    def check(self, method_args: MethodArguments) -> None:
        method_args.ivon_config()

    def unread(self, method_args: MethodArguments, args: BlobTrainingArguments) -> frozenset[str]:
        return frozenset({"max_grad_norm", "optim"})

    def attach(self, model: BlobModel, method_args: MethodArguments) -> BlobModel:
        return baselines.attach_ivon(model, method_args.ivon_config())

    def arguments(self, args: Arguments, train_rows: Any) -> Arguments:
        return changed_arguments(args, max_grad_norm=0.0)  # IVON clips its own updates


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
            folder = Path(str(job.args.output_dir), MEMBERS_FOLDER)
            trained = baselines.train_members(
                lambda own: _fresh_trainer(job, own), job.args, job.method_args.ensemble_size, folder
            )
            model = job.make_model()
            model.load_adapter(trained[0].folder, str(model.active_adapter))
            others = [member.folder for member in trained[1:]]
        baselines.join_members(model, others)
        trainer.set_model(model)
        if trained:
            trainer.state = trained[-1].state()
        loss = sum(member.loss for member in trained) / len(trained) if trained else math.nan
        metrics = {"train_runtime": sum(member.runtime for member in trained), "train_loss": loss} if trained else {}
        output = TrainOutput(sum(member.steps for member in trained), loss, metrics)
        return Outcome(output, sum(member.trained_parameters for member in trained))


def _fresh_trainer(job: Job, args: BlobTrainingArguments) -> BlobTrainer:
    set_seed(args.seed)
    return job.make_trainer(job.make_model(), args)


class LaplaceRoute(FittedRoute):
    """A Kronecker-factored Laplace approximation."""

    name = "laplace"
    flags = SAMPLING_FLAGS | {"laplace_subset", "laplace_prior", "laplace_predictive"}

    def check(self, method_args: MethodArguments) -> None:
        method_args.laplace_config()

    def check_run(self, method_args: MethodArguments, args: BlobTrainingArguments) -> None:
        super().check_run(method_args, args)
        if method_args.laplace_prior == "validation" and args.eval_samples == 0:
            raise BlobError(
                "laplace_prior validation compares predictives of samples: eval_samples must be >= 1, got 0"
            )
        if args.do_train:
            require_library()

    def holds_out(self, method_args: MethodArguments) -> bool:
        return method_args.laplace_prior == "validation" or super().holds_out(method_args)

    def check_texts(self) -> None:
        raise BlobError(f"method {self.name} predicts classes; for texts take another method")

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
    flags = SAMPLING_FLAGS | {"num_anchors", "tfb_tolerance", "tfb_bound", "tfb_samples"}

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


_METHODS: tuple[type[Route], ...] = (
    BlobRoute, Route, MapRoute, DropoutRoute, EnsembleRoute, LaplaceRoute, TFBRoute, ScalaBLRoute, IVONRoute,
)  # fmt: skip
ROUTES: dict[str, Route] = {kind.name: kind() for kind in _METHODS}


def find_route(name: str) -> Route:
    """The route of a method.

    Raises:
        BlobError: There is none of this name.
    """
    if name not in ROUTES:
        raise BlobError(f"method must be one of {', '.join(ROUTES)}, got {name!r}")
    return ROUTES[name]
