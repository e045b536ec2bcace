"""Whether answers mean the same, by a model of natural language inference: each has to entail the other."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from blob_hf.metrics.semantics import Relations
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import reason

_LONGEST = 512


class EntailmentEquivalence:
    """Two answers mean the same if each entails the other (Kuhn et al., ICLR 2023, arXiv 2302.09664).

    An answer is read behind its question, where both answers and twice the question fit into the model; else alone.
    (Kuhn et al. and Farquhar et al. use DeBERTa models fine-tuned on MNLI, such as microsoft/deberta-large-mnli.)

    Args:
        model_name_or_path: Hub id or folder of a classifier of pairs, one of whose classes is called entailment.
        batch_size: Pairs per forward.
        device: Where it runs.

    Raises:
        BlobError: There is no such model, or none of its classes is entailment.
    """

    def __init__(self, model_name_or_path: str, batch_size: int = 32, device: str | torch.device = "cpu") -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_name_or_path)
            model: Any = AutoModelForSequenceClassification.from_pretrained(model_name_or_path, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise BlobError(
                f"cannot get the NLI model {model_name_or_path!r} from a local folder or the Hugging Face Hub "
                f"({reason(error)}); leave it out to compare answers by their words"
            ) from error
        names = {index: str(name).lower() for index, name in model.config.id2label.items()}
        found = [index for index, name in names.items() if name.startswith("entail")]
        if len(found) != 1 or len(names) < 2:
            raise BlobError(
                f"an NLI model has a class called entailment; {model_name_or_path} has {', '.join(names.values())}"
            )
        self.entailment, self.batch_size, self.device = int(found[0]), batch_size, device
        self.model = model.eval().to(device)
        longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
        offset = 2 if "roberta" in model.config.model_type else 0  # its positions start behind the padding's
        self.longest = min(self.tokenizer.model_max_length, longest - offset)

    def __call__(self, texts: Sequence[str], question: str = "") -> Relations:
        """Relations of answers: `similarity` is the mean probability of entailment of both directions."""
        distinct = list(dict.fromkeys(texts))
        index = [distinct.index(text) for text in texts]
        read = [f"{question.strip()} {text}".strip() for text in distinct]
        if not self._fit(read):
            read = distinct
        count = len(distinct)
        entails, probability = np.eye(count, dtype=bool), np.eye(count)
        pairs = list(permutations(range(count), 2))
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            probs = self._probabilities([read[i] for i, _ in batch], [read[j] for _, j in batch])
            for (i, j), own in zip(batch, probs, strict=True):
                entails[i, j], probability[i, j] = own.argmax() == self.entailment, own[self.entailment]
        chosen = np.ix_(index, index)
        return Relations((entails & entails.T)[chosen], ((probability + probability.T) / 2)[chosen])

    def _fit(self, texts: Sequence[str]) -> bool:
        lengths = sorted(len(ids) for ids in self.tokenizer(list(texts)).input_ids)
        return sum(lengths[-2:]) <= self.longest

    @torch.no_grad()
    def _probabilities(self, premises: list[str], hypotheses: list[str]) -> NDArray[np.float64]:
        inputs = self.tokenizer(
            premises, hypotheses, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return self.model(**inputs.to(self.device)).logits.double().softmax(-1).cpu().numpy()
