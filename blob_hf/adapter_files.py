"""The two weight files of an adapter folder: the posterior mean (a plain LoRA adapter) and its standard deviations."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blob_hf.errors import BlobError
from blob_hf.layer import GaussianA, gathered, rho_from_std

logger = logging.getLogger(__name__)

STD_FILE = "posterior_std.safetensors"
FORMAT_VERSION = 1


def write(folder: Path, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter; each appears whole or not at all.

    Args:
        mean: What goes into adapter_model.safetensors, by PEFT's names.
        std: Omega (rank, in_features) for every `...lora_A.weight` of the mean; written only if not empty.

    Raises:
        BlobError: A LoRA weight is empty or not a matrix: a shard that was not gathered.
    """
    for name, tensor in mean.items():
        if ".lora_" in name and name.endswith(".weight") and (tensor.dim() != 2 or tensor.numel() == 0):
            raise BlobError(
                f"refusing to save {name} of shape {tuple(tensor.shape)}: it is a shard that was not gathered "
                "(under ZeRO-3 set stage3_gather_16bit_weights_on_model_save, or save through the Trainer)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _save_atomically(mean, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    if std:
        _save_atomically(std, folder / STD_FILE, {"format": "pt", "blob_hf_format": str(FORMAT_VERSION)})


def _save_atomically(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary, metadata
    )
    os.replace(temporary, path)


def load_std(path_or_repo: str, layers: Mapping[str, GaussianA], **hub: Any) -> None:
    """Read posterior_std.safetensors into the layers, or keep their fresh stds for a plain LoRA adapter.

    Args:
        layers: The Gaussian A matrices by the name of their mean in adapter_model.safetensors.
        hub: revision, subfolder, token, cache_dir.

    Raises:
        BlobError: File missing from a BLoB adapter; unreadable; other layers, shapes or values than the mean's.
    """
    file = _fetch(path_or_repo, STD_FILE, **hub)
    if file is None:
        if is_blob_adapter(path_or_repo, **hub):
            raise BlobError(f"{STD_FILE} is missing from the BLoB adapter {path_or_repo}; get the complete folder")
        logger.warning("%s is a plain LoRA adapter: its posterior std comes from BlobConfig, untrained", path_or_repo)
        return
    try:
        stds = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BlobError(f"cannot read {file}: {error}; download or save the adapter again") from error
    if set(stds) != set(layers):
        odd = sorted(set(stds) ^ set(layers))
        raise BlobError(f"{file} has stds for other layers than the adapter: {odd[0]} ({len(odd)} differ)")
    for name, layer in layers.items():
        _set_std(layer, stds[name].float(), f"{file}: {name}")


@torch.no_grad()
def _set_std(layer: GaussianA, std: Tensor, what: str) -> None:
    with gathered([layer.rho]):
        if std.shape != layer.rho.shape:
            raise BlobError(f"{what} has shape {tuple(std.shape)}, but the mean has {tuple(layer.rho.shape)}")
        if not (torch.isfinite(std).all() and (std >= 0).all()):
            raise BlobError(f"{what} is not a standard deviation: it has negative or non-finite entries")
        layer.rho.copy_(rho_from_std(std, layer.parameterization))


def _fetch(path_or_repo: str, name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Local path of a file of an adapter folder or Hub repo, None when it has no such file."""
    if os.path.isdir(path_or_repo):
        local = Path(path_or_repo, subfolder or "", name)
        return str(local) if local.is_file() else None
    try:
        return hf_hub_download(path_or_repo, name, subfolder=subfolder, **hub)
    except EntryNotFoundError:
        return None


def is_blob_adapter(path_or_repo: str, **hub: Any) -> bool:
    """Whether adapter_config.json is that of a BLoB adapter."""
    config = _fetch(path_or_repo, CONFIG_NAME, **hub)
    return config is not None and "prior_std" in json.loads(Path(config).read_text(encoding="utf-8"))
