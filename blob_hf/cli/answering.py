"""Texts as `model.predict` writes them, with their uncertainties, inside a run: what abstention and shift look at.

The summaries that a run reports may be the mean's beside the samples'; what a user gets later, and may have withheld,
is what `predict` answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from blob_hf.inference.answers import TextPrediction
from blob_hf.inference.decisions import Floats
from blob_hf.inference.predictor import DECODINGS, how_written, predict
from blob_hf.trainer.engines import require_whole_models
from blob_hf.trainer.seq2seq import BlobSeq2SeqTrainer
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.names import MEAN

OF_A_POINT = ("token_nll", "token_entropy")  # one network disagrees with nobody, and its entropy is all aleatoric


@dataclass(frozen=True)
class Answers:
    """Of one kind of predictive.

    Attributes:
        texts: `(inputs,)`.
        scores: Uncertainties `(inputs,)` by name, higher is less certain.
    """

    texts: list[str]
    scores: Mapping[str, Floats]


class Answering:
    """Writes with a trainer's model as it is, with its samples and with its posterior mean.

    Args:
        prompt, max_length, writing: Of `predict`: how a text is read, and how the answer is written.

    Raises:
        BlobError: The model is in shards.
    """

    def __init__(
        self,
        trainer: BlobSeq2SeqTrainer,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        max_length: int,
        writing: Mapping[str, Any],
    ) -> None:
        require_whole_models(trainer.accelerator, "writing with ood_file or conformal_alpha")
        self.trainer, self.tokenizer = trainer, tokenizer
        wanted = trainer.args.decoding
        self.options = {
            "prompt": prompt, "max_length": max_length, "decoding": wanted if wanted in DECODINGS else DECODINGS[0],
            **writing,
        }  # fmt: skip

    @property
    def samplings(self) -> dict[str, Sampling]:
        """By kind: "" the samples, unless there are none or only the mean's text is wanted; "mean_" the mean."""
        own = self.trainer.eval_sampling
        sampled = own.num_samples and self.trainer.args.decoding != "mean"
        return ({"": own} if sampled else {}) | {MEAN: Sampling(0)}

    @property
    def decoding(self) -> dict[str, Any]:
        """How the texts are written, as `TextRule.abstains` takes it."""
        return how_written(self.trainer.blob_model, self.options["prompt"], self.options)

    def __call__(self, texts: Sequence[str]) -> dict[str, Answers]:
        """Answers to texts by kind; the processes share the work, and each has all of them."""
        return {kind: self._answers(texts, sampling) for kind, sampling in self.samplings.items()}

    def _answers(self, texts: Sequence[str], sampling: Sampling) -> Answers:
        rank, count = self.trainer.args.process_index, self.trainer.args.world_size
        own = list(range(rank, len(texts), count))
        parts: list[tuple[int, str, dict[str, float]]] = []
        if own:
            found = predict(
                self.trainer.blob_model, [texts[index] for index in own], self.tokenizer, sampling,
                batch_size=self.trainer.args.eval_batch_size, **self.options,
            )  # fmt: skip
            assert isinstance(found, TextPrediction)
            scores = {
                name: values for name, values in found.uncertainty.items() if sampling.num_samples or name in OF_A_POINT
            }
            parts = [
                (index, found.texts[i], {name: float(values[i]) for name, values in scores.items()})
                for i, index in enumerate(own)
            ]
        gathered = sorted(gather_object(parts), key=lambda part: part[0])
        names = gathered[0][2]
        return Answers(
            [text for _, text, _ in gathered],
            {name: np.array([scores[name] for _, _, scores in gathered]) for name in names},
        )
