"""What the KL did to a posterior: figures after training, and a verdict with its reason in one line.

The thresholds are conventions, stated here and in docs/kl.md; each verdict shows the figures behind it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from blob_hf.trainer.kl.diagnosis import LEAST_EXPOSURE
from blob_hf.trainer.kl.step import descend_rho
from blob_hf.tuner.layer import rho_from_std, std_from_rho
from blob_hf.tuner.posterior import gaussian_layers, posterior_statistics
from blob_hf.utils.sharding import full_tensor, gathered

MOVED = 0.05  # a std has moved when it changed by more than 5 %
COLLAPSED = 0.05  # nats per weight: what a mean of 0 and a std at 78 % of the prior still have
FORGOTTEN = 0.01  # nats by which the predictive is better than without the task: below, it has not learned it
SMALL_STD = 0.01  # std / |mean|: below, a sample differs from the mean by less than 1 %
DIVERGED = 1.0  # nats by which the training NLL has risen: a run that only forgets its task comes back to its start
OUT_OF_THE_WAY = 1.0  # nats of training NLL: the pull of `adaptive` is there a twentieth of kl_pull
AGREE = 0.001  # the samples' own NLL is less than 0.1 % above that of their average

ADVICE = {
    "diverged": "take a lower learning_rate, or a longer warm-up; its predictions are worth nothing",
    "not applied": "take kl_learning_rate auto, a larger gamma or a smaller kl_cycle_steps",
    "prior collapse": "take a smaller kl_pull (or kl_learning_rate), or more steps",
    "deterministic": "take kl_learning_rate auto with a larger kl_pull, or fit posterior_scale",
    "healthy": "",
}
# of `adaptive`, in whose rate M cancels, and whose first step has no KL
UNHEARD = "take more steps, or kl_learning_rate auto with a larger kl_pull"


@dataclass(frozen=True)
class KLFigures:
    """The KL of a run from start to end.

    Attributes:
        schedule, cycle_steps, steps: The KL schedule, its cycle M and the optimizer steps.
        total_weight: Sum of pi_t.
        exposure: Sum of pi_t * lr_t / lr_0, which the decoupled KL step follows.
        std_by_kl_alone: Factor by which the KL steps alone, without any NLL, would have changed a typical std; None
            where that says nothing: the KL goes through the optimizer, or the stds began at the prior's.
        mean_kl_loss, mean_elbo: Means over the steps of pi_t * KL and of NLL + KL, as the published tables have them.
        num_weights: Entries of A.
        kl_start, kl_end: KL(q || p), nats.
        prior_std, std_start, std_end: sigma_p, and the means of Omega over all weights.
        share_moved: Share of the weights whose std changed by more than 5 %.
        std_to_mean: Median over the weights of Omega / |M|.
        nll_start, nll_end: Means of the training NLL over the first and the last tenth of the steps, nats per example
            or token.
        sample_gap: Mean NLL of single samples over that of their predictive, less 1; None without an evaluation.
        information_gain: How much smaller the predictive's NLL is than that of the label rates (of a language model:
            than the base model's without the adapter), nats per example or token; None if it was not looked at.
    """

    schedule: str
    cycle_steps: int
    steps: int
    total_weight: float
    exposure: float
    std_by_kl_alone: float | None
    mean_kl_loss: float
    mean_elbo: float
    num_weights: int
    kl_start: float
    kl_end: float
    prior_std: float
    std_start: float
    std_end: float
    share_moved: float
    std_to_mean: float
    nll_start: float | None = None
    nll_end: float | None = None
    sample_gap: float | None = None
    information_gain: float | None = None

    @property
    def kl_per_weight(self) -> float:
        """KL at the end, nats per weight."""
        return self.kl_end / self.num_weights

    def shown(self) -> dict[str, str]:
        """The figures in words, by what they are."""
        found = {
            "sum of the KL weights pi_t": f"{self.total_weight:.3g} over {self.steps / self.cycle_steps:.2f} cycles",
            "KL per weight": f"{self.kl_start / self.num_weights:.3f} -> {self.kl_per_weight:.3f} nats",
            "mean std / prior's": f"{self.std_start / self.prior_std:.3f} -> {self.std_end / self.prior_std:.3f}",
            "stds that moved by more than 5 %": f"{100 * self.share_moved:.0f} %",
            "median std / size of the mean": f"{self.std_to_mean:.3g}",
        }
        if self.nll_start is not None and self.nll_end is not None:
            found["training NLL, first and last tenth"] = f"{self.nll_start:.3g} -> {self.nll_end:.3g} nats"
        if self.std_by_kl_alone is not None:
            found["a typical std by the KL alone"] = f"x {self.std_by_kl_alone:.3g}"
        if self.sample_gap is not None:
            found["single samples' NLL above their average's"] = f"{100 * self.sample_gap:.2f} %"
        return found

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.shown().items())


@dataclass(frozen=True)
class Verdict:
    """`name` is one of `ADVICE`; `reason` has the figures and their thresholds."""

    name: str
    reason: str
    figures: KLFigures = field(repr=False)

    def __str__(self) -> str:
        unheard = self.name == "not applied" and self.figures.schedule == "adaptive"
        advice = UNHEARD if unheard else ADVICE[self.name]
        return f"KL verdict: {self.name}. {self.reason[:1].upper()}{self.reason[1:]}{f'; {advice}' if advice else ''}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"verdict": self.name, "reason": self.reason, **asdict(self.figures)}


def judge(
    figures: KLFigures, sample_gap: float | None = None, information_gain: Callable[[], float | None] = lambda: None
) -> Verdict:
    """Which of the five a posterior is; the first that fits, in the order of `ADVICE`.

    Args:
        sample_gap: See `KLFigures`; without it "deterministic" goes by std / |mean|.
        information_gain: Measures what the predictive knows of the task, nats (see `KLFigures`); called where the
            weights are at the prior. Without it their KL alone decides.
    """
    figures = replace(figures, sample_gap=sample_gap)
    if reason := _divergence(figures):
        return Verdict("diverged", reason, figures)
    alone = figures.std_by_kl_alone
    if alone is None and figures.exposure < LEAST_EXPOSURE:
        return Verdict("not applied", f"sum of pi_t < {LEAST_EXPOSURE:g}{_not_learned(figures)}", figures)
    if alone is not None and abs(math.log(alone)) < MOVED:
        little = f"the KL alone would have changed the stds by less than {MOVED:.0%}"
        return Verdict("not applied", f"{little}{_not_learned(figures)}", figures)
    near = ""
    if figures.kl_per_weight < COLLAPSED:
        figures = replace(figures, information_gain=information_gain())
        gain = figures.information_gain
        if gain is None or gain < FORGOTTEN:
            known = "" if gain is None else f", and it predicts {_compared(gain)} than without the task"
            reason = f"the posterior is the prior: KL < {COLLAPSED:g} nats per weight{known}"
            return Verdict("prior collapse", reason, figures)
        near = f"; most weights are at the prior, but the predictive is {gain:.3f} nats better than without the task"
    if sample_gap is None and figures.std_to_mean < SMALL_STD:
        return Verdict("deterministic", f"median std / |mean| < {SMALL_STD:g}{_not_learned(figures)}", figures)
    if sample_gap is not None and sample_gap < AGREE:
        agree = f"the samples' NLLs agree within {AGREE:.1%} of their predictive's"
        return Verdict("deterministic", f"{agree}{_not_learned(figures)}", figures)
    differ = "not a point" if sample_gap is None else "the samples differ in what they predict"
    return Verdict("healthy", f"the KL was applied, and {differ}{near}", figures)


def _compared(gain: float) -> str:
    return f"{abs(gain):.3f} nats {'worse' if gain < 0 else 'better'}"


def _not_learned(figures: KLFigures) -> str:
    """What a schedule that follows the training NLL waits for."""
    if figures.schedule != "adaptive" or figures.nll_end is None or figures.nll_end < OUT_OF_THE_WAY:
        return ""
    return (
        f", and the training NLL is still {figures.nll_end:.2f} nats, where the adaptive KL keeps out of the way: "
        "train longer before anything else"
    )


def _divergence(figures: KLFigures) -> str:
    """Why a training has diverged, "" if it has not."""
    values = (figures.nll_end, figures.kl_end, figures.std_end, figures.sample_gap)
    if any(value is not None and not math.isfinite(value) for value in values):
        return "the posterior or its predictions are no longer finite numbers"
    start, end = figures.nll_start, figures.nll_end
    if start is None or end is None or end <= start + DIVERGED:
        return ""
    return f"the training NLL rose from {start:.3g} to {end:.3g} nats, by more than {DIVERGED:g}"


def initial_stds(model: nn.Module) -> dict[str, Tensor]:
    """The stds by layer name, on the CPU in bfloat16: enough to see a change of 5 %."""
    stds = {}
    for name, layer in gaussian_layers(model).items():
        with torch.no_grad(), gathered([layer.rho]):
            stds[name] = full_tensor(layer.std).to("cpu", torch.bfloat16)
    return stds


@torch.no_grad()
def measure(
    model: nn.Module,
    prior_std: float,
    parameterization: str,
    schedule: Any,
    history: Sequence[Mapping[str, float]],
    start: Mapping[str, Tensor],
    kl_learning_rate: float | None,
) -> KLFigures:
    """The figures of a finished run.

    Args:
        schedule: With `name` and `cycle_steps`.
        history: Rows of `KLHistory`, one per optimizer step, at least one.
        start: `initial_stds` before training.
        kl_learning_rate: Rate of the decoupled KL step; None where the KL goes through the loss.
    """
    moved, ratios = 0.0, []
    for name, layer in gaussian_layers(model).items():
        with gathered([layer.weight, layer.rho]):
            std, mean = full_tensor(layer.std).float().cpu(), full_tensor(layer.weight).float().cpu()
            moved += float(((std / start[name].float()).log().abs() > MOVED).sum())
            ratios.append((std / mean.abs()).flatten())
    statistics = posterior_statistics(model, prior_std).total
    std_start = sum(float(std.double().sum()) for std in start.values()) / statistics.num_weights
    nlls, tenth = [row["nll"] for row in history], math.ceil(len(history) / 10)
    exposures = [row["kl_weight"] * row["lr_scale"] for row in history]
    alone = None
    if kl_learning_rate is not None and abs(math.log(prior_std / std_start)) > 2 * MOVED:
        rates = [kl_learning_rate * exposure for exposure in exposures]
        alone = std_by_kl_alone(std_start, prior_std, parameterization, rates) / std_start
    return KLFigures(
        schedule=schedule.name,
        cycle_steps=schedule.cycle_steps,
        steps=len(history),
        total_weight=math.fsum(row["kl_weight"] for row in history),
        exposure=math.fsum(exposures),
        std_by_kl_alone=alone,
        mean_kl_loss=math.fsum(row["kl_loss"] for row in history) / len(history),
        mean_elbo=math.fsum(row["elbo"] for row in history) / len(history),
        num_weights=statistics.num_weights,
        kl_start=history[0]["kl"],
        kl_end=statistics.kl,
        prior_std=prior_std,
        std_start=std_start,
        std_end=statistics.mean_std,
        share_moved=moved / statistics.num_weights,
        std_to_mean=float(torch.cat(ratios).median()),
        nll_start=math.fsum(nlls[:tenth]) / tenth,
        nll_end=math.fsum(nlls[-tenth:]) / tenth,
    )


def std_by_kl_alone(std: float, prior_std: float, parameterization: str, rates: Sequence[float]) -> float:
    """Where SGD on the KL alone takes a std: what the KL could have done, whatever the NLL did.

    Args:
        rates: kl_learning_rate * pi_t * lr_t / lr_0 of each step.
    """
    rho = rho_from_std(torch.tensor(std, dtype=torch.float64), parameterization)
    for rate in rates:
        if rate > 0:
            rho = descend_rho(rho, rate, prior_std, parameterization)
    return float(std_from_rho(rho, parameterization))
