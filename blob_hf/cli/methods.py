"""Which method a run is of, and the model that it starts with."""

import dataclasses
import logging
from typing import Any

from transformers import PreTrainedModel

from blob_hf.baselines import LaplaceState
from blob_hf.cli.adapters import (
    AdapterArguments,
    adapter_to_evaluate,
    fitted_companions,
    holds_adapter,
    lora_settings,
    posterior_settings,
    saved_method,
)
from blob_hf.cli.head import head_targets
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import FittedRoute, Route
from blob_hf.cli.routes import ROUTES, EnsembleRoute, VariationalRoute, find_route
from blob_hf.trainer.training_args import BlobSeq2SeqTrainingArguments, BlobTrainingArguments
from blob_hf.tuner.adapter_files import resolve
from blob_hf.tuner.config import default_target_modules
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)


def choose_route(adapter_args: AdapterArguments, method_args: MethodArguments, args: BlobTrainingArguments) -> Route:
    """The route of a run: the one asked for, or without training that of the saved adapter.

    Raises:
        BlobError: The saved adapter is not of the method asked for, which it would have to be fitted to.
    """
    asked = find_route(method_args.method)
    asked.check(method_args)
    if isinstance(asked, EnsembleRoute) and method_args.ensemble_members and not args.do_train:
        raise BlobError("--ensemble_members are put together by --do_train, and without --adapter_name_or_path")
    adapter = adapter_args.adapter_name_or_path or str(args.output_dir)
    if args.do_train or not (adapter_args.adapter_name_or_path or holds_adapter(adapter)):
        return asked
    saved = saved_method(resolve(adapter))
    if saved == "blob" or (saved == "lora" and not fitted_companions(resolve(adapter))):
        if isinstance(asked, (FittedRoute, EnsembleRoute, VariationalRoute)):
            raise BlobError(f"{adapter} is not of method {asked.name}: fit it with --do_train, or name its own method")
        return asked
    if asked.name not in (saved, MethodArguments.method):
        logger.warning("%s is of method %s and evaluated as that, not as --method %s", adapter, saved, asked.name)
    return find_route(saved if saved in ROUTES else Route.name)


def make_model(
    route: Route,
    base: PreTrainedModel,
    adapter_args: AdapterArguments,
    method_args: MethodArguments,
    args: BlobTrainingArguments,
    task_type: str,
    adapter: str | None,
) -> BlobModel:
    """The model that a run starts with: a new adapter, or a saved one to train or to evaluate.

    Args:
        task_type: PEFT's, `SEQ_CLS`, `SEQ_2_SEQ_LM` or `CAUSAL_LM`.
        adapter: The saved one.
    """
    posterior = posterior_settings(adapter_args, args)
    if adapter is None:
        lora = lora_settings(adapter_args, route.default_dropout)
        model = route.fresh_model(base, {**lora, **_adapted(adapter_args, base, task_type)}, posterior)
        route.configure(model, method_args)
        return model
    folder = resolve(adapter)
    if args.do_train or saved_method(folder) in ("blob", "lora"):
        model = route.load_model(base, adapter, args, posterior)
        if args.do_train:
            route.configure(model, method_args)
        for kept in () if args.do_train else fitted_companions(folder):
            model.set_companion(kept)
        return model
    model = BlobModel.from_pretrained(folder, model=base)
    state = model.companion("method")
    if isinstance(state, LaplaceState):
        model.set_companion(dataclasses.replace(state, predictive=method_args.laplace_predictive))
    return model


def _adapted(adapter_args: AdapterArguments, base: Any, task_type: str) -> dict[str, Any]:
    """Which layers LoRA adapts, and which are trained in full."""
    if task_type == "SEQ_CLS":
        targets, trained = head_targets(adapter_args, base)
    else:
        task = "choices" if task_type == "CAUSAL_LM" else "summarization"
        targets = adapter_args.target_modules or default_target_modules(base.config.model_type, task)
        trained = None
    # PEFT knows this word, but not in a list
    names = "all-linear" if targets == ["all-linear"] else targets
    return {"target_modules": names, "task_type": task_type, "modules_to_save": trained}


def starting_adapter(
    route: Route, adapter_args: AdapterArguments, method_args: MethodArguments, args: BlobTrainingArguments
) -> str | None:
    """The saved adapter that a run starts from, or evaluates; None for a new one."""
    if args.do_train:
        return route.start(adapter_args, method_args)
    return adapter_to_evaluate(adapter_args, args)


def check_texts(route: Route, method_args: MethodArguments, args: BlobSeq2SeqTrainingArguments) -> None:
    """Refuse what is for classes alone, where texts are written.

    Raises:
        BlobError: The method or --temperature_scaling is of classes, or a way of decoding needs samples.
    """
    route.check_texts()
    if args.decoding in ("predictive", "mbr") and not route.card.sampled:
        raise BlobError(
            f"decoding={args.decoding!r} needs posterior samples, but method is {route.name!r}; use decoding='mean'"
        )
    if method_args.temperature_scaling:
        raise BlobError("temperature_scaling calibrates class probabilities; for summaries leave it out")


def warn_of_ignored(route: Route, method_args: MethodArguments, args: BlobTrainingArguments, *others: Any) -> None:
    """Name the arguments that the method of this run does not read."""
    names = ignored_flags(route, method_args, args, *others)
    if method_args.calibration_samples is not None and not route.holds_out(method_args):
        names.append("calibration_samples")
    if not route.holds_out(method_args):
        names += ["calibration_file" for other in others if getattr(other, "calibration_file", None)]
    if names:
        logger.warning("--method %s ignores %s", route.name, ", ".join(f"--{name}" for name in names))


def ignored_flags(route: Route, method_args: MethodArguments, args: BlobTrainingArguments, *others: Any) -> list[str]:
    """Arguments that are not at their defaults, but that a method does not read."""
    unread = frozenset().union(*(one.flags for one in ROUTES.values())) - route.flags
    unread |= route.unread(method_args, args)
    return [
        one.name
        for part in (args, method_args, *others)
        for one in dataclasses.fields(part)
        if one.name in unread and getattr(part, one.name) != one.default
    ]
