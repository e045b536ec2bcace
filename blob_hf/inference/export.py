"""Posterior samples as plain LoRA adapters, for servers that batch many LoRAs (vLLM, LoRAX, TGI)."""

import os
from pathlib import Path

from blob_hf.tuner import adapter_files
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import samplable_layers
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError


def export_samples(
    model: BlobModel, num_samples: int, seed: int = 0, out_dir: str | os.PathLike[str] = "samples"
) -> list[Path]:
    """Write `num_samples` plain LoRA adapters; adapter s is the network s of `model.posterior_samples(S, seed)`.

    The average of their predictions is the posterior predictive (Wang et al., NeurIPS 2024, eq. 5).

    Args:
        model: Its active adapter is exported.
        num_samples: S >= 1.
        seed: Names the sequence of samples.
        out_dir: Folder for the adapters, which are called sample-0, sample-1, ...

    Returns:
        The folders of the adapters, in the order of the samples.

    Raises:
        BlobError: num_samples < 1, no posterior, or the folder cannot be written.
    """
    if num_samples < 1:
        raise BlobError(f"num_samples must be >= 1, got {num_samples}")
    layers = samplable_layers(model)
    adapter = model.active_adapter
    mean, _ = model.adapter_tensors(adapter)
    config = model.active_peft_config
    config = config.to_lora() if isinstance(config, BlobConfig) else config
    folders = [Path(out_dir, f"sample-{s}") for s in range(num_samples)]
    for s, folder in enumerate(folders):
        drawn = {name: tensor for layer in layers for name, tensor in layer.drawn(seed, s).items()}
        with files.staged(folder) as staging:
            adapter_files.write(staging, mean={**mean, **drawn}, std={})
            model.save_config(config, staging)
    return folders
