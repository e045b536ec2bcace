"""Decisions that were fitted to an adapter: what is promised of them, and whether that holds for an answer here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blob_hf.baselines.conformal import PredictionSets
from blob_hf.baselines.conformal_texts import TextAbstention
from blob_hf.baselines.fitted_rules import FittedRule
from blob_hf.metrics.similarity import DEFAULT_UTILITY
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.sampling import Sampling

Rule = PredictionSets | TextAbstention
# What a rule may have been fitted with, in words, the rest by its name; and what it is called where there is none.
_WORDS = {
    "num_samples": "N={}", "max_new_tokens": "a longest answer of {} tokens", "num_beams": "{} beams",
    "layers": "samples in the last {} layers", "tolerance": "a tolerance of {}", "prompt": "the prompt {!r}",
    "utility": "the utility {}", "length_penalty": "a length penalty of {}",
}  # fmt: skip
_NONE = {
    "layers": "samples in all layers", "tolerance": "no tolerance", "prompt": "no prompt",
    "temperature": "temperature 0", "utility": f"the utility {DEFAULT_UTILITY}", "length_penalty": "no length penalty",
}  # fmt: skip


@dataclass(frozen=True)
class Promise:
    """What is promised of a decision.

    Attributes:
        holds: Whether the answer was made as those were that the rule was fitted to.
        said: A sentence: what is promised and for what inputs and samples, or why nothing is.
    """

    holds: bool
    said: str


def fitted_rule(model: BlobModel) -> Rule | None:
    """What was fitted to the active adapter to decide by, if anything was."""
    kinds = (PredictionSets, TextAbstention)
    return next((one for kind in kinds if isinstance(one := model.companion(kind.slot), kind)), None)


def sampling_as_fitted(rule: FittedRule | None, num_samples: int, seed: int) -> Sampling:
    """So many samples of a seed, drawn in the way that a rule was fitted to."""
    then: Mapping[str, Any] = {} if rule is None else rule.fitted_to
    own: dict[str, Any] = {name: then.get(name) for name in ("layers", "tolerance")}
    return Sampling(num_samples, seed, then.get("draw") or "iid", **own)


def fitted_number(rule: FittedRule | None, name: str, highest: int, default: int) -> int:
    """A setting that a rule was fitted with, for a page to start with; where there is none, or none like it, a default.

    Args:
        name: In `FittedRule.fitted_to`.
        highest: That the page can set; it starts from 0.
    """
    found = None if rule is None else rule.fitted_to.get(name)
    return found if isinstance(found, int) and 0 <= found <= highest else default


def promise_of(rule: Rule, model: BlobModel, sampling: Sampling, how: Mapping[str, object] | None = None) -> Promise:
    """What is promised of the decisions on an answer.

    Args:
        sampling: That the answer was made with, as `sampling_of` gives it.
        how: Of a text, how it was written (`blob_hf.inference.predictor.how_written`).
    """
    changed = rule.differences(model, sampling, how or {})
    if changed:
        own, other = (", ".join(_worded(name, pair[i]) for name, pair in changed.items()) for i in (0, 1))
        return Promise(False, f"The rule was fitted with {own}. With {other} its guarantee does not hold.")
    drawn = f"{sampling.num_samples} samples of seed {sampling.seed}" if sampling.num_samples else "the posterior mean"
    drawn = f"at most {drawn}" if sampling.num_samples and sampling.tolerance is not None else drawn
    after = " and the fitted temperature" if rule.fitted_to.get("temperatures") else ""
    inputs = f"Promised for inputs like the {rule.rows} held-out rows, with {drawn}{after}"
    return Promise(True, f"{inputs}: {_promised(rule)}. On average over inputs, not for each one.")


def _promised(rule: Rule) -> str:
    if isinstance(rule, PredictionSets):
        return (
            f"the truth is in the set with a probability of at least {_share(1 - rule.alpha)}, and of the inputs that "
            f"are answered at most {_share(rule.alpha)} are answered wrongly (the latter is {_share(1 - rule.delta)} "
            "sure)"
        )
    return (
        f"with a probability of at most {_share(rule.alpha)} a text is given and is bad, which is a ROUGE-L below "
        f"{1 - rule.max_loss:g}"
    )


def _share(value: float) -> str:
    return f"{100 * value:g}\N{NO-BREAK SPACE}%"


def _worded(name: str, value: object) -> str:
    if value is None and name in _NONE:
        return _NONE[name]
    return _WORDS.get(name, f"{name.replace('_', ' ')} {{}}").format(value)
