"""What `BlobModel.predict` answers: labels or texts of new inputs, and how sure the posterior is of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blob_hf.inference.decisions import Bools, ClassDecisions, Floats
from blob_hf.inference.uncertainty import TokenUncertainty, TopTokens


def set_names(sets: Bools, probabilities: Floats, names: Sequence[str]) -> list[list[str]]:
    """Prediction sets `(inputs, classes)` as names of classes, likeliest first."""
    return [
        [names[index] for index in np.argsort(-of_row, kind="stable") if own[index]]
        for own, of_row in zip(sets, probabilities, strict=True)
    ]


@dataclass(frozen=True)
class Prediction:
    """Classes of inputs under the posterior predictive, eq. (5) of Wang et al. (NeurIPS 2024).

    Where a temperature was fitted to the adapter, `probabilities` (and so labels, `entropy` and `confidence`) are the
    predictive's after it, as it was fitted; all else is of the networks themselves. Without one,
    entropy = aleatoric + epistemic.

    Attributes:
        class_names: In the order of the class ids, as the model's config has them.
        probabilities: mean_s p(y | x, A_s), `(inputs, classes)`.
        sample_probabilities: p(y | x, A_s), `(inputs, samples, classes)`; the posterior mean's alone without samples.
        entropy: Of `probabilities`, nats, `(inputs,)`: total uncertainty.
        aleatoric: mean_s H[p(y | x, A_s)], nats, `(inputs,)`: what every network is unsure of.
        epistemic: Mutual information of label and weights, nats, `(inputs,)`: what the networks disagree about.
        networks: With as many samples as needed, how many networks each input took, `(inputs,)`; those of an input
            that settled early are repeated in `sample_probabilities`. None where all inputs have the same.
        decisions: The inputs' prediction sets, and which of them it abstains from; None where the adapter has no rule
            for that.
    """

    class_names: list[str]
    probabilities: Floats
    sample_probabilities: Floats
    entropy: Floats
    aleatoric: Floats
    epistemic: Floats
    networks: NDArray[np.int64] | None = None
    decisions: ClassDecisions | None = None

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def label_ids(self) -> NDArray[np.int64]:
        """Ids of the likeliest classes, `(inputs,)`."""
        return self.probabilities.argmax(axis=1)

    @property
    def labels(self) -> list[str]:
        """Names of the likeliest classes, `(inputs,)`."""
        return [self.class_names[index] for index in self.label_ids]

    @property
    def confidence(self) -> Floats:
        """Probability of the likeliest class, `(inputs,)`."""
        return self.probabilities.max(axis=1)

    @property
    def std(self) -> Floats:
        """Standard deviation of the probabilities over the samples, `(inputs, classes)`; 0 for one network."""
        return self.sample_probabilities.std(axis=1)

    @property
    def prediction_sets(self) -> list[list[str]] | None:
        """Names of the classes in each input's prediction set, likeliest first, `(inputs,)`; None without a rule."""
        if self.decisions is None:
            return None
        return set_names(self.decisions.sets, self.probabilities, self.class_names)

    def records(self) -> list[dict[str, Any]]:
        """A plain dict for each input, for JSON."""
        sets, decided = self.prediction_sets, self.decisions
        return [
            {
                "label": label,
                "probability": float(confidence),
                "probabilities": dict(zip(self.class_names, probabilities.tolist(), strict=True)),
                "entropy": float(self.entropy[i]),
                "aleatoric": float(self.aleatoric[i]),
                "epistemic": float(self.epistemic[i]),
                **({} if self.networks is None else {"networks": int(self.networks[i])}),
                **({} if sets is None else {"prediction_set": sets[i]}),
                **({} if decided is None else {"abstain": bool(decided.abstain[i])}),
            }
            for i, (label, confidence, probabilities) in enumerate(
                zip(self.labels, self.confidence, self.probabilities, strict=True)
            )
        ]


@dataclass(frozen=True)
class TextPrediction:
    """A text for each input, those of the sampled networks, and how unsure the posterior predictive is of it.

    Attributes:
        texts: The answers, `(inputs,)`.
        samples: A text of each network, `(inputs, samples)`; none where there is only the posterior mean.
        tokens: Ids of the tokens of `texts`, `(inputs, length)`, -100 behind their end.
        token_uncertainty: Of each of these tokens, nats.
        uncertainty: Of each text, `(inputs,)` by name, higher is less certain: token_nll, token_entropy,
            token_aleatoric and mutual_information are means over its tokens, nats; dissimilarity (1 - ROUGE-L) and
            cluster_entropy (nats) say how the samples differ, if there are two or more, and so do
            `blob_hf.metrics.semantics.SEMANTIC_SCORES` where it was asked whether they mean the same.
        sample_log_probs: log p(text | x, A_s) of each sample under the network that wrote it, nats,
            `(inputs, samples)`.
        sample_sets: The set of one meaning that each sample belongs to, `(inputs, samples)`; none where that was not
            asked.
        abstain: Whether the text is better withheld, `(inputs,)`; None where the adapter has no rule for that.
        top_tokens: The likeliest tokens at each place of `texts`, where they were asked for.
    """

    texts: list[str]
    samples: list[list[str]]
    tokens: NDArray[np.int64]
    token_uncertainty: TokenUncertainty
    uncertainty: dict[str, Floats]
    sample_log_probs: Floats
    sample_sets: list[list[int]]
    abstain: Bools | None = None
    top_tokens: TopTokens | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def entropy(self) -> Floats:
        """Mean entropy of the predictive over the next token, nats a token, `(inputs,)`: total uncertainty."""
        return self.uncertainty["token_entropy"]

    def records(self) -> list[dict[str, Any]]:
        """A plain dict for each input, for JSON."""
        return [
            {
                "generated_text": text,
                "samples": samples,
                **({"sample_sets": self.sample_sets[i]} if self.sample_sets[i] else {}),
                "uncertainty": {name: float(values[i]) for name, values in self.uncertainty.items()},
                **({} if self.abstain is None else {"abstain": bool(self.abstain[i])}),
            }
            for i, (text, samples) in enumerate(zip(self.texts, self.samples, strict=True))
        ]
