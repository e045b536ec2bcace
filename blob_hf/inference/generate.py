"""Decoding with a posterior: a text per sampled network, or one text of the posterior predictive.

A posterior sample writes its text alone: one set of weights from the encoder to the last token. The samples run as
sample-major blocks of one batch; the KV cache and beams keep the blocks contiguous.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList

from blob_hf.inference.predict import IGNORED_LABEL, repeat_rows
from blob_hf.inference.stopping import stop_strings_of, with_stop_strings
from blob_hf.inference.uncertainty import PredictiveProcessor, PredictiveText
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import posterior_mean, posterior_samples
from blob_hf.tuner.registry import VERBS
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

# What generate() offers that needs a single network, or would hand out tensors in block order.
_ONE_NETWORK = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "penalty_alpha": "contrastive decoding",
    "dola_layers": "DoLa decoding",
    "custom_generate": "custom decoding",
    "streamer": "streaming",
    "encoder_outputs": "passing encoder_outputs (each sample has its own encoder)",
    "past_key_values": "passing a KV cache (each sample has its own)",
    "output_attentions": "output_attentions",
    "output_hidden_states": "output_hidden_states",
}


@torch.no_grad()
def generate_mean(model: Any, inputs: dict[str, Any], **gen_kwargs: Any) -> Tensor:
    """Generate with the posterior mean: `(batch, length)` token ids."""
    with posterior_mean(model):
        return model.generate(**inputs, **gen_kwargs)


def generate_samples(model: BlobModel, inputs: dict[str, Any], sampling: Sampling | int, **gen_kwargs: Any) -> Tensor:
    """Generate once per posterior sample: `(batch, num_samples, length)` token ids, padded on the right."""
    tokens = generate_posterior(model, sampling, **inputs, **gen_kwargs)
    return tokens.view(-1, Sampling.of(sampling).num_samples, tokens.shape[-1])


@torch.no_grad()
def generate_posterior(model: BlobModel, sampling: Sampling | int, **kwargs: Any) -> Any:
    """What `model.generate(..., sampling=Sampling(S))` does: a text from each of S sampled networks.

    Args:
        model: With a posterior; encoder-decoder or decoder-only.
        sampling: S >= 1 samples; `batch_size` of them are decoded together, default all.
        kwargs: Inputs and settings of `generate`: greedy, beam search or token sampling, with its outputs
            `sequences`, `sequences_scores`, `scores`, `logits` and `beam_indices` when asked for.

    Returns:
        As `generate` with `num_return_sequences=S`: rows `(batch * S, length)`, all samples of input 0 first.

    Raises:
        BlobError: S < 1, no posterior, or a way of decoding that needs a single network.
    """
    wanted = Sampling.of(sampling).required().for_texts()
    refuse_one_network(model, kwargs)
    batch = batch_size_of(kwargs)
    parts = []
    for part in wanted.batches():
        with posterior_samples(model, part):
            output = model.generate(**_repeated(kwargs, batch, part.num_samples))
        parts.append(_Part(output, part.first - wanted.first, part.num_samples))
    return _merge(parts, batch, wanted.num_samples, pad_token_of(model, kwargs))


VERBS.generate = generate_posterior


def refuse_one_network(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse ways of decoding that need a single network.

    Raises:
        BlobError: naming what to leave out.
    """
    config = kwargs.get("generation_config") or model.generation_config
    for name, what in _ONE_NETWORK.items():
        if kwargs.get(name, getattr(config, name, None)) not in (None, False):
            raise BlobError(f"{what} is not supported together with posterior samples; leave out {name}")


def batch_size_of(kwargs: dict[str, Any]) -> int:
    """Rows of the inputs of `generate`.

    Raises:
        BlobError: There are none.
    """
    for name in ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids"):
        if isinstance(kwargs.get(name), Tensor):
            return len(kwargs[name])
    raise BlobError("generating with posterior samples needs input_ids (or inputs_embeds)")


def _repeated(kwargs: dict[str, Any], batch: int, times: int) -> dict[str, Any]:
    """Sample-major copies of every tensor with a row per input."""
    rows = {name: v for name, v in kwargs.items() if isinstance(v, Tensor) and v.dim() and len(v) == batch}
    return {**kwargs, **repeat_rows(rows, times)}


def pad_token_of(model: Any, kwargs: dict[str, Any]) -> int:
    """What `generate` fills texts up with that have ended."""
    config = kwargs.get("generation_config") or model.generation_config
    for value in (kwargs.get("pad_token_id"), config.pad_token_id, config.eos_token_id):
        if value is not None:
            return int(value[0] if isinstance(value, (list, tuple)) else value)
    return 0


# ----- putting batches of samples together ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The output of `count` samples from `first` on: a tensor of sequences or a `GenerateOutput`."""

    output: Any
    first: int
    count: int

    @property
    def sequences(self) -> Tensor:
        return self.output if isinstance(self.output, Tensor) else self.output.sequences


def _merge(parts: list[_Part], batch: int, total: int, pad: int) -> Any:
    length = max(part.sequences.shape[-1] for part in parts)

    def by_input(tensors: list[Tensor]) -> Tensor:
        """Rows (sample, input, inner) of each part -> rows (input, sample of all parts, inner)."""
        pairs = zip(tensors, parts, strict=True)
        views = [value.view(part.count, batch, -1, *value.shape[1:]).transpose(0, 1) for value, part in pairs]
        return torch.cat(views, dim=1).flatten(0, 2)

    sequences = by_input([pad_to(part.sequences, length, pad) for part in parts])
    if isinstance(parts[0].output, Tensor):
        return sequences
    first = parts[0].output
    merged: dict[str, Any] = {"sequences": sequences}
    if first.get("sequences_scores") is not None:
        merged["sequences_scores"] = by_input([part.output.sequences_scores for part in parts])
    for name in ("scores", "logits"):
        if first.get(name) is not None:
            steps = max(len(part.output[name]) for part in parts)
            merged[name] = tuple(by_input([_step(part.output[name], t, pad) for part in parts]) for t in range(steps))
    if first.get("beam_indices") is not None:
        width = max(part.output.beam_indices.shape[-1] for part in parts)
        beams = [pad_to(_renumbered(part, part.output.beam_indices, batch, total), width, -1) for part in parts]
        merged["beam_indices"] = by_input(beams)
    return type(first)(**merged)


def _step(scores: tuple[Tensor, ...], t: int, pad: int) -> Tensor:
    """Scores of step t; of a part that had ended by then, a certain pad token."""
    if t < len(scores):
        return scores[t]
    ended = torch.full_like(scores[0], float("-inf"))
    ended[:, pad] = 0.0
    return ended


def _renumbered(part: _Part, beam_indices: Tensor, batch: int, total: int) -> Tensor:
    """Beam indices count rows (sample, input, beam); after the merge rows are (input, sample of all parts, beam)."""
    scores = part.output.scores if part.output.get("scores") is not None else part.output.logits
    beams = (len(scores[0]) if scores else int(beam_indices.max()) + 1) // (part.count * batch)
    sample, row = beam_indices // (batch * beams), beam_indices // beams % batch
    moved = (row * total + part.first + sample) * beams + beam_indices % beams
    return torch.where(beam_indices >= 0, moved, beam_indices)


def pad_to(tokens: Tensor, length: int, pad_token_id: int) -> Tensor:
    """Pad the last dimension on the right up to `length`."""
    return F.pad(tokens, (0, length - tokens.shape[-1]), value=pad_token_id)


# ----- the posterior predictive ----------------------------------------------------------------------------------


@torch.no_grad()
def generate_predictive(
    model: BlobModel, inputs: dict[str, Any], sampling: Sampling | int, *, top_tokens: int = 0, **gen_kwargs: Any
) -> PredictiveText:
    """Decode one text per input from p(y_t | y_<t, x) = 1/S sum_s p(y_t | y_<t, x, A_s), greedily or with beams.

    Eq. (5) of Wang et al. (NeurIPS 2024) at each token; all S networks read the same prefix. Where other processors
    rule tokens out (`no_repeat_ngram_size`, `min_new_tokens`, ...), the uncertainty is that of what remains.

    Args:
        sampling: S >= 1 samples; the S networks decode in one batch.
        top_tokens: How many of the likeliest tokens to keep at each place.
        gen_kwargs: For `generate`; `stop_strings` need `tokenizer`.

    Raises:
        BlobError: Token sampling was asked for, or what `generate_posterior` refuses.
    """
    drawn = Sampling.of(sampling).required().for_texts()
    refuse_one_network(model, gen_kwargs)
    config = gen_kwargs.get("generation_config") or model.generation_config
    if gen_kwargs.get("do_sample", config.do_sample) or gen_kwargs.get("num_return_sequences", 1) != 1:
        raise BlobError("predictive decoding gives one text per input, greedily or with beams; leave out do_sample")
    gen_kwargs = with_stop_strings(gen_kwargs, prompt_length(model, inputs))
    beams, candidates = candidates_of(model, gen_kwargs)
    kept = max(candidates, top_tokens)
    processor = PredictiveProcessor(drawn.num_samples, normalized=beams > 1, candidates=kept)
    own = gen_kwargs.pop("logits_processor", None) or []
    gen_kwargs |= {"logits_processor": LogitsProcessorList([*own, processor]), "return_dict_in_generate": True}
    batch = batch_size_of(inputs)
    with posterior_samples(model, drawn):
        output: Any = model.generate(**repeat_rows(inputs, drawn.num_samples), **gen_kwargs)
    sequences = output.sequences[:batch]
    tokens = generated_tokens(model, inputs, sequences, gen_kwargs)
    rows = chosen_rows(output, tokens)
    top = processor.top_tokens(tokens, rows, top_tokens) if top_tokens else None
    return PredictiveText(sequences, tokens, processor.uncertainty(tokens, rows), top)


def candidates_of(model: Any, gen_kwargs: dict[str, Any]) -> tuple[int, int]:
    """The number of beams, and of a row's continuations that decoding looks at (transformers' beams_to_keep)."""
    config = gen_kwargs.get("generation_config") or model.generation_config
    beams = gen_kwargs.get("num_beams", config.num_beams) or 1
    return beams, max(2, 1 + len(_end_tokens(model, gen_kwargs))) * beams if beams > 1 else 1


def chosen_rows(output: Any, tokens: Tensor) -> Tensor:
    """The row of decoding's batch that each token was chosen from, `(rows, new tokens)`, of the first rows of all."""
    rows = output.get("beam_indices")
    if rows is None:
        return torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens)
    return pad_to(rows[: len(tokens)], tokens.shape[1], 0)


def _end_tokens(model: Any, gen_kwargs: dict[str, Any]) -> list[int]:
    config = gen_kwargs.get("generation_config") or model.generation_config
    ends = gen_kwargs.get("eos_token_id", config.eos_token_id)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [int(ends)]


def prompt_length(model: Any, inputs: dict[str, Any]) -> int:
    """Tokens at the start of a sequence that were not chosen: the start token of a decoder, or the prompt."""
    if model.config.is_encoder_decoder:
        return 1
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # embeddings are not among the ids


def generated_tokens(model: BlobModel, inputs: dict[str, Any], sequences: Tensor, gen_kwargs: dict[str, Any]) -> Tensor:
    """What was written in `sequences` `(batch, length)` of `generate`: `(batch, new tokens)`, -100 behind the end."""
    tokens = _until_end(sequences[:, prompt_length(model, inputs) :], _end_tokens(model, gen_kwargs))
    stop = stop_strings_of(gen_kwargs)
    return tokens if stop is None else stop.ended(tokens)


def _until_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """The tokens up to and with the first end token, -100 behind it."""
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return tokens.masked_fill(is_end.cumsum(-1) - is_end.long() > 0, IGNORED_LABEL)
