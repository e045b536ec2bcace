"""Flags that do not exist here: what to write instead, in one line.

Old command lines of transformers' scripts meet this: flags that it has renamed or dropped, and those of its example
scripts that make no sense for a posterior. What is not in the tables is compared with the flags that there are.
"""

import difflib
from collections.abc import Collection, Sequence

from blob_hf.utils.errors import BlobError

# transformers' training arguments of the past and other people's names: what they are here.
RENAMED = {
    "adafactor": "--optim adafactor",
    "adam_epsilon_value": "--adam_epsilon",
    "antithetic": "--draw antithetic",
    "batch_size": "--per_device_train_batch_size",
    "dispatch_batches": "--accelerator_config '{\"dispatch_batches\": true}'",
    "early_stopping": "--early_stopping_patience",
    "epochs": "--num_train_epochs",
    "evaluate_during_training": "--eval_strategy steps",
    "evaluation_strategy": "--eval_strategy",
    "fp16_full_evaluation": "--fp16_full_eval",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "include_inputs_for_metrics": "--include_for_metrics inputs",
    "lora_rank": "--lora_r",
    "lr": "--learning_rate",
    "no_cuda": "--use_cpu",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "push_to_hub_model_id": "--hub_model_id",
    "push_to_hub_organization": "--hub_model_id organization/name",
    "push_to_hub_token": "--hub_token",
    "split_batches": "--accelerator_config '{\"split_batches\": true}'",
    "torchdynamo": "--torch_compile_backend",
    "use_auth_token": "--token",
    "use_slow_tokenizer": "--no_use_fast_tokenizer",
}
# Flags that are refused, and why or what does it instead.
REFUSED = {
    "do_regression": "a regression has no class probabilities; bin the targets into classes",
    "fp16_backend": "transformers 5 has one; leave it out",
    "fp16_opt_level": "apex is gone from transformers; use --fp16 or --bf16",
    "half_precision_backend": "transformers 5 has one; leave it out",
    "jit_mode_eval": "gone from transformers 5; use --torch_compile",
    "logging_dir": "gone from transformers 5; set the environment variable TENSORBOARD_LOGGING_DIR",
    "metric_name": "accuracy, ECE, NLL and Brier score are all reported; --metric_for_best_model chooses among them",
    "mp_parameters": "gone from transformers 5; leave it out",
    "overwrite_output_dir": (
        "gone from transformers 5, and a folder holds one run; choose another --output_dir, delete the old folder, or "
        "continue with --resume_from_checkpoint true"
    ),
    "past_index": "gone from transformers 5; leave it out",
    "remove_columns": "no other column is read; name those that are with --text_columns and --label_column",
    "remove_splits": "no other split is read; give --train_file, --validation_file and --test_file",
    "resize_position_embeddings": (
        "new positions would not be in the adapter; texts are cut to the model's own (--max_source_length), longer "
        "ones need a model with more, such as LED or LongT5"
    ),
    "save_safetensors": "safetensors are the only format; leave it out",
    "sharded_ddp": "gone from transformers 5; use --fsdp or --deepspeed",
    "test_split_name": "give the rows as --test_file",
    "text_column_delimiter": "two --text_columns are read as a pair; join more than two into one column first",
    "tpu_num_cores": "gone from transformers 5; start with accelerate launch",
    "train_split_name": "give the rows as --train_file",
    "use_ipex": "gone from transformers 5; leave it out",
    "use_mps_device": "found by itself; --use_cpu switches it off",
    "validation_split_name": "give the rows as --validation_file",
}
_CLOSE = 0.72  # similarity of two names from which on one is taken for a slip of the other


def check_known(rest: Sequence[str], known: Collection[str]) -> None:
    """Refuse what a parser has left over.

    Args:
        rest: Arguments that no parser knew.
        known: The options that there are, with their dashes.

    Raises:
        BlobError: There are some; it says what the first unknown flag may have meant.
    """
    flags = [part for part in rest if part.startswith("-") and not _is_number(part)]
    if flags:
        raise BlobError(explain(flags[0].partition("=")[0], known))
    if rest:
        raise BlobError(f"unexpected argument {rest[0]!r}: values follow their --flag (--help lists the flags)")


def explain(flag: str, known: Collection[str]) -> str:
    """One line on a flag that there is not.

    Args:
        flag: As it was typed, without a value.
        known: The options that there are.
    """
    name = flag.lstrip("-").replace("-", "_")
    if f"--{name}" in known:
        return f"unknown flag {flag}: did you mean --{name}?"
    if name in RENAMED and RENAMED[name].split()[0] in known:
        return f"there is no {flag}: use {RENAMED[name]}"
    if name in REFUSED:
        return f"there is no {flag} here: {REFUSED[name]}"
    candidates = [option for option in known if "-" not in option[2:]]
    close = difflib.get_close_matches(f"--{name}", candidates, n=1, cutoff=_CLOSE)
    hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
    return f"unknown flag {flag}: {hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
