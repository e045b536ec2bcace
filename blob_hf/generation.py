"""Decoding with posterior samples: a summary of one sample is written by one network, from encoder to last token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blob_hf.posterior import posterior_mean, posterior_samples
from blob_hf.prediction import repeat_rows


@torch.no_grad()
def generate_mean(model: Any, inputs: dict[str, Any], **gen_kwargs: Any) -> Tensor:
    """Generate with the posterior mean: `(batch, length)` token ids."""
    with posterior_mean(model):
        return model.generate(**inputs, **gen_kwargs)


@torch.no_grad()
def generate_samples(
    model: Any,
    inputs: dict[str, Any],
    num_samples: int,
    seed: int = 0,
    samples_per_batch: int | None = None,
    pad_token_id: int = 0,
    **gen_kwargs: Any,
) -> Tensor:
    """Generate once per posterior sample: `(batch, num_samples, length)` token ids, padded on the right.

    The samples run as sample-major blocks of one batch (KV cache and beams keep the blocks contiguous), at nearly
    the price of that many more rows of plain LoRA.

    Args:
        inputs: Encoder inputs of the batch.
        samples_per_batch: Samples decoded together, to bound memory; default all.
        gen_kwargs: For `generate` (`num_beams`, `max_new_tokens`, `do_sample`, ...).
    """
    batch = len(next(iter(inputs.values())))
    parts: list[Tensor] = []
    step = samples_per_batch or num_samples
    for first in range(0, num_samples, step):
        count = min(step, num_samples - first)
        with posterior_samples(model, count, seed, first):
            tokens = model.generate(**repeat_rows(inputs, count), **gen_kwargs)
        parts.append(tokens.view(count, batch, -1))
    length = max(part.shape[-1] for part in parts)
    padded = [pad_to(part, length, pad_token_id) for part in parts]
    return torch.cat(padded).transpose(0, 1).contiguous()


def pad_to(tokens: Tensor, length: int, pad_token_id: int) -> Tensor:
    """Pad the last dimension on the right up to `length`."""
    return F.pad(tokens, (0, length - tokens.shape[-1]), value=pad_token_id)
