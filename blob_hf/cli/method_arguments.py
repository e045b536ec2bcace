"""--method and what the methods need to know, as arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from blob_hf.baselines import IVONConfig, LaplaceConfig, TFBConfig
from blob_hf.baselines.conformal import DEFAULT_DELTA, SCORES
from blob_hf.baselines.fitted_rules import check_level
from blob_hf.baselines.laplace import PREDICTIVES, PRIORS, SUBSETS
from blob_hf.utils.errors import BlobError
from blob_hf.utils.numbers import NumberOrWord

Config = TypeVar("Config")


@dataclass
class MethodArguments:
    """Which method makes the adapter, and what that method needs to know."""

    method: str = field(
        default="blob",
        metadata={
            "help": "blob, or one of its peers: lora (maximum likelihood), map, mc_dropout, ensemble, scalabl, ivon; "
            "laplace and tfb are fitted to a trained adapter (--adapter_name_or_path).",
            "choices": ["blob", "lora", "map", "mc_dropout", "ensemble", "laplace", "tfb", "scalabl", "ivon"],
        },
    )
    temperature_scaling: bool = field(
        default=False,
        metadata={"help": "Also report a classifier with a temperature fitted to held-out training rows."},
    )
    posterior_scale: NumberOrWord | None = field(
        default=None,
        metadata={
            "help": "Multiply all stds of the trained posterior (of any sampled method but ensemble): a number, or "
            "fit, which finds the one under which the predictive of held-out rows has the smallest NLL."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Keep the checkpoint with the smallest NLL of held-out rows, and stop after so many evaluations "
            "(every --eval_steps, default a twentieth of the run) without a smaller one."
        },
    )
    conformal_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Fit decisions to held-out rows that nothing else is fitted to. Classes: prediction sets that miss "
            "at most this share of the labels, and a confidence from which on at most this share of the answers is "
            "wrong. Summaries: an uncertainty from which on none is given, such that at most this share of the inputs "
            "gets a bad one."
        },
    )
    conformal_score: str = field(
        default=SCORES[0],
        metadata={"help": "Of the sets: lac has the smallest, aps none that is empty.", "choices": list(SCORES)},
    )
    conformal_delta: float = field(
        default=DEFAULT_DELTA,
        metadata={"help": "Probability that the held-out rows mislead about the error rate of the answers."},
    )
    conformal_max_loss: float = field(
        default=0.8, metadata={"help": "Largest loss, 1 - ROUGE-L, of a summary that is not bad."}
    )
    calibration_samples: int | None = field(
        default=None,
        metadata={"help": "Training rows to hold out for these four. Default: a tenth, at most 500."},
    )
    ensemble_size: int = field(default=3, metadata={"help": "Members K of --method ensemble, trained in sequence."})
    ensemble_members: list[str] | None = field(
        default=None, metadata={"help": "Trained adapters (folders or Hub repos) to make the ensemble of instead."}
    )
    num_anchors: int = field(default=200, metadata={"help": "Training rows on which TFB measures the loss."})
    tfb_tolerance: float = field(
        default=TFBConfig.tolerance,
        metadata={"help": "Relative increase of the anchors' NLL that TFB allows."},
    )
    tfb_bound: float = field(default=TFBConfig.bound, metadata={"help": "Largest sigma_q that TFB tries."})
    tfb_samples: int = field(default=TFBConfig.num_samples, metadata={"help": "Posterior samples in TFB's loss."})
    laplace_subset: str = field(
        default=LaplaceConfig.subset,
        metadata={"help": "LoRA weights with a Laplace posterior.", "choices": list(SUBSETS)},
    )
    laplace_prior: str = field(
        default=LaplaceConfig.prior,
        metadata={"help": "Prior precision by marginal likelihood or held-out rows.", "choices": list(PRIORS)},
    )
    laplace_predictive: str = field(
        default=LaplaceConfig.predictive,
        metadata={"help": "Predict with the linearised network, or sampled ones.", "choices": list(PREDICTIVES)},
    )

    ivon_ess: float = field(
        default=IVONConfig.ess,
        metadata={"help": "Effective sample size of IVON: its first std is 1 / sqrt(ess hess_init)."},
    )
    ivon_hess_init: float = field(
        default=IVONConfig.hess_init, metadata={"help": "IVON's estimate of the Hessian at the start."}
    )

    def __post_init__(self) -> None:
        if self.calibration_samples is not None and self.calibration_samples < 1:
            raise BlobError(f"calibration_samples must be >= 1, got {self.calibration_samples}")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise BlobError(f"early_stopping_patience must be >= 1, got {self.early_stopping_patience}")
        for name in ("conformal_alpha", "conformal_delta", "conformal_max_loss"):
            if getattr(self, name) is not None:
                check_level(name, getattr(self, name))
        scale = self.posterior_scale
        if isinstance(scale, str) and scale != "fit":
            raise BlobError(f"posterior_scale must be a number or fit, got {scale!r}")
        if isinstance(scale, float) and not scale > 0:
            raise BlobError(f"posterior_scale must be > 0, got {scale:g}; for the mean alone take --eval_samples 0")

    @property
    def needs_held_out(self) -> bool:
        """Whether something is fitted to rows that were not trained on."""
        return self.fits_held_out or self.conformal_alpha is not None or self.early_stopping_patience is not None

    @property
    def fits_held_out(self) -> bool:
        """Whether that is done after the training, and is no decision: a temperature, a scale."""
        return self.temperature_scaling or self.posterior_scale == "fit"

    def tfb_config(self) -> TFBConfig:
        """The search of TFB; its errors have the names of the flags."""
        return _with_flag_names(
            lambda: TFBConfig(self.tfb_tolerance, self.tfb_bound, self.tfb_samples),
            {"tolerance": "tfb_tolerance", "bound": "tfb_bound", "num_samples": "tfb_samples"},
        )

    def ivon_config(self) -> IVONConfig:
        """The settings of IVON."""
        return _with_flag_names(
            lambda: IVONConfig(self.ivon_ess, self.ivon_hess_init),
            {"ess": "ivon_ess", "hess_init": "ivon_hess_init"},
        )

    def laplace_config(self) -> LaplaceConfig:
        """The fit of Laplace."""
        return _with_flag_names(
            lambda: LaplaceConfig(self.laplace_subset, self.laplace_prior, self.laplace_predictive),
            {"subset": "laplace_subset", "prior": "laplace_prior", "predictive": "laplace_predictive"},
        )


def _with_flag_names(make: Callable[[], Config], flags: Mapping[str, str]) -> Config:
    try:
        return make()
    except BlobError as error:
        name, _, rest = str(error).partition(" ")
        raise BlobError(f"{flags.get(name, name)} {rest}") from error
