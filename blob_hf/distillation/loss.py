"""The loss of distillation: KL(teacher's posterior predictive || student), nats, over classes or over tokens.

Averaged over inputs it is least where the student *is* the predictive (Korattikara et al., "Bayesian dark knowledge",
NeurIPS 2015; the soft targets are those of Hinton et al., 2015, at temperature 1: what is learned is the distribution
itself, not a ranking). Of a vocabulary the teacher keeps its k likeliest tokens, and all others are one further
outcome: a proper KL of k + 1 outcomes, which is at most the whole one (data processing), and is it for k = vocabulary.
"""

import torch
from torch import Tensor

_RULED_OUT = -1e9  # finite: a token that is not among the others has no probability and no gradient, and gives no NaN


def kl_classes(logits: Tensor, log_probs: Tensor) -> Tensor:
    """KL(teacher || student) of every row, nats.

    Args:
        logits: The student's, `(..., classes)`.
        log_probs: The teacher's log-probabilities, `(..., classes)`, nats; a class without probability counts nothing.

    Returns:
        `(...)`, float32.
    """
    return _kl(log_probs.float(), logits.float().log_softmax(-1))


def kl_tokens(logits: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor) -> Tensor:
    """KL(teacher || student) of every position over the teacher's k likeliest tokens and the rest as one, nats.

    Args:
        logits: The student's over the vocabulary, `(..., vocabulary)`.
        ids: The k tokens, `(..., k)`, different ones.
        log_probs: The teacher's log-probabilities of them, `(..., k)`, nats.
        log_rest: That of all other tokens together, `(...)`, nats; -inf if there are none.

    Returns:
        `(...)`, float32.
    """
    logits, ids = logits.float(), ids.long()
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, _RULED_OUT).logsumexp(-1, keepdim=True)
    student = torch.cat([logits.gather(-1, ids), rest], dim=-1) - total
    return _kl(torch.cat([log_probs, log_rest.unsqueeze(-1)], dim=-1).float(), student)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over the last dimension of p (log p - log q), where 0 log 0 is 0."""
    probs = teacher.exp()
    return (torch.xlogy(probs, probs) - probs * student).sum(-1)


def lumped(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest outcomes, and all others as one.

    Args:
        log_probs: `(..., vocabulary)`, nats.
        k: At most the vocabulary's size is taken.

    Returns:
        As `kl_tokens` takes them: ids `(..., k)` int32, log_probs `(..., k)` and log_rest `(...)`, float32.
    """
    top, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)  # -inf where nothing is left
    return ids.int(), top.float(), rest.float()
