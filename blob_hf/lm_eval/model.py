"""`blob`: the harness's `hf` with an adapter's posterior."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from numpy.typing import NDArray
from scipy.special import logsumexp

from blob_hf.inference.generate import generate_predictive
from blob_hf.tuner.adapter_files import SavedAdapter, read, resolve
from blob_hf.tuner.build import load_lora
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.loading import resize_vocabulary
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import posterior_mean, posterior_samples, sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

PREDICTIVES = ("sequence", "choices")
Floats = NDArray[np.float64]
Found = TypeVar("Found")


class BlobLM(HFLM):  # type: ignore[misc, unused-ignore]  # the harness need not be there for mypy
    """A language model with a (B)LoRA adapter, scored by the predictive of its posterior samples.

    Log-likelihoods are those of whole continuations, log 1/S sum_s prod_t p(y_t | y_<t, x, A_s): one network writes a
    text from its first token to its last. Texts are decoded from the predictive of the next token, greedily or with
    beams. No samples is the posterior mean, and then all is as the harness does it for `hf` with `peft`.

    Args:
        pretrained: The base model; the adapter's own by default.
        adapter: Folder or Hub repo of an adapter, of BLoB or of another method.
        num_posterior_samples: S; 0 for the posterior mean.
        posterior_seed: Of the samples.
        predictive: `sequence`, or `choices`: of the continuations of one question each network gives probabilities
            that sum to 1, and these are averaged, as Wang et al. (NeurIPS 2024) do.
        settings: As of `hf`.

    Raises:
        BlobError: No adapter, one without a posterior to sample from, or a setting that is none of these.
    """

    _model: Any  # as the harness has it, which gives no types: a base model first, then a BlobModel
    cache_hook: CacheHook

    def __init__(
        self,
        pretrained: Any = None,
        adapter: str | None = None,
        num_posterior_samples: int = 10,
        posterior_seed: int = 0,
        predictive: str = "sequence",
        **settings: Any,
    ) -> None:
        samples = _whole("num_posterior_samples", num_posterior_samples)
        if samples < 0:
            raise BlobError(f"num_posterior_samples must be >= 0, got {samples}; 0 is the posterior mean")
        if predictive not in PREDICTIVES:
            raise BlobError(f"predictive must be one of {', '.join(PREDICTIVES)}, got {predictive!r}")
        if adapter is None:
            raise BlobError("the model blob needs adapter=, the folder or Hub repo of an adapter; without one use hf")
        for name in ("peft", "delta"):
            if settings.get(name):
                raise BlobError(f"the model blob takes its adapter by adapter=, not {name}=")
        saved = read(resolve(adapter))
        self.predictive = predictive
        self.sampling = Sampling(samples, seed=_whole("posterior_seed", posterior_seed))
        super().__init__(_base(pretrained, saved, settings), **settings)
        self._model = _with_adapter(self._model, saved)
        self.sampling = _available(self._model, self.sampling, adapter)
        self.peft = adapter

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps with the results."""
        return super().get_model_info() | {
            "num_posterior_samples": self.sampling.num_samples, "posterior_seed": self.sampling.seed,
            "predictive": self.predictive,
        }  # fmt: skip

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, nats; greedy is what most of the networks would write."""
        score = super().loglikelihood
        found = self._of_networks(lambda: score(requests, disable_tqdm=disable_tqdm))
        if not self.sampling.num_samples:
            return found[0]
        each = np.array([[value for value, _ in answers] for answers in found])
        total = _of_choices(each, _questions(requests)) if self.predictive == "choices" else _mean(each)
        greedy = np.array([[is_greedy for _, is_greedy in answers] for answers in found]).mean(0) > 0.5
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, nats: a network's is the sum over all windows of a text."""
        score = super().loglikelihood_rolling
        found = self._of_networks(lambda: score(requests, disable_tqdm=disable_tqdm))
        return _mean(np.array(found)).tolist() if self.sampling.num_samples else found[0]

    def _of_networks(self, answer: Callable[[], Found]) -> list[Found]:
        """What each sampled network answers; the posterior mean alone where there are no samples."""
        if not self.sampling.num_samples:
            with posterior_mean(self.model):
                return [answer()]
        hook, self.cache_hook = self.cache_hook, CacheHook(None)  # what one network says is not the result to keep
        try:
            return [_within(posterior_samples(self.model, one), answer) for one in self.sampling.batches(1)]
        finally:
            self.cache_hook = hook

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if not self.sampling.num_samples:
            with posterior_mean(self.model):
                return super()._model_generate(context, max_length, stop, **generation_kwargs)
        temperature = generation_kwargs.pop("temperature", None)
        if generation_kwargs.pop("do_sample", None) or temperature:
            raise BlobError(
                "a task asks for token sampling, but the predictive of posterior samples is decoded greedily or with "
                "beams; set num_posterior_samples=0 or the task's do_sample to false"
            )
        inputs = {"input_ids": context, "attention_mask": generation_kwargs.pop("attention_mask")}
        rows = context.shape[0] * self.sampling.num_samples
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            return generate_predictive(
                self.model, inputs, self.sampling, max_length=max_length, do_sample=False,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], rows),
                pad_token_id=self.tokenizer.pad_token_id, use_cache=True, **generation_kwargs,
            ).sequences  # fmt: skip


def _within(block: AbstractContextManager[None], answer: Callable[[], Found]) -> Found:
    with block:
        return answer()


# ----- loading ----------------------------------------------------------------------------------------------------


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise BlobError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _base(pretrained: Any, saved: SavedAdapter, settings: dict[str, Any]) -> Any:
    """The base model's name, and in the settings the revision that the adapter was trained on."""
    own = saved.config.base_model_name_or_path
    if pretrained is None and not own:
        raise BlobError(f"{saved.folder} does not name its base model; give pretrained=")
    if pretrained in (None, own) and saved.config.revision:
        settings.setdefault("revision", saved.config.revision)
    return own if pretrained is None else pretrained


def _with_adapter(base: Any, saved: SavedAdapter) -> BlobModel:
    if isinstance(base, BlobModel):
        raise BlobError("pretrained= has an adapter already; give its base model")
    resize_vocabulary(base, saved)
    if isinstance(saved.config, BlobConfig) or saved.companions:
        return BlobModel.from_pretrained(saved.folder, model=base).eval()
    return load_lora(base, saved.folder).eval()


def _available(model: BlobModel, wanted: Sampling, adapter: str) -> Sampling:
    found = sampling_of(model, wanted)
    if wanted.num_samples and not found.num_samples:
        raise BlobError(f"{adapter} has no posterior to sample from; set num_posterior_samples=0")
    return found


# ----- the predictive ---------------------------------------------------------------------------------------------


def _mean(log_probs: Floats) -> Floats:
    """Logarithm of the mean over samples of probabilities; `(samples, texts)` in, `(texts,)` out, nats."""
    return logsumexp(log_probs, axis=0) - np.log(len(log_probs))


def _questions(requests: Sequence[Any]) -> list[list[list[int]]]:
    """Of each question, of each of its continuations, the places among the requests (more than one if repeated).

    Continuations of nothing (`acc_mutual_info`) are a question of their own.
    """
    found: dict[Any, dict[int, list[int]]] = {}
    for place, request in enumerate(requests):
        known = request.doc_id is not None
        key = (request.task_name, request.doc_id, request.args[0] == "") if known else place
        found.setdefault(key, {}).setdefault(request.idx, []).append(place)
    return [list(question.values()) for question in found.values()]


def _of_choices(log_probs: Floats, questions: list[list[list[int]]]) -> Floats:
    """The predictive of choices times the probability, by the sequence predictive, that any of them is written.

    The factor is the same for all choices, so that a softmax over them is the predictive; it keeps what a score per
    character means, and a single network's scores are its log-likelihoods.

    Args:
        log_probs: Of continuations by each sample, `(samples, requests)`, nats.
        questions: Places of the continuations of each.

    Returns:
        `(requests,)`, nats.
    """
    total = np.empty(log_probs.shape[1])
    for question in questions:
        scores = log_probs[:, [places[0] for places in question]]
        any_of_them = logsumexp(scores, axis=1, keepdims=True)
        for places, value in zip(question, _mean(scores - any_of_them) + _mean(any_of_them), strict=True):
            total[places] = value
    return total
