"""Posterior samples as plain LoRA adapters, for servers that batch many LoRAs (vLLM, LoRAX, TGI)."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from blob_hf.tuner import adapter_files
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.loading import save_config
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import layer_samplings
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files


def export_samples(
    model: BlobModel, sampling: Sampling | int, seed: int | None = None, out_dir: str | os.PathLike[str] = "samples"
) -> list[Path]:
    """Write S plain LoRA adapters; adapter s is the network s of `model.posterior_samples(S, seed)`.

    The average of their predictions is the posterior predictive (Wang et al., NeurIPS 2024, eq. 5).

    Args:
        model: Its active adapter is exported.
        sampling: S >= 1 samples, or their number.
        seed: Names the sequence of samples, with their number alone.
        out_dir: Folder for the adapters, which are called sample-0, sample-1, ...

    Returns:
        The folders of the adapters, in the order of the samples.

    Raises:
        BlobError: num_samples < 1, no posterior, or the folder cannot be written.
    """
    drawn = Sampling.of(sampling, seed).required()
    layers = layer_samplings(model, drawn)
    mean, _ = model.adapter_tensors(str(model.active_adapter))
    config: Any = model.active_peft_config
    config = config.to_lora() if isinstance(config, BlobConfig) else config
    folders = []
    for sample in replace(drawn, batch_size=1).batches():
        tensors = {
            name: tensor
            for layer, own in layers.items()
            for name, tensor in layer.drawn(replace(own, num_samples=1, first=sample.first)).items()
        }
        folders.append(Path(out_dir, f"sample-{sample.first}"))
        with files.staged(folders[-1]) as staging:
            adapter_files.write(staging, mean={**mean, **tensors}, std={})
            save_config(model, config, staging)
    return folders
