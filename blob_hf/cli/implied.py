"""What follows from the flags that a person typed, for those that they left out.

A default, published or of --demo, must not undo what was typed: who asks for one epoch does not want 5,000 steps.
"""

from collections.abc import Collection, Mapping
from typing import Any

from blob_hf.baselines.laplace import LOGIT_DRAWS
from blob_hf.tuner.adapter_files import read_config, resolve
from blob_hf.utils.errors import BlobError


def implied(given: Collection[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that take the place of the parser's own.

    Args:
        given: Names of the arguments that were typed.
        values: Of all arguments by name, defaults included.

    Raises:
        BlobError: Two were typed that mean the same, or the adapter that was typed cannot be read.
    """
    found: dict[str, Any] = {}

    def default(name: str, value: Any, *because: str) -> None:
        if name not in given and set(because) <= set(given):
            found[name] = value

    default("max_steps", -1, "num_train_epochs")
    default("eval_strategy", "steps", "eval_steps")
    default("kl_schedule", "constant", "kl_weight")
    default("kl_schedule", "target", "kl_target_nats_per_weight")
    # the Trainer's names for what the last generation calls otherwise
    default("num_beams", values.get("generation_num_beams"), "generation_num_beams")
    default("max_new_tokens", (values.get("generation_max_length") or 1) - 1, "generation_max_length")
    if "config_overrides" in values:  # a config without weights is an untrained model
        default("model_name_or_path", None, "config_name")
    adapter = values.get("adapter_name_or_path")
    if adapter and not {"model_name_or_path", "config_name"} & set(given):
        base = read_config(resolve(adapter)).base_model_name_or_path
        default("model_name_or_path", base or values["model_name_or_path"], "adapter_name_or_path")
    if not values.get("do_train"):
        default("do_eval", True, "do_train")
    if values.get("method") == "laplace" and values.get("laplace_predictive") == "linearized":
        default("eval_samples", LOGIT_DRAWS, "method")
    default("prompt", f"{values.get('source_prefix')}{{dialogue}}", "source_prefix")
    if values.get("load_best_model_at_end"):
        found.update(_matching_strategies(given, values))
    if {"prompt", "source_prefix"} <= set(given):
        raise BlobError("--source_prefix PREFIX is --prompt 'PREFIX{dialogue}'; give one of them")
    return found


def _matching_strategies(given: Collection[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate when a checkpoint is saved: the best can only be among those that were evaluated."""
    found: dict[str, Any] = {}
    if values["save_strategy"] == "best":
        return found if "eval_strategy" in given else {"eval_strategy": "steps"}
    strategy = values["eval_strategy"] if "eval_strategy" in given else values["save_strategy"]
    if "eval_strategy" not in given:
        found["eval_strategy"] = "steps" if "eval_steps" in given and "save_strategy" not in given else strategy
        strategy = found["eval_strategy"]
    if "save_strategy" not in given:
        found["save_strategy"] = strategy
    if strategy == "steps":
        steps = next((values[name] for name in ("eval_steps", "save_steps", "logging_steps") if name in given), None)
        steps = steps or values["logging_steps"]
        found |= {name: steps for name in ("eval_steps", "save_steps") if name not in given}
    return found
