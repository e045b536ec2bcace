"""Posterior samples as plain LoRA adapters, for servers that batch many LoRAs (vLLM, LoRAX, TGI)."""

import copy
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from blob_hf.tuner import adapter_files
from blob_hf.tuner.config import BlobConfig, changes_base
from blob_hf.tuner.loading import save_config
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import layer_samplings, lora_layers
from blob_hf.tuner.sampled import layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

_TOLERANCE = 1e-2  # of what a base model lacks beside the rank of the adapter: rounding in half precision stays below


def export_samples(
    model: BlobModel, sampling: Sampling | int, seed: int | None = None, out_dir: str | os.PathLike[str] = "samples"
) -> list[Path]:
    """Write S plain LoRA adapters; adapter s is the network s of `model.posterior_samples(S, seed)`.

    The average of their predictions is the posterior predictive (Wang et al., NeurIPS 2024, eq. 5). Where the
    adapter's initialisation has changed the base model (PiSSA, OLoRA), they have twice the rank and are for the
    original one, as servers have it.

    Args:
        model: Its active adapter is exported.
        sampling: S >= 1 samples, or their number.
        seed: Names the sequence of samples, with their number alone.
        out_dir: Folder for the adapters, which are called sample-0, sample-1, ...

    Returns:
        The folders of the adapters, in the order of the samples.

    Raises:
        BlobError: num_samples < 1, no posterior, the folder cannot be written, or the original base model is needed
            and not at hand.
    """
    drawn = Sampling.of(sampling, seed).required()
    layers = layer_samplings(model, drawn)
    mean, _ = model.adapter_tensors(str(model.active_adapter))
    config: Any = model.active_peft_config
    config = config.to_lora() if isinstance(config, BlobConfig) else config
    taken = _taken_from_base(model, config, mean) if changes_base(config) else {}
    config = _with_twice_the_rank(config) if taken else config
    folders = []
    for sample in replace(drawn, batch_size=1).batches():
        tensors = {
            name: tensor
            for layer, own in layers.items()
            for name, tensor in layer.drawn(replace(own, num_samples=1, first=sample.first)).items()
        }
        folders.append(Path(out_dir, f"sample-{sample.first}"))
        with files.staged(folders[-1]) as staging:
            adapter_files.write(staging, mean=_with(taken, {**mean, **tensors}, config), std={})
            save_config(model, config, staging)
    return folders


def _with(taken: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """[A; A0] and [B, -B0]: W_res + s B A is W + s (B A - B0 A0), as PEFT's `subtract_mutated_init` has it."""
    found = dict(tensors)
    for name, own in taken.items():
        dim = 0 if ".lora_A." in name else 1
        both = torch.cat([tensors[name], own.to(tensors[name])], dim)
        layer = layer_name(name.rsplit(".lora_", 1)[0])
        ranks = config.rank_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
        lacking = rank - both.shape[dim]  # PiSSA's and OLoRA's A has no more rows than the layer has outputs
        found[name] = F.pad(both, (0, 0, 0, lacking) if dim == 0 else (0, lacking))
    return found


def _with_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The configuration for these, of the same scaling alpha / r, or alpha / sqrt(r)."""
    config = copy.deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha  # type: ignore[assignment]
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    alphas: Any = config.alpha_pattern or {}
    config.alpha_pattern = {key: factor * alpha for key, alpha in alphas.items()}
    return config


@torch.no_grad()
def _taken_from_base(model: BlobModel, config: LoraConfig, saved: Collection[str]) -> dict[str, Tensor]:
    """A0 and -B0 of every layer, by the names of A and B: what the initialisation has taken out of the base weights.

    Args:
        saved: Names of what is saved with the adapter. A head among it is saved as it is now: nothing is taken.
    """
    original, adapter, taken = _original_base(model, config), str(model.active_adapter), {}
    for path, module in lora_layers(model, adapter):
        rank, base_layer = module.r[adapter], module.get_base_layer()
        rest: Any = base_layer.weight
        whole: Any = rest if f"{path}.base_layer.weight" in saved else original.get_submodule(layer_name(path)).weight
        lack = (whole.double().cpu() - rest.detach().double().cpu()) / module.scaling[adapter]
        lack = lack.T if getattr(module, "fan_in_fan_out", False) else lack
        left, values, right = torch.linalg.svd(lack, full_matrices=False)
        if values[rank:].norm() > _TOLERANCE * values.norm():
            raise BlobError(
                f"{layer_name(path)} lacks more than init_lora_weights={config.init_lora_weights!r} of rank {rank} "
                f"takes out: {config.base_model_name_or_path!r} is not the base model that this adapter was made on"
            )
        root = values[:rank].sqrt()
        taken[f"{path}.lora_A.weight"] = root[:, None] * right[:rank]
        taken[f"{path}.lora_B.weight"] = -left[:, :rank] * root
    return taken


def _original_base(model: BlobModel, config: LoraConfig) -> nn.Module:
    kind: Any = type(model.get_base_model())
    try:
        original: nn.Module = kind.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise BlobError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base model, and the original one "
            f"({config.base_model_name_or_path!r}) cannot be loaded to tell by how much; save samples merged instead: "
            "merge_posterior_sample(seed, index).save_pretrained(folder)"
        ) from error
    return original
