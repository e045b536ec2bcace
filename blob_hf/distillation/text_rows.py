"""What a teacher says of the next token along texts: those of the data, or those that it writes itself.

The student learns the token distributions of the posterior predictive, mean_s p(y_t | y_<t, x, A_s), along given
prefixes (word-level distillation of Kim & Rush, EMNLP 2016; of a posterior predictive for language models: Vejendla et
al., arXiv 2505.11731; of an ensemble: Malinin et al., ICLR 2020). Where a row has no target, the teacher's own greedy
answer is the prefix.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blob_hf.distillation.cache import Shard, TargetCache
from blob_hf.distillation.loss import kl_tokens, lumped
from blob_hf.inference.evaluating import evaluating
from blob_hf.inference.generate import generate_predictive
from blob_hf.inference.predict import IGNORED_LABEL, parts_of, repeat_rows
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import posterior_mean, posterior_samples
from blob_hf.tuner.sampling import Sampling

_TARGETS = ("ids", "log_probs", "log_rest")
_LABELS = "labels"


@dataclass(frozen=True)
class Context:
    """What a model reads for a row, and the tokens that it is to answer with.

    Attributes:
        tokens: Of the encoder's input, or of the prompt.
        target: None: what the teacher writes.
    """

    tokens: list[int]
    target: list[int] | None = None


@dataclass(frozen=True)
class Layout:
    """How rows become a batch of a model.

    Attributes:
        encodes: Whether it is an encoder-decoder; a decoder reads context and target as one text, padded on the left,
            so that all of them end in the same place.
        pad: Token that fills up; it is masked.
        start: First token of a decoder with an encoder.
        accepts: Names of the inputs that its forward knows.
    """

    encodes: bool
    pad: int
    start: int | None
    accepts: frozenset[str]

    @classmethod
    def of(cls, model: BlobModel, pad: int) -> "Layout":
        base: Any = model.get_base_model()
        known = frozenset(inspect.signature(base.forward).parameters)
        start = getattr(base.config, "decoder_start_token_id", None)
        return cls(bool(base.config.is_encoder_decoder), pad, start, known)

    def prompts(self, contexts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Inputs that an answer is generated from."""
        ids, mask = self._padded(contexts, left=not self.encodes)
        return {"input_ids": ids, "attention_mask": mask}

    def batch(self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Inputs of `logits`, and `labels` `(rows, longest target)`, -100 where a row has no token."""
        labels = self.aligned([torch.tensor(one) for one in targets], IGNORED_LABEL)
        if self.encodes:
            shifted = [[self.start or 0, *one[:-1]] for one in targets]
            decoder, _ = self._padded(shifted, left=False)
            return {**self.prompts(contexts), "decoder_input_ids": decoder, _LABELS: labels}
        ids, mask = self._padded([[*c, *t] for c, t in zip(contexts, targets, strict=True)], left=True)
        found = {"input_ids": ids, "attention_mask": mask, _LABELS: labels}
        if "position_ids" in self.accepts:
            found["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return found

    def aligned(self, rows: Sequence[Tensor], fill: float) -> Tensor:
        """Something for each token of the targets, as the labels have them: a decoder's rows end together."""
        width = max(len(row) for row in rows)
        found = rows[0].new_full((len(rows), width, *rows[0].shape[1:]), fill)
        for number, row in enumerate(rows):
            start = 0 if self.encodes else width - len(row)
            found[number, start : start + len(row)] = row
        return found

    def logits(self, network: nn.Module, inputs: dict[str, Any], width: int) -> Tensor:
        """The logits that the target's tokens are predicted by, `(rows, width, vocabulary)`."""
        if self.encodes:
            return network(**inputs).logits
        kept = {"logits_to_keep": width + 1} if "logits_to_keep" in self.accepts else {}
        return network(**inputs, **kept).logits[:, -width - 1 : -1]

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids, mask = torch.full((len(rows), width), self.pad), torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            start = width - len(row) if left else 0
            ids[number, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
            mask[number, start : start + len(row)] = 1
        return ids, mask


@dataclass
class TextRows:
    """Inputs of a model that writes, and once the teacher has answered its predictive along the targets.

    Attributes:
        top_k: How many tokens of a distribution are kept one by one.
        max_new_tokens: Longest answer of the teacher's own, tokens.
        ends: Tokens that end such an answer; none: those of the model's generation config.
        targets: Tokens of each row, given or written.
        ids, log_probs, log_rest: Of each row `(tokens, k)`, `(tokens, k)` and `(tokens,)`, see `loss.lumped`.
        epistemic: Mutual information of the next token and the weights, nats, of each row `(tokens,)`.
    """

    contexts: Sequence[Context]
    layout: Layout
    top_k: int = 32
    max_new_tokens: int = 128
    ends: tuple[int, ...] = ()
    targets: list[list[int]] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    log_rest: list[Tensor] = field(default_factory=list)
    epistemic: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.contexts)

    def ask(self, teacher: BlobModel, sampling: Sampling, cache: TargetCache, batch_size: int, block: int) -> None:
        """Have the teacher's distributions of all rows; see `ClassRows.ask`."""

        def answer(indices: Sequence[int]) -> Shard:
            found: dict[int, Shard] = {}
            longest_first = sorted(indices, key=self._length, reverse=True)
            with evaluating(teacher), torch.no_grad():
                for start in range(0, len(longest_first), batch_size):
                    batch = longest_first[start : start + batch_size]
                    found |= zip(batch, self._answers(teacher, batch, sampling), strict=True)
            rows = [found[index] for index in indices]
            lengths = torch.tensor([len(row["target"]) for row in rows])
            return {"lengths": lengths, **{name: torch.cat([row[name] for row in rows]) for name in rows[0]}}

        # what ends an answer counts where one is written
        keys = [[one.tokens, one.target] if one.target else [one.tokens, self.ends] for one in self.contexts]
        contents = [json.dumps(key).encode() for key in keys]
        shards = cache.answers(contents, block, answer)
        for shard in shards:
            parts = shard.pop("lengths").tolist()
            self.targets += [part.tolist() for part in shard["target"].split(parts)]
            for name in (*_TARGETS, "epistemic"):
                getattr(self, name).extend(shard[name].split(parts))

    def _length(self, index: int) -> int:
        return len(self.contexts[index].tokens) + len(self.contexts[index].target or [])

    def _answers(self, teacher: BlobModel, indices: Sequence[int], sampling: Sampling) -> list[Shard]:
        contexts = [self.contexts[index].tokens for index in indices]
        given = [self.contexts[index].target for index in indices]
        targets = [one for one in given if one is not None]
        if len(targets) < len(given):  # rows of one file have answers, or none has
            written = self._written(teacher, contexts, sampling)
            targets = [wrote if own is None else own for own, wrote in zip(given, written, strict=True)]
        batch = {name: value.to(teacher.device) for name, value in self.layout.batch(contexts, targets).items()}
        labels = batch.pop(_LABELS)
        log_probs, epistemic = predictive_along(teacher, self.layout, batch, labels.shape[1], sampling)
        parts = (*lumped(log_probs, self.top_k), epistemic)
        kept = labels != IGNORED_LABEL
        rows = []
        for number, target in enumerate(targets):
            named = zip((*_TARGETS, "epistemic"), (part[number][kept[number]].cpu() for part in parts), strict=True)
            rows.append({"target": torch.tensor(target, dtype=torch.int32), **dict(named)})
        return rows

    def _written(self, teacher: BlobModel, contexts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
        """What the predictive writes greedily, with the token that ends it."""
        inputs = {name: value.to(teacher.device) for name, value in self.layout.prompts(contexts).items()}
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        if self.ends:
            settings["eos_token_id"] = list(self.ends)
        found = generate_predictive(teacher, inputs, sampling, **settings, pad_token_id=self.layout.pad)
        return [[token for token in row if token != IGNORED_LABEL] for row in found.tokens.tolist()]

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch for `loss`."""
        contexts = [self.contexts[index].tokens for index in indices]
        batch = self.layout.batch(contexts, [self.targets[index] for index in indices])
        for name in _TARGETS:
            batch[name] = self.layout.aligned([getattr(self, name)[index] for index in indices], 0)
        return batch

    def loss(self, student: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean KL(teacher || student) of a batch, nats a token."""
        labels = batch.pop(_LABELS)
        kept = labels != IGNORED_LABEL
        ids, log_probs, log_rest = (batch.pop(name) for name in _TARGETS)
        logits = self.layout.logits(student, batch, labels.shape[1])
        return kl_tokens(logits[kept], ids[kept], log_probs[kept], log_rest[kept]).mean()


def predictive_along(
    model: BlobModel, layout: Layout, inputs: dict[str, Any], width: int, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Log mean_s p(. | y_<t, x, A_s) `(rows, width, vocabulary)`, and the mutual information `(rows, width)`, nats.

    Args:
        inputs: Of `Layout.batch`, without labels.
        sampling: 0 samples: the posterior mean, which has no mutual information.
    """
    if not sampling.num_samples:
        with posterior_mean(model):
            log_probs = layout.logits(model, inputs, width).float().log_softmax(-1)
        return log_probs, torch.zeros_like(log_probs[..., 0])
    total, aleatoric, count = None, torch.zeros(()), 0
    for part in parts_of(model, sampling.for_texts()):
        with posterior_samples(model, part):
            logits = layout.logits(model, repeat_rows(inputs, part.num_samples), width)
        for block in logits.split(len(inputs["input_ids"])):
            log_probs = block.float().log_softmax(-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
            aleatoric = aleatoric + torch.special.entr(log_probs.exp()).sum(-1)
            count += 1
    assert total is not None
    predictive = total - math.log(count)
    entropy = torch.special.entr(predictive.exp()).sum(-1)
    return predictive, (entropy - aleatoric / count).clamp(min=0.0)


def score_texts(model: BlobModel, rows: TextRows, sampling: Sampling, batch_size: int) -> dict[str, float]:
    """How well a model predicts given targets: NLL of their tokens, and how often the likeliest token is the right one.

    Args:
        sampling: 0 samples: the posterior mean.

    Returns:
        nll, nats a token, and token_accuracy in [0, 1].
    """
    nll, right, count = 0.0, 0, 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            some = rows.contexts[start : start + batch_size]
            batch = rows.layout.batch([one.tokens for one in some], [one.target or [] for one in some])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch.pop(_LABELS)
            log_probs, _ = predictive_along(model, rows.layout, batch, labels.shape[1], sampling)
            kept = labels != IGNORED_LABEL
            own = log_probs[kept].gather(-1, labels[kept].unsqueeze(-1))
            nll -= own.double().sum().item()
            right += int((log_probs[kept].argmax(-1) == labels[kept]).sum())
            count += int(kept.sum())
    return {"nll": nll / count, "token_accuracy": right / count}
