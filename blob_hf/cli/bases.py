"""An untrained base model, built from a config."""

import os
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

BASE_FOLDER = "base_model"


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
    folder = os.path.join(training_args.output_dir, BASE_FOLDER)
    with training_args.main_process_first(desc="keeping the base model"):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            base = AutoModelForSeq2SeqLM.from_config(config)
            tokenizer.save_pretrained(folder)
            base.save_pretrained(folder)
    return AutoModelForSeq2SeqLM.from_pretrained(os.path.abspath(folder))
