"""What a run of a script starts from: its arguments, its base model, its adapter."""

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

from blob_hf import adapter_files
from blob_hf.config import NOISES, STD_PARAMETERIZATIONS, BlobConfig
from blob_hf.errors import BlobError
from blob_hf.hub import fetching
from blob_hf.model import BlobModel, as_blob_model, get_blob_model, get_lora_model


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
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the LoRA input."})
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
    if adapter_args.adapter_name_or_path:
        return adapter_args.adapter_name_or_path
    if training_args.do_train:
        training_args.beta = training_args.beta or BlobConfig.prior_std
        return None
    if not os.path.isfile(os.path.join(training_args.output_dir, "adapter_config.json")):
        raise BlobError(
            f"nothing to evaluate: {training_args.output_dir} holds no adapter; "
            "train first (--do_train) or give --adapter_name_or_path"
        )
    return training_args.output_dir


def make_model(
    base: PreTrainedModel,
    adapter_args: AdapterArguments,
    training_args: Any,
    targets: list[str] | str,
    task_type: str,
    adapter: str | None = None,
) -> PeftModel:
    """A BLoB or plain LoRA model, fresh or from a saved adapter, as `--method` says."""
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
        "lora_dropout": adapter_args.lora_dropout,
        "target_modules": targets,
        "task_type": task_type,
    }
    if training_args.method == "lora":
        return get_lora_model(base, LoraConfig(**lora))
    return get_blob_model(base, BlobConfig(**lora, **posterior, prior_std=training_args.beta))


def _load_model(base: PreTrainedModel, adapter: str, training_args: Any, posterior: Mapping[str, Any]) -> PeftModel:
    """A saved adapter. Of a BLoB adapter all stays but beta, if given; a plain one gets the posterior asked for."""
    folder = adapter_files.resolve(adapter)
    trainable = training_args.do_train
    if training_args.method == "lora":
        return as_blob_model(PeftModel.from_pretrained(base, str(folder), is_trainable=trainable))
    config = BlobConfig(**posterior, prior_std=training_args.beta or BlobConfig.prior_std)
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
