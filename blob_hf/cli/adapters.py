"""The adapter of a run: its arguments, the saved one that it starts from, and the model that comes out."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blob_hf.baselines.base import read_facts
from blob_hf.cli.loading import LoadingArguments
from blob_hf.trainer.training_args import BlobTrainingArguments
from blob_hf.tuner.adapter_files import read_config, resolve
from blob_hf.tuner.base_model import load_base_model, saved_class_names
from blob_hf.tuner.build import bayesianize, load_lora
from blob_hf.tuner.config import NOISES, STD_PARAMETERIZATIONS, BlobConfig
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.registry import Companion, load_companions
from blob_hf.utils.errors import BlobError

TRAIN_HEAD = ("auto", "true", "false")


@dataclass
class AdapterArguments(LoadingArguments):
    """The adapter: what it is put on, LoRA's shape and the posterior's form."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the base model; auto is the checkpoint's. The posterior is float32 whatever this is.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=8, metadata={"help": "LoRA alpha (scaling = alpha / rank)."})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout on the LoRA input. Default: 0.1 for --method mc_dropout, else 0."}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt. Default: a preset per model family, else all-linear."}
    )
    init_eps: float = field(default=0.05, metadata={"help": "Initial std G^2 with G ~ U(eps/sqrt(2), eps)."})
    std_parameterization: str = field(
        default="square", metadata={"help": "std = G*G or softplus(rho).", "choices": list(STD_PARAMETERIZATIONS)}
    )
    noise: str = field(default="flipout", metadata={"help": "Training-time noise.", "choices": list(NOISES)})
    posterior_layers: int | None = field(
        default=None,
        metadata={"help": "Only A in the last so many layers (and the head) has a posterior, the rest is plain LoRA."},
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Continue from (or, without --do_train, evaluate) this adapter, BLoB or plain LoRA."},
    )
    train_head: str = field(
        default="auto",
        metadata={
            "help": "Classifier: train its head in full (true), or keep it frozen under LoRA (false). auto: as "
            "published for the published tasks, as --target_modules says if given, else true.",
            "choices": list(TRAIN_HEAD),
        },
    )
    adapter_license: str | None = field(default=None, metadata={"help": "License named in the model card."})


def holds_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether there is an adapter in a folder."""
    return os.path.isfile(os.path.join(folder, "adapter_config.json"))


def adapter_to_evaluate(adapter_args: AdapterArguments, args: BlobTrainingArguments) -> str:
    """The adapter that is named, or the one in the output folder.

    Raises:
        BlobError: There is none.
    """
    if adapter_args.adapter_name_or_path:
        return adapter_args.adapter_name_or_path
    folder = str(args.output_dir)
    if not holds_adapter(folder):
        raise BlobError(
            f"nothing to evaluate: {folder} holds no adapter; train first (--do_train) or give --adapter_name_or_path"
        )
    return folder


def load_networks(folder: Path) -> BlobModel:
    """An adapter of any method; plain LoRA as the one network that it is, without an untrained posterior.

    What was saved beside it (how it asks questions, a temperature, decisions) comes along.
    """
    if saved_method(folder) == "lora" and not load_companions(folder):  # a companion keeps it a point
        return load_lora(load_base_model(folder, read_config(folder), None, {}), folder).eval()
    return BlobModel.from_pretrained(folder).eval()


def saved_method(folder: Path) -> str:
    """Name of the method that a saved adapter is of."""
    has_posterior = isinstance(read_config(folder), BlobConfig)
    return read_facts(folder).get("method", "blob" if has_posterior else "lora")


def fitted_companions(folder: Path) -> list[Companion]:
    """What was fitted to a saved adapter after its training, of whatever method: a temperature, decisions."""
    return [found for found in load_companions(folder) if found.fitted]


def known_classes(adapter: str | None) -> list[str] | int | None:
    """Names of the classes that a saved adapter tells apart, or their number if it does not name them.

    None if there is no adapter, or if it says neither.
    """
    if adapter is None:
        return None
    config = read_config(resolve(adapter))
    return saved_class_names(config) or (config.auto_mapping or {}).get("num_labels")


def lora_settings(adapter_args: AdapterArguments, default_dropout: float = 0.0) -> dict[str, Any]:
    """LoRA's shape, as `LoraConfig` takes it."""
    dropout = adapter_args.lora_dropout
    return {
        "r": adapter_args.lora_r,
        "lora_alpha": adapter_args.lora_alpha,
        "lora_dropout": default_dropout if dropout is None else dropout,
        "revision": adapter_args.revision,
    }


def posterior_settings(adapter_args: AdapterArguments, args: BlobTrainingArguments) -> dict[str, Any]:
    """The posterior's form, as `BlobConfig` takes it."""
    return {
        "init_eps": adapter_args.init_eps,
        "std_parameterization": adapter_args.std_parameterization,
        "noise": adapter_args.noise,
        "posterior_layers": adapter_args.posterior_layers,
        "prior_std": args.prior_std,
    }


def load_posterior(
    base: PreTrainedModel, adapter: str, args: BlobTrainingArguments, settings: Mapping[str, Any]
) -> BlobModel:
    """A saved adapter to train or evaluate as BLoB. Of one all stays but beta, if given; others get a posterior.

    Raises:
        BlobError: It has stds of 0, and is to be trained.
    """
    folder, trainable = resolve(adapter), args.do_train
    if not isinstance(read_config(folder), BlobConfig):
        if saved_method(folder) != "lora" or fitted_companions(folder):  # finished as what it is
            return bayesianize(load_lora(base, folder, trainable), BlobConfig(**settings))
        return BlobModel.from_pretrained(folder, model=base, is_trainable=trainable, config=BlobConfig(**settings))
    model = BlobModel.from_pretrained(folder, model=base, is_trainable=trainable)
    if trainable:
        model.companions.clear()  # what was fitted to it is not of what comes out now
    if trainable and not all(layer.std.all() for layer in gaussian_layers(model).values()):
        raise BlobError(
            f"{adapter} has stds of 0 (tfb gives none to directions that B lacks), which training cannot widen; "
            "continue from the LoRA adapter that it was made of"
        )
    if trainable and args.beta is not None:
        model.blob_config.prior_std = args.beta
    return model
