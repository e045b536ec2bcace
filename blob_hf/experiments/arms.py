"""The arms of experiment IV: which weights write a summary, and how its tokens are chosen.

Crossing weights with decoding separates two kinds of randomness that the published comparison mixes: there BLoB varied
its weights and decoded greedily, while LoRA kept its weights and sampled tokens.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper

from blob_hf.inference.generate import generate_posterior
from blob_hf.inference.predict import repeat_rows
from blob_hf.tuner.posterior import posterior_mean, posterior_samples, sampling_of
from blob_hf.tuner.sampling import Sampling


@dataclass(frozen=True)
class Arm:
    """One cell of the cross.

    Attributes:
        method: Whose adapter, for example "blob".
        samples_weights: A sampled network per summary, or the mean (for LoRA: its weights) for all.
        samples_tokens: Tokens drawn from the network's distribution, or greedy.
    """

    method: str
    samples_weights: bool
    samples_tokens: bool

    @property
    def is_random(self) -> bool:
        """Whether summaries of one dialogue differ at all."""
        return self.samples_weights or self.samples_tokens


PEERS = ("mc_dropout", "ensemble", "tfb")  # sampled methods beside BLoB that write summaries


def _crossed(method: str) -> dict[str, Arm]:
    return {
        f"{method}-{'sample' if weights else 'mean'}-{'sampling' if tokens else 'greedy'}": Arm(method, weights, tokens)
        for weights in (False, True)
        for tokens in (False, True)
    }


ARMS = {
    **_crossed("blob"),
    "lora-greedy": Arm("lora", samples_weights=False, samples_tokens=False),
    "lora-sampling": Arm("lora", samples_weights=False, samples_tokens=True),
    **{name: arm for method in PEERS for name, arm in _crossed(method).items()},
}


class SeededTokenSampling(LogitsProcessor):
    """Leaves one token per row: the one that a given uniform number picks from the row's distribution.

    transformers' own sampling takes its numbers from the global random state, in the order of the batches. With a
    number for each (row, step) a text depends on its own key alone: not on what was generated before it, or where.

    Args:
        uniforms: `(rows, steps)` in [0, 1).
        start: Tokens of the sequence before the first generated one.
    """

    def __init__(self, uniforms: Tensor, start: int) -> None:
        self.uniforms, self.start = uniforms, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        cumulative = scores.double().softmax(-1).cumsum(-1)
        wanted = self.uniforms[:, step : step + 1].to(cumulative) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


def uniforms(seed: int, dialogue: str, arm: str, samples: range, steps: int) -> Tensor:
    """The numbers that choose the tokens of some samples, `(samples, steps)`; each row has a key of its own."""
    rows = []
    for sample in samples:
        key = hashlib.sha256(f"{seed}/{dialogue}/{arm}/{sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def summaries(
    model: Any,
    input_ids: Tensor,
    name: str,
    dialogue: str,
    sampling: Sampling,
    max_new_tokens: int,
    top_k: int = 50,
) -> Tensor:
    """Summaries of one dialogue by one arm, `(samples, length)`: one row where the arm is not random.

    Args:
        input_ids: `(1, length)`.
        name: A key of `ARMS`.
        sampling: S summaries, `batch_size` of them generated together. An ensemble has its members alone to sample
            from: fewer summaries where it samples weights.
        top_k: Token sampling from the k likeliest tokens, 0 for all (the published runs: transformers' 50).
    """
    arm = ARMS[name]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if not arm.is_random:
        with posterior_mean(model):
            return model.generate(**inputs, **options)
    if arm.samples_weights:
        available = sampling_of(model, sampling).num_samples
        sampling = replace(sampling, num_samples=min(sampling.num_samples, available))
    if not arm.samples_tokens:
        return generate_posterior(model, sampling, **inputs, **options)
    start = 1 if model.config.is_encoder_decoder else input_ids.shape[1]
    texts: list[Tensor] = []
    for part in sampling.batches():
        chosen = uniforms(sampling.seed, dialogue, name, part.indices, max_new_tokens)
        processors = [TopKLogitsWarper(top_k)] if top_k else []
        processor = LogitsProcessorList([*processors, SeededTokenSampling(chosen, start)])
        weights = posterior_samples(model, part) if arm.samples_weights else posterior_mean(model)
        with weights:
            texts.extend(model.generate(**repeat_rows(inputs, part.num_samples), **options, logits_processor=processor))
    return torch.nn.utils.rnn.pad_sequence(
        texts, batch_first=True, padding_value=model.generation_config.pad_token_id or 0
    )
