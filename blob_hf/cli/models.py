"""What a run of a script starts from: its arguments, its base model, its adapter."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from blob_hf.baselines import METHODS, read_facts, require_plain
from blob_hf.trainer.training_args import BlobArguments
from blob_hf.tuner import adapter_files
from blob_hf.tuner.config import NOISES, STD_PARAMETERIZATIONS, BlobConfig
from blob_hf.tuner.model import BlobModel, bayesianize, get_blob_model, get_lora_model, load_lora
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

logger = logging.getLogger(__name__)


@dataclass
class AdapterArguments:
    """The adapter: LoRA's shape and the posterior's form."""

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
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Continue from (or, without --do_train, evaluate) this adapter, BLoB or plain LoRA."},
    )
    adapter_license: str | None = field(default=None, metadata={"help": "License named in the model card."})


@dataclass
class PublishedDefaults:
    """Training arguments whose published values differ from transformers' defaults (reference: [W], [K])."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW (the NLL's)."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up: steps, or a fraction of all if below 1."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep at most so many checkpoints."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin memory (off without a GPU)."}
    )


def require_split(splits: Mapping[str, Any], split: str) -> None:
    """Raise a BlobError when a split that is needed is not there."""
    if split not in splits:
        raise BlobError(f"there is no {split} split, only {', '.join(splits)}; give --{split}_file")


def adapter_folder(adapter_args: AdapterArguments, training_args: Any) -> str | None:
    """The adapter to start from: the one named, or without training the one in the output folder; None for a new one.

    A new adapter settles beta; a saved one knows its own.
    """
    members = training_args.ensemble_members if METHODS[training_args.method].retrains else None
    if members and (adapter_args.adapter_name_or_path or not training_args.do_train):
        raise BlobError("--ensemble_members are put together by --do_train, and without --adapter_name_or_path")
    if adapter_args.adapter_name_or_path:
        return adapter_args.adapter_name_or_path
    if training_args.do_train:
        if members:
            return members[0]
        if METHODS[training_args.method].post_hoc:
            raise BlobError(
                f"--method {training_args.method} is fitted to a trained adapter: train one with --method lora, then "
                "name it with --adapter_name_or_path"
            )
        training_args.beta = training_args.beta or BlobConfig.prior_std
        return None
    if not os.path.isfile(os.path.join(training_args.output_dir, "adapter_config.json")):
        raise BlobError(
            f"nothing to evaluate: {training_args.output_dir} holds no adapter; "
            "train first (--do_train) or give --adapter_name_or_path"
        )
    return training_args.output_dir


def take_saved_method(adapter_args: AdapterArguments, training_args: Any) -> None:
    """Without training, the method of the run is the one that the adapter was saved with; set it."""
    adapter = adapter_args.adapter_name_or_path or training_args.output_dir
    fitted = os.path.isfile(os.path.join(adapter, "adapter_config.json"))
    if training_args.do_train or not (adapter_args.adapter_name_or_path or fitted):
        return
    asked, saved = METHODS[training_args.method], read_facts(adapter_files.resolve(adapter)).get("method")
    if saved is None and (asked.post_hoc or asked.retrains):
        raise BlobError(f"{adapter} is not of method {asked.name}: fit it with --do_train, or name its own method")
    if saved is not None:
        if asked.name not in (saved, BlobArguments.method):
            logger.warning("%s is of method %s and evaluated as that, not as --method %s", adapter, saved, asked.name)
        training_args.method = saved


def make_model(
    base: PreTrainedModel,
    adapter_args: AdapterArguments,
    training_args: Any,
    targets: list[str] | str,
    task_type: str,
    adapter: str | None = None,
) -> PeftModel:
    """A model as `--method` wants it before training: a posterior, or plain LoRA; fresh or from a saved adapter."""
    method = METHODS[training_args.method]
    posterior: dict[str, Any] = {
        "init_eps": adapter_args.init_eps,
        "std_parameterization": adapter_args.std_parameterization,
        "noise": adapter_args.noise,
    }
    if adapter is not None:
        return _load_model(base, adapter, training_args, posterior)
    if targets == ["all-linear"]:  # PEFT knows this word, but not in a list
        targets = "all-linear"
    lora: dict[str, Any] = {
        "r": adapter_args.lora_r,
        "lora_alpha": adapter_args.lora_alpha,
        "lora_dropout": method.default_dropout if adapter_args.lora_dropout is None else adapter_args.lora_dropout,
        "target_modules": targets,
        "task_type": task_type,
    }
    if method.variational:
        return get_blob_model(base, BlobConfig(**lora, **posterior, prior_std=training_args.beta))
    return get_lora_model(base, LoraConfig(**lora))


def _load_model(base: PreTrainedModel, adapter: str, training_args: Any, posterior: Mapping[str, Any]) -> PeftModel:
    """A saved adapter. Of a BLoB adapter all stays but beta, if given; another one gets the posterior asked for."""
    folder = adapter_files.resolve(adapter)
    trainable = training_args.do_train
    saved = read_facts(folder).get("method")
    if saved and not trainable:
        return BlobModel.from_pretrained(folder, model=base)
    method = METHODS[training_args.method]
    if not method.variational:
        if method.post_hoc or saved not in (None, method.name):
            require_plain(folder, method.name)
        return load_lora(base, folder, trainable)
    config = BlobConfig(**posterior, prior_std=training_args.beta or BlobConfig.prior_std)
    if adapter_files.is_blob_adapter(folder):
        model = BlobModel.from_pretrained(folder, model=base, is_trainable=trainable)
        model.method_facts = {}  # what was fitted to it is not of what comes out now
        if trainable and not all(layer.std.all() for layer in gaussian_layers(model).values()):
            raise BlobError(
                f"{adapter} has stds of 0 (tfb gives none to directions that B lacks), which training cannot widen; "
                "continue from the LoRA adapter that it was made of"
            )
    elif saved:
        model = bayesianize(load_lora(base, folder, trainable), config)
    else:
        model = BlobModel.from_pretrained(folder, model=base, is_trainable=trainable, config=config)
    if trainable and training_args.beta is not None:
        model.blob_config.prior_std = training_args.beta
    training_args.beta = model.blob_config.prior_std
    return model


def config_from_name(name: str, overrides: str | None, tokenizer: Any) -> PreTrainedConfig:
    """The config of an untrained model for a tokenizer: vocabulary size and special tokens are the tokenizer's.

    Args:
        name: A model type of transformers (`bart`, `t5`, ...) or a folder / Hub repo with a config.json.
        overrides: Changes like `d_model=256,encoder_layers=3`.

    Raises:
        BlobError: Unknown model type, or an override the config does not have.
    """
    if name in CONFIG_MAPPING:
        config = CONFIG_MAPPING[name]()
    else:
        with fetching("config", name, "--config_name"):
            config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise BlobError(f"--config_name {name} is not an encoder-decoder model; try bart or t5")
    try:
        config.update_from_string(overrides or "")
    except ValueError as error:
        raise BlobError(f"--config_overrides {overrides!r}: {error}") from error
    starts_with_eos = config.decoder_start_token_id == config.eos_token_id
    config.vocab_size = len(tokenizer)
    for token in ("pad", "bos", "eos"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    config.decoder_start_token_id = config.eos_token_id if starts_with_eos else config.pad_token_id
    if getattr(config, "forced_eos_token_id", None) is not None:
        config.forced_eos_token_id = config.eos_token_id
    return config


def kept_base(config: PreTrainedConfig, tokenizer: Any, training_args: Any) -> Any:
    """An untrained base model, kept in `{output_dir}/base_model`: without it the adapter would be worthless.

    Made once; resumed runs and evaluations read it back.
    """
    folder = os.path.join(training_args.output_dir, "base_model")
    with training_args.main_process_first(desc="keeping the base model"):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            base = AutoModelForSeq2SeqLM.from_config(config)
            tokenizer.save_pretrained(folder)
            base.save_pretrained(folder)
    return AutoModelForSeq2SeqLM.from_pretrained(os.path.abspath(folder))
