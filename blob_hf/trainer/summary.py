"""A `RunSummary` from a trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blob_hf.baselines import METHODS
from blob_hf.reporting.run_summary import DataSource, MethodCard, Results, RunSummary
from blob_hf.reporting.tables import results_table
from blob_hf.trainer.training_args import DEFINING
from blob_hf.tuner.base_model import peft_loading
from blob_hf.tuner.config import adapter_settings
from blob_hf.utils.names import MEAN


def summarize(
    trainer: Any,
    data: DataSource | None = None,
    task: str | None = None,
    base_model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> RunSummary:
    """What a `BlobTrainer` knows of its run: model, arguments, KL diagnosis.

    Args:
        data, task, license: What it does not know (see `RunSummary`).
        base_model: Default: the one that the adapter names.
        settings: Hyperparameters beside the training arguments', shown after them.
    """
    args, config, method = trainer.args, trainer.model.active_peft_config, METHODS[trainer.args.method]
    diagnosis, verdict = trainer.kl_diagnosis, trainer.kl_verdict
    auto_class, auto_arguments = peft_loading(trainer.model)
    shown = {**_settings(trainer, config), **(settings or {})}
    if diagnosis is not None:
        shown["KL cycle M (steps)"] = diagnosis.cycle_steps
    return RunSummary(
        base_model=base_model or config.base_model_name_or_path or "",
        data=data,
        method=args.method,
        card=MethodCard(method.title, method.about, method.limits, method.citation, method.tags, method.sampled),
        settings=shown,
        arguments={name: getattr(value := getattr(args, name), "value", value) for name in DEFINING},  # enums too
        kl_notes=([] if diagnosis is None else [str(diagnosis), *diagnosis.warnings])
        + ([] if verdict is None else [str(verdict)]),
        license=license,
        repo=getattr(trainer, "hub_model_id", None) or str(Path(args.output_dir)),
        task=task,
        num_samples=trainer.num_eval_samples or RunSummary.num_samples,
        auto_class=auto_class,
        auto_arguments=auto_arguments,
    )


def last_evaluation(trainer: Any) -> list[Results]:
    """The metrics of the last evaluation in a trainer's log that exist with N=0 and with N=S."""
    logged = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    if not logged:
        return []
    metrics, prefix = logged[-1], f"eval_{MEAN}"
    names = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    names = [name for name in names if f"eval_{name}" in metrics]
    table = results_table(metrics, "eval", names, trainer.num_eval_samples)
    return [Results(f"evaluation at step {metrics['step']}", "validation", table)]


def _settings(trainer: Any, config: Any) -> dict[str, Any]:
    args, method = trainer.args, trainer.method
    settings = {
        "method": args.method,
        **adapter_settings(config, method.variational),
        **method.settings(trainer.model),
    }
    if not method.post_hoc:  # else it was fitted, and how its adapter was trained is not known here
        settings |= {
            "learning rate": args.learning_rate,
            "steps": args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
            "global batch size": trainer.get_total_train_batch_size(args),
            "seed": args.seed,
        }
    if method.variational:
        settings |= {
            "gamma": args.gamma,
            "KL schedule": args.kl_schedule,
            "KL learning rate": args.kl_learning_rate,
            "KL gradient": args.kl_gradient,
            "training samples": args.train_samples,
        }
    if trainer.num_eval_samples:
        settings["evaluation samples"] = trainer.num_eval_samples
    return settings
