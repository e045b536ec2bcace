"""Floor 4, the peers of BLoB: each a layer or a fit, and the state that its adapters are saved with.

Nothing below knows that they are here: importing this package registers them, and adapters find them by name.
"""

from blob_hf.baselines.base import MethodState, find_method, method_names, register_method
from blob_hf.baselines.conformal import PredictionSets
from blob_hf.baselines.conformal_fit import fit_thresholds
from blob_hf.baselines.conformal_texts import TextAbstention, fit_text_threshold
from blob_hf.baselines.ensemble import EnsembleState, join_members, train_members
from blob_hf.baselines.ivon import IVONConfig, IVONState, attach_ivon
from blob_hf.baselines.laplace import LaplaceConfig, LaplaceState, fit_laplace
from blob_hf.baselines.map import MapState, prior_weight_decay
from blob_hf.baselines.mc_dropout import MCDropoutState, attach_mc_dropout
from blob_hf.baselines.posterior_scale import PosteriorScale, fit_posterior_scale, scale_posterior
from blob_hf.baselines.scalabl import ScalaBLState, attach_scalabl
from blob_hf.baselines.temperature import Temperatures, fit_temperature
from blob_hf.baselines.tfb import TFBConfig, TFBState, fit_tfb

__all__ = [
    "EnsembleState",
    "IVONConfig",
    "IVONState",
    "LaplaceConfig",
    "LaplaceState",
    "MCDropoutState",
    "MapState",
    "MethodState",
    "PosteriorScale",
    "PredictionSets",
    "ScalaBLState",
    "TFBConfig",
    "TFBState",
    "Temperatures",
    "TextAbstention",
    "attach_ivon",
    "attach_mc_dropout",
    "attach_scalabl",
    "find_method",
    "fit_laplace",
    "fit_posterior_scale",
    "fit_temperature",
    "fit_text_threshold",
    "fit_tfb",
    "fit_thresholds",
    "join_members",
    "method_names",
    "prior_weight_decay",
    "register_method",
    "scale_posterior",
    "train_members",
]
