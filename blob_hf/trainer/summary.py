"""What a trainer, or an adapter alone, tells model cards and reports: plain data for `blob_hf.reporting`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from peft import LoraConfig

from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import DataSource, MethodCard, Results, RunSummary
from blob_hf.reporting.tables import results_table
from blob_hf.tuner.base_model import class_names, peft_loading
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.registry import VERBS
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.names import MEAN

if TYPE_CHECKING:
    from blob_hf.trainer.trainer import BlobTrainer

SHOWN_CLASSES = 100  # adapter_config.json has all
BLOB_CARD = MethodCard(
    title="BLoB adapter",
    about="LoRA whose A matrices are Gaussian posteriors (BLoB). `adapter_model.safetensors` is the posterior mean, an "
    "ordinary LoRA adapter; `posterior_std.safetensors` holds the standard deviation of every entry of A. N=0 is "
    "the posterior mean; N=S averages the probabilities of S posterior samples.",
    limits="The uncertainty covers the LoRA A matrices only; the base model and B are points. Calibration was measured "
    "on the data named here and can be worse elsewhere.",
    citation="""@inproceedings{wang2024blob,
  title = {BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models},
  author = {Wang, Yibin and Shi, Haizhou and Han, Ligong and Metaxas, Dimitris and Wang, Hao},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}""",
    tags=("blob", "bayesian", "uncertainty"),
    sampled=True,
)
LORA_CARD = MethodCard(
    title="LoRA adapter",
    about="Plain LoRA (maximum likelihood), trained with blob_hf for comparison with BLoB.",
    limits="A point estimate: it does not know what it does not know.",
    citation="""@inproceedings{hu2022lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and others}, booktitle = {International Conference on Learning Representations}, year = {2022}
}""",
)


@runtime_checkable
class Described(Protocol):
    """A companion that says what a model card says of its adapter."""

    card: MethodCard


def method_card(model: BlobModel) -> MethodCard:
    """What a card says of an adapter of this method."""
    made = model.companion("method")
    if isinstance(made, Described):
        return made.card
    return BLOB_CARD if isinstance(model.active_peft_config, BlobConfig) else LORA_CARD


def method_settings(model: BlobModel) -> dict[str, object]:
    """The adapter's own settings, and those that its method found or chose."""
    made, config = model.companion("method"), model.active_peft_config
    own = adapter_settings(config, with_prior=made is None) if isinstance(config, LoraConfig) else {}
    if names := class_names(model.get_base_model()):
        own["classes"] = ", ".join(names[:SHOWN_CLASSES]) + (" ..." if len(names) > SHOWN_CLASSES else "")
    for companion in model.companions.get(str(model.active_adapter), {}).values():
        own |= companion.settings()
    return own


def adapter_settings(config: LoraConfig, with_prior: bool = True) -> dict[str, object]:
    """An adapter's own settings by the names that reports and model cards show.

    Args:
        with_prior: Whether a prior and a noise had a part in making it.
    """
    targets = config.target_modules or []
    settings: dict[str, object] = {
        "LoRA": f"r={config.r}, alpha={config.lora_alpha}, dropout={config.lora_dropout}",
        "target modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
    }
    if isinstance(config, BlobConfig) and with_prior:
        settings |= {
            "beta (prior std)": config.prior_std,
            "initial eps": config.init_eps,
            "std parameterization": config.std_parameterization,
            "noise": config.noise,
        }
    return settings


def write_card(model: BlobModel, folder: Path) -> None:
    """README.md of an adapter of which no run is known."""
    config = model.active_peft_config
    auto_class, auto_arguments = peft_loading(model)
    found = sampling_of(model, Sampling(RunSummary.num_samples)).num_samples
    summary = RunSummary(
        base_model=config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", ""),
        data=None,
        method=model.method,
        card=method_card(model),
        settings=method_settings(model),
        num_samples=found or RunSummary.num_samples,
        auto_class=auto_class,
        auto_arguments=auto_arguments,
    )
    write_model_card(folder, summary)


VERBS.write_card = write_card


def summarize(
    trainer: "BlobTrainer",
    data: DataSource | None = None,
    task: str | None = None,
    base_model: str | None = None,
    settings: Mapping[str, object] | None = None,
    license: str | None = None,
) -> RunSummary:
    """What a `BlobTrainer` knows of its run: model, arguments, KL diagnosis.

    Args:
        data, task, license: What it does not know (see `RunSummary`).
        base_model: Default: the one that the adapter names.
        settings: Hyperparameters beside the training arguments', shown after them.
    """
    args, model = trainer.args, trainer.blob_model
    diagnosis, verdict = (None, None) if trainer.kl is None else (trainer.kl.diagnosis, trainer.kl.verdict)
    auto_class, auto_arguments = peft_loading(model)
    shown = {"method": model.method, **method_settings(model), **_settings(trainer), **(settings or {})}
    if diagnosis is not None:
        shown["KL cycle M (steps)"] = diagnosis.cycle_steps
    arguments = {name: getattr(value := getattr(args, name), "value", value) for name in args.defining}  # enums too
    if trainer.kl is not None:
        arguments["beta"] = model.blob_config.prior_std
    return RunSummary(
        base_model=base_model or model.active_peft_config.base_model_name_or_path or "",
        data=data,
        method=model.method,
        card=method_card(model),
        settings=shown,
        arguments=arguments,
        kl_notes=([] if diagnosis is None else [str(diagnosis), *diagnosis.warnings])
        + ([] if verdict is None else [str(verdict)]),
        kl_figures={} if verdict is None else verdict.figures.shown(),
        license=license,
        repo=getattr(trainer, "hub_model_id", None) or str(Path(str(args.output_dir))),
        task=task,
        num_samples=trainer.eval_sampling.num_samples or RunSummary.num_samples,
        auto_class=auto_class,
        auto_arguments=auto_arguments,
    )


def last_evaluation(trainer: "BlobTrainer") -> list[Results]:
    """The metrics of the last evaluation in a trainer's log that exist with N=0 and with N=S."""
    logged = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    if not logged:
        return []
    metrics, prefix = logged[-1], f"eval_{MEAN}"
    names = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    names = [name for name in names if f"eval_{name}" in metrics]
    table = results_table(metrics, "eval", names, trainer.eval_sampling.num_samples)
    return [Results(f"evaluation at step {metrics['step']}", "validation", table)]


def _settings(trainer: "BlobTrainer") -> dict[str, object]:
    args = trainer.args
    settings: dict[str, object] = {}
    if trainer.state.global_step:  # else the adapter was fitted or put together, and its training is not known here
        settings |= {
            "learning rate": args.learning_rate,
            "steps": args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
            "global batch size": trainer.get_total_train_batch_size(args),
            "seed": args.seed,
        }
    if trainer.kl is not None and trainer.kl.diagnosis is not None:
        rate = trainer.kl.diagnosis.rate
        settings |= {
            "gamma": args.gamma,
            "KL schedule": trainer.kl.schedule.name,
            **({} if rate is None else {"KL learning rate": f"{rate.value:.4g}"}),
            **({} if rate is None or math.isnan(rate.pull) else {"KL pull": f"{rate.pull:.3g}"}),
            "KL gradient": args.kl_gradient,
            "training samples": args.train_samples,
        }
    if trainer.eval_sampling.num_samples:
        settings["evaluation samples"] = trainer.eval_sampling.num_samples
    return settings
