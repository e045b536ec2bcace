"""The base model under an adapter: finding it again, and telling its task head from its backbone."""

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import AutoPeftModel, LoraConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, _BaseAutoPeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blob_hf.utils.errors import BlobError

_HEAD_CLASSES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def has_task_head(base: nn.Module) -> bool:
    """Whether this is a classifier or the like, whose head no pretrained checkpoint holds."""
    return type(base).__name__.endswith(_HEAD_CLASSES)


def is_sequence_classifier(base: nn.Module) -> bool:
    """Whether a model tells classes of whole texts."""
    return type(base).__name__.endswith("ForSequenceClassification")


def class_names(base: nn.Module) -> list[str] | None:
    """What a classifier's classes are called, in the order of their ids; None for transformers' own LABEL_0, ..."""
    names = getattr(getattr(base, "config", None), "id2label", None) if has_task_head(base) else None
    return named_classes(names)


def named_classes(id2label: Mapping[Any, str] | None) -> list[str] | None:
    """The names in an `id2label`, in the order of the ids; None if there is none, or with transformers' own names."""
    if not id2label:
        return None
    try:
        names = [str(name) for _, name in sorted((int(key), name) for key, name in id2label.items())]
    except (ValueError, TypeError):
        return None
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def saved_class_names(config: LoraConfig) -> list[str] | None:
    """The names of the classes that an adapter was saved with; earlier versions and plain PEFT save none."""
    mapping = config.auto_mapping or {}
    return named_classes(mapping.get("id2label"))


def name_classes(base: nn.Module, names: Sequence[str]) -> None:
    """Put names of classes into the configuration of a classifier that has as many."""
    config: Any = getattr(base, "config", None)
    if config is not None and has_task_head(base) and len(names) == config.num_labels:
        call_classes(base, names)


def call_classes(base: nn.Module, names: Sequence[str]) -> None:
    """Put names of classes into a model's configuration, whatever it has there."""
    config: Any = base.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def in_head(base: nn.Module, name: str) -> bool:
    """Whether a submodule or parameter belongs to the task head: it lies outside the backbone."""
    return has_task_head(base) and not name.startswith(f"{base.base_model_prefix}.")


def targets_head(model: nn.Module, config: LoraConfig) -> bool:
    """Whether `target_modules` names linear layers of the task head ("all-linear" leaves the head to PEFT)."""
    targets = config.target_modules
    if not targets or isinstance(targets, str):
        return False
    return any(
        in_head(model, name) and any(name == target or name.endswith(f".{target}") for target in targets)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )


def check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a choice of layers that leaves none of a model's, with the reason.

    Raises:
        BlobError: It leaves none.
    """
    targets = config.target_modules
    if targets == "all-linear" or config.target_parameters:
        return
    kind = type(model).__name__
    if not targets:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise BlobError(
                f"target_modules is not given, and PEFT has no default for {kind}; "
                f"it has, for example, {', '.join(_linear_names(model))} (or use 'all-linear')"
            )
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
    else:
        found = [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]
    if not found:
        raise BlobError(
            f"target_modules {targets!r} match no layer of {kind}; "
            f"it has, for example, {', '.join(_linear_names(model))} (or use 'all-linear')"
        )
    if any(_is_target(config, name) for name in found):
        return
    narrowing = {
        name: value
        for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, name)) not in (None, [], "", set())
    }
    raise BlobError(
        f"target_modules {targets!r} match {len(found)} layers of {kind} ({found[0]} ...), but none is left by "
        + ", ".join(f"{name}={value!r}" for name, value in narrowing.items())
    )


def _is_target(config: LoraConfig, name: str) -> bool:
    """PEFT's own answer, which is of a class of its own for an excluded layer."""
    answer = check_target_module_exists(config, name)
    return bool(answer) and type(answer) in (bool, re.Match)


def _linear_names(model: nn.Module, count: int = 8) -> list[str]:
    names = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(names))[:count]


def head_parameters(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """Frozen parameters of a task head under LoRA, by their name in the state dict of the PEFT model."""
    base = peft_model.get_base_model()
    names = (name for name, module in base.named_modules() if isinstance(module, LoraLayer))
    if not any(in_head(base, name) for name in names):
        return {}
    return {
        f"base_model.model.{name}": parameter
        for name, parameter in base.named_parameters()
        if in_head(base, name) and ".lora_" not in name and "modules_to_save" not in name
    }


def untie_adapted_layers(peft_model: PeftModel) -> None:
    """Give layers with LoRA weights of their own where the base model ties them (an `lm_head` to the embeddings).

    Merging into a tied weight would change the embeddings, too. The configuration then says that nothing is tied.
    """
    base: Any = peft_model.get_base_model()
    adapted = {
        parameter.data_ptr()
        for module in base.modules()
        if isinstance(module, LoraLayer)
        for parameter in module.get_base_layer().parameters()
    }
    seen: set[int] = set()
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.data_ptr() in seen & adapted:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                base.config.tie_word_embeddings = False
            seen.add(parameter.data_ptr())


def auto_peft_class(task_type: str | None) -> type[_BaseAutoPeftModel]:
    """PEFT's class that loads an adapter of a task together with its base model."""
    task = str(getattr(task_type, "value", task_type))
    wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, PeftModel)
    kinds: dict[type[PeftModel] | None, type[_BaseAutoPeftModel]] = {
        kind._target_peft_class: kind for kind in _BaseAutoPeftModel.__subclasses__()
    }
    return kinds.get(wanted, AutoPeftModel)


def peft_loading(model: PeftModel) -> tuple[str, str]:
    """How plain PEFT loads this adapter with its base model: the class, and arguments that it needs."""
    base: Any = model.get_base_model()
    arguments = f", num_labels={base.config.num_labels}" if has_task_head(base) else ""
    return auto_peft_class(model.active_peft_config.task_type).__name__, arguments


def is_resized(base: Any, config: LoraConfig) -> bool:
    """Whether a model has another number of token embeddings than the checkpoint that its adapter names.

    Looks at files on this machine alone: the base model's folder, or what its loading has left in the Hub's cache.
    """
    own, name = getattr(base, "config", None), config.base_model_name_or_path
    if not isinstance(own, PreTrainedConfig) or not name:
        return False
    try:
        saved = type(own).from_pretrained(name, revision=config.revision or "main", local_files_only=True)
    except (OSError, ValueError):  # not there, or of another class
        return False
    sizes = [getattr(one.get_text_config(), "vocab_size", None) for one in (own, saved)]
    return None not in sizes and sizes[0] != sizes[1]


def load_base_model(
    folder: Path, config: LoraConfig, token: str | bool | None, kwargs: Mapping[str, Any]
) -> PreTrainedModel:
    """Load the base model that an adapter names, of the class it was trained with.

    Args:
        folder: The adapter's, for messages and for a base model kept beside it.
        kwargs: For `from_pretrained`; they win over what the adapter recorded (num_labels, dtype).

    Raises:
        BlobError: No base model, no class, or a class that is not transformers' own.
    """
    mapping = config.auto_mapping or {}
    name = config.base_model_name_or_path
    nested = os.path.join(folder, "base_model")  # a run on a model built from a config keeps its base here
    if not (name and os.path.isdir(name)) and os.path.isdir(nested):
        name = nested
    if not name:
        raise BlobError(f"the adapter in {folder} does not name its base model; pass it as model=")
    settings = {key: mapping[key] for key in ("num_labels", "dtype") if key in mapping}
    if config.revision:
        settings["revision"] = config.revision
    if "id2label" in kwargs:
        settings.pop("num_labels", None)  # the names say how many there are
    names = None if "id2label" in kwargs else saved_class_names(config)
    try:
        base = _base_class(folder, config).from_pretrained(name, token=token, **{**settings, **kwargs})
        if names is not None:
            name_classes(base, names)
        return base
    except OSError as error:
        raise BlobError(
            f"cannot load the base model {name!r} of the adapter in {folder}; pass it as model= "
            f"({str(error).splitlines()[0]})"
        ) from error


def _base_class(folder: Path, config: LoraConfig) -> Any:
    mapping = config.auto_mapping or {}
    library, base_class = mapping.get("parent_library"), mapping.get("base_model_class")
    if library and base_class:
        if library.partition(".")[0] != "transformers":  # a config file must not make us import anything else
            raise BlobError(
                f"base model class {library}.{base_class} is not from transformers; pass the model as model="
            )
        return getattr(importlib.import_module(library), base_class)
    if config.task_type is None:
        raise BlobError(f"the adapter in {folder} names neither a task type nor a model class; pass it as model=")
    return auto_peft_class(config.task_type)._target_class
