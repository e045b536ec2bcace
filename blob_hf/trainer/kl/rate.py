"""The rate of the KL's own step: a number, or set from the *pull*, which is the same in a run of any length and size.

The pull compares two steps on a posterior mean that lies one prior std from 0, averaged over the KL's cycle: that of
the KL, kl_learning_rate * pi_t * dKL/dM = kl_learning_rate * pi_t / sigma_p, and that of Adam, whose size is the
learning rate however small the gradient:

    pull = kl_learning_rate * mean(pi_t) / (sigma_p * learning_rate)

So a mean that Adam pushes in one direction all the time comes to rest sigma_p / pull from 0. The published runs on
Llama-2 have a pull of 1.3, those on RoBERTa 0.3; their flags in a run of some hundred steps 0.1 or less, and BLoB is
plain LoRA there (docs/kl.md).
"""

import math

from blob_hf.trainer.kl.schedule import KLSchedule

PUBLISHED_RATE = 0.002
# Of the published runs on RoBERTa, by the formula of M: rate * batch / (100 sigma_p * learning rate).
_STRENGTH = PUBLISHED_RATE * 32 / (100 * 0.2 * 5e-4)


def default_pull(num_examples: int, gamma: float) -> float:
    """The pull of the published runs on RoBERTa, carried to n training examples as the cycle M does: 6.4 n^(-pi/gamma).

    More KL for fewer examples, and for a larger gamma: at gamma 8 it is 0.95 for 128 examples, 0.3 for RTE's 2,490.
    """
    return _STRENGTH * num_examples ** (-math.pi / gamma)


def rate_from_pull(pull: float, schedule: KLSchedule, learning_rate: float, prior_std: float) -> float:
    """kl_learning_rate of a pull; 0 for a schedule that never applies the KL.

    Args:
        learning_rate: The optimizer's, at its peak.
        prior_std: sigma_p.
    """
    return pull * prior_std * learning_rate / schedule.mean_weight if schedule.mean_weight else 0.0


def pull_of_rate(rate: float, schedule: KLSchedule, learning_rate: float, prior_std: float) -> float:
    """The inverse of `rate_from_pull`."""
    return rate * schedule.mean_weight / (prior_std * learning_rate) if learning_rate else 0.0
