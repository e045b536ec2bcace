"""`BlobModel`: a `PeftModel` whose LoRA adapters carry a Gaussian posterior over A; its files are `saved_model`'s."""

import logging
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from blob_hf.tuner import posterior
from blob_hf.tuner.base_model import (
    is_sequence_classifier,
    untie_adapted_layers,
)
from blob_hf.tuner.config import BlobConfig
from blob_hf.tuner.injection import remove_layers
from blob_hf.tuner.registry import VERBS
from blob_hf.tuner.repeating import repeated
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.sampling import Sampling
from blob_hf.tuner.saved_model import SavedModel
from blob_hf.utils.errors import BlobError

logger = logging.getLogger(__name__)

FORWARDS_WITHOUT_KL = 20  # after which a training without a KL is warned of


class BlobModel(SavedModel):
    """A PEFT model with a posterior over the LoRA A matrices; everything a `PeftModel` does, it does.

    In train mode each forward draws noise (`BlobConfig.noise`); in eval mode the model is the posterior mean, unless
    samples are frozen by `posterior_samples`. Subclasses add PEFT's task-specific forward; build one with
    `get_blob_model`, `bayesianize` or `BlobModel.from_pretrained`.
    """

    unregularized_forwards = 0  # training forwards since the KL was last asked for; -1: no more counted

    # ----- the posterior -----------------------------------------------------------------------------------------

    @property
    def blob_config(self) -> BlobConfig:
        """The active adapter's configuration; of several active ones the first one's."""
        configs = [self.peft_config[name] for name in self.active_adapters]
        found = [config for config in configs if isinstance(config, BlobConfig)]
        if not found:
            raise BlobError(f"the active adapter {self.active_adapter!r} has no posterior; bayesianize it first")
        return found[0]

    @property
    def has_posterior(self) -> bool:
        """Whether the active adapters have a Gaussian A."""
        return bool(posterior.gaussian_layers(self))

    def posterior_mean(self) -> AbstractContextManager[None]:
        """Context in which the network is the posterior mean, also in train mode."""
        return posterior.posterior_mean(self)

    def posterior_samples(
        self, sampling: Sampling | int, seed: int | None = None, repeat: bool = False
    ) -> AbstractContextManager[None]:
        """Context in which the network is frozen posterior samples over sample-major rows.

        See `blob_hf.tuner.posterior.posterior_samples`, also for what it cannot know of rows that you repeat.

        Args:
            repeat: Have `model(...)` and `model.generate(...)` repeat every tensor of the batch S times themselves:
                outputs are sample-major, `out.unflatten(0, (S, -1))`.
        """
        return posterior.posterior_samples(self, sampling, seed, repeat)

    def kl_divergence(self) -> Tensor:
        """KL(q || p) of the active adapters, nats (scalar, differentiable)."""
        self.unregularized_forwards = -1
        configs = {name: self.peft_config[name] for name in self.active_adapters}
        parts = [
            posterior.kl_divergence(self, config.prior_std, name)
            for name, config in configs.items()
            if isinstance(config, BlobConfig)
        ]
        return torch.stack(parts).sum() if parts else posterior.kl_divergence(self, self.blob_config.prior_std)

    def posterior_statistics(self) -> posterior.PosteriorStatistics:
        """Std, KL (nats) and signal-to-noise ratio, per layer and in total."""
        return posterior.posterior_statistics(self, self.blob_config.prior_std)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = repeated(self, args, kwargs)
        if self.training and torch.is_grad_enabled() and self.unregularized_forwards >= 0:
            self._count_forward()
        for companion in self.companions.get(str(self.active_adapter), {}).values():
            if companion.asked_by in kwargs:
                return companion.answer(self, super().forward, kwargs)
        return super().forward(*args, **kwargs)

    @property
    def classifies(self) -> bool:
        """Whether what it predicts are classes: of whole texts, or the choices of a question."""
        companions = self.companions.get(str(self.active_adapter), {}).values()
        return is_sequence_classifier(self.get_base_model()) or any(one.asked_by for one in companions)

    def _count_forward(self) -> None:
        """Warn once where a posterior is trained without its KL, by a plain `transformers.Trainer` for example."""
        self.unregularized_forwards += 1
        if self.unregularized_forwards == FORWARDS_WITHOUT_KL:
            self.unregularized_forwards = -1
            if self.has_posterior:
                logger.warning(
                    "%d training steps without the KL of the posterior: this trains LoRA with noise, not BLoB; use "
                    "BlobTrainer (or BlobTrainerMixin with another trainer), or add model.kl_divergence() to the loss",
                    FORWARDS_WITHOUT_KL,
                )

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        is_new = adapter_name not in self.peft_config
        try:
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        except Exception:
            if is_new:
                remove_layers(self, adapter_name)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.companions.pop(adapter_name, None)
        self.adapter_heads.pop(adapter_name, None)
        self.folders.pop(adapter_name, None)
        self.tokenizers.pop(adapter_name, None)

    def generate(  # type: ignore[override]
        self, *args: Any, sampling: Sampling | int | None = None, **kwargs: Any
    ) -> Tensor | ModelOutput:
        """transformers' `generate`; with `sampling` a text from each of so many posterior samples.

        Args:
            sampling: S samples: returns `(batch * S, length)`, all samples of input 0 first, as
                `num_return_sequences` orders them: `tokens.unflatten(0, (-1, S))`. None generates with the network as
                it is (in eval mode the mean).

        Raises:
            BlobError: See `blob_hf.inference.generate_posterior`.
        """
        if sampling is None:
            args, kwargs = repeated(self, args, kwargs)
            return super().generate(*args, **kwargs)
        if args:
            kwargs["input_ids"] = args[0]
        return VERBS.required("generate")(self, sampling, **kwargs)

    def predict(
        self,
        inputs: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling | int | str = Sampling(),  # noqa: B008
        **options: Any,
    ) -> Any:
        """Labels or texts for new inputs, with what the posterior samples say of their certainty.

        Args:
            inputs: Texts, pairs, conversations; a tokenized batch; a `datasets.Dataset` of any of these.
            tokenizer: Default the one saved with the adapter, else the base model's.
            sampling: S samples, or their number; 0 is the posterior mean; "auto" as many as each input needs.
            options: See `blob_hf.inference.predictor.predict`.

        Returns:
            A `blob_hf.Prediction` of a classifier, a `blob_hf.TextPrediction` of a model that writes.

        Raises:
            BlobError: The inputs are none of these, there is no tokenizer, or the model has another task.
        """
        return VERBS.required("predict")(self, inputs, tokenizer, sampling, **options)

    def predict_proba(
        self,
        inputs: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling | int | str = Sampling(),  # noqa: B008
        **options: Any,
    ) -> NDArray[np.float64]:
        """A classifier's probabilities `(inputs, classes)`, as scikit-learn gives them: columns are class ids in order.

        Args: as those of `predict`.

        Raises:
            BlobError: As `predict`, or not a classifier.
        """
        found = self.predict(inputs, tokenizer, sampling, **options)
        if not hasattr(found, "probabilities"):
            raise BlobError(f"predict_proba is for classifiers, not for {type(self.get_base_model()).__name__}")
        return found.probabilities

    # ----- merging -----------------------------------------------------------------------------------------------

    def merge_posterior_sample(self, seed: int = 0, index: int = 0) -> nn.Module:
        """Merge one posterior sample into the base weights, as `merge_and_unload` does the posterior mean.

        Args:
            seed, index: Sample `index` of `posterior_samples(..., seed)`.

        Returns:
            The base model, an ordinary transformers model; the adapter is gone from it.

        Raises:
            BlobError: No posterior, or merged already.
        """
        for layer, sample in posterior.layer_samplings(self, Sampling(1, seed=seed, first=index)).items():
            layer.fix_at_sample(sample)
        return self.merge_and_unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the posterior mean into the base weights: PEFT's, after untying an `lm_head` that has LoRA."""
        self._refuse_while_sampling()
        untie_adapted_layers(self)
        tuner: Any = self.base_model
        base = tuner.merge_and_unload(*args, **kwargs)
        for path, module in list(base.named_modules()):  # a head whose weights can be sampled
            if isinstance(module, SampledLinear):
                parent, _, name = path.rpartition(".")
                setattr(base.get_submodule(parent), name, module.plain())
        return base

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge without unloading: PEFT's, after untying an `lm_head` that has LoRA."""
        self._refuse_while_sampling()
        untie_adapted_layers(self)
        tuner: Any = self.base_model
        tuner.merge_adapter(*args, **kwargs)

    def _refuse_while_sampling(self) -> None:
        if any(isinstance(module, SampledLinear) and module.is_frozen_somewhere for module in self.modules()):
            raise BlobError(
                "inside posterior_samples or posterior_mean the adapter cannot be merged: the samples would be gone; "
                "merge_posterior_sample(seed, index) outside of them merges one"
            )
