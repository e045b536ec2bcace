"""The student: one plain LoRA adapter, which begins as the posterior mean, or as near to it as its rank allows."""

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import set_seed

from blob_hf.inference.choices import ChoiceScoring
from blob_hf.tuner import adapter_files, loading
from blob_hf.tuner.base_model import in_head, is_sequence_classifier, load_base_model
from blob_hf.tuner.build import get_lora_model, load_lora
from blob_hf.tuner.config import BlobConfig, changes_base
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import lora_layers
from blob_hf.tuner.sampled import layer_name
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)


def make_student(
    folder: Path, r: int | None = None, target_modules: Sequence[str] | str | None = None, seed: int = 0
) -> BlobModel:
    """A plain LoRA model to train, from the folder of a teacher's adapter.

    Of the teacher's shape it begins as its posterior mean (of an ensemble: the first member), head and all. Of another
    rank, its layers begin with the best approximation of that rank to the mean's update (Eckart & Young, 1936); layers
    that the teacher does not adapt begin as LoRA does, at no update. It has no dropout.

    Args:
        r: Rank, default the teacher's.
        target_modules: Default the teacher's.
        seed: Of what is drawn where a layer begins anew.

    Raises:
        BlobError: r < 1, target modules that match nothing, or another shape than the teacher's where the teacher's
            initialisation has changed the base model.
    """
    if r is not None and r < 1:
        raise BlobError(f"the rank of a student must be >= 1, got {r}")
    saved = adapter_files.read(folder)
    own = saved.config.to_lora() if isinstance(saved.config, BlobConfig) else saved.config
    base = load_base_model(folder, saved.config, None, {})
    loading.resize_vocabulary(base, saved)
    set_seed(seed)
    model = load_lora(base, folder, is_trainable=True)
    config = _shaped(own, r, target_modules)
    if config is not None:
        _refuse_shape(own)
        model = _reshaped(model, config)
    _leave_out_dropout(model)
    choices = next((one for one in saved.companions if isinstance(one, ChoiceScoring)), None)
    if choices is not None:
        model.set_companion(choices)
        choices.attach(model, folder)
    return model


def _shaped(own: LoraConfig, r: int | None, target_modules: Sequence[str] | str | None) -> LoraConfig | None:
    """The configuration of another shape, of the same scaling alpha / r (or alpha / sqrt(r)); None for the same."""
    names = own.target_modules if isinstance(own.target_modules, str) else set(own.target_modules or ())
    wanted = target_modules if isinstance(target_modules, str) else set(target_modules or ())
    if (r is None or (r == own.r and not own.rank_pattern)) and (not wanted or wanted == names):
        return None
    config = copy.deepcopy(own)
    factor = (r or own.r) / own.r
    config.r = r or own.r
    config.lora_alpha = own.lora_alpha * (math.sqrt(factor) if own.use_rslora else factor)  # type: ignore[assignment]
    if config.lora_alpha == int(config.lora_alpha):
        config.lora_alpha = int(config.lora_alpha)
    config.rank_pattern, config.alpha_pattern = {}, {}
    if wanted:
        config.target_modules = wanted if isinstance(wanted, str) else sorted(wanted)
    config.inference_mode = False
    return config


def _refuse_shape(own: LoraConfig) -> None:
    if changes_base(own) or own.target_parameters:
        what = f"init_lora_weights={own.init_lora_weights!r}" if changes_base(own) else "LoRA on parameters (MoE)"
        raise BlobError(f"a student of another shape cannot be made of a teacher with {what}: leave its shape as it is")


@torch.no_grad()
def _reshaped(mean: BlobModel, config: LoraConfig) -> BlobModel:
    """A model with a new adapter that begins near an old one, on the same base model."""
    adapter = str(mean.active_adapter)
    updates = {layer_name(path): _update(module, adapter) for path, module in lora_layers(mean, adapter)}
    tuner: Any = mean.base_model
    base: Any = tuner.unload()  # a head that was trained in full stays as it is
    vars(base).pop("peft_config", None)
    if is_sequence_classifier(base):
        config.task_type = "SEQ_CLS"  # PEFT then trains the head, unless LoRA is attached to it
    model = get_lora_model(base, config)
    fresh = str(model.active_adapter)
    layers = {layer_name(path): module for path, module in lora_layers(model, fresh)}
    for name, update in updates.items():
        if name in layers:
            _begin_at(layers[name], fresh, update)
        elif in_head(base, name):
            _merge(model, name, update)
    model.remember_head()
    lost = [name for name in updates if name not in layers and not in_head(base, name)]
    if lost:
        logger.info("%d layers of the teacher have no LoRA in the student (%s ...)", len(lost), lost[0])
    return model


def _update(module: LoraLayer, adapter: str) -> Tensor:
    """scaling * B A, (out, in)."""
    a: Any = module.lora_A[adapter]
    b: Any = module.lora_B[adapter]
    return module.scaling[adapter] * (b.weight.double() @ a.weight.double())


def _begin_at(module: LoraLayer, adapter: str, update: Tensor) -> None:
    """A and B whose product is the best one of their rank; ranks that are left over begin as LoRA does."""
    a: Any = module.lora_A[adapter]
    b: Any = module.lora_B[adapter]
    left, values, right = torch.linalg.svd(update / module.scaling[adapter], full_matrices=False)
    used = int((values > 1e-9 * values.max().clamp(min=1e-30)).sum())
    used = min(used, module.r[adapter])
    root = values[:used].sqrt()
    b.weight.zero_()
    b.weight[:, :used] = (left[:, :used] * root).to(b.weight)
    a.weight[:used] = (root[:, None] * right[:used]).to(a.weight)


def _merge(model: BlobModel, layer: str, update: Tensor) -> None:
    """Add an update of the old adapter to a layer of the head that the new one trains in full."""
    for name, weight in model.named_parameters():
        if _names_layer(name, layer):
            weight.add_(update.to(weight))


def _names_layer(name: str, layer: str) -> bool:
    """Whether a parameter is the weight of a layer of the base model, as it is or as PEFT trains it."""
    parts = name.removeprefix("base_model.model.").split(".")
    for marker in ("modules_to_save", "original_module"):
        if marker in parts:
            at = parts.index(marker)
            parts = parts[:at] + parts[at + (2 if marker == "modules_to_save" else 1) :]
    return ".".join(parts) == f"{layer}.weight"


def _leave_out_dropout(model: BlobModel) -> None:
    """MC dropout's rate is the teacher's posterior; in the student it would be noise."""
    config: Any = model.active_peft_config
    config.lora_dropout = 0.0
    adapter = str(model.active_adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_dropout:
            module.lora_dropout[adapter] = nn.Identity()
