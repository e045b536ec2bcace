"""MAP: LoRA with the weight decay that the prior N(0, beta^2) stands for.

AdamW's decay is decoupled from its step sizes (Loshchilov & Hutter, ICLR 2019), so where training ends is near the
maximum of the posterior, not exactly there. As usual with this baseline, all trained weights decay.
"""

from dataclasses import dataclass

from blob_hf.baselines.base import MethodState, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.summary import LORA_CARD


@register_method("map")
@dataclass(frozen=True)
class MapState(MethodState):
    """The decay that was used."""

    weight_decay: float = 0.0

    card = MethodCard(
        title="MAP LoRA adapter",
        about="LoRA trained with a Gaussian prior on its weights, in the usual form of AdamW's weight decay. It is a "
        "point, and loads as any LoRA adapter.",
        limits=LORA_CARD.limits,
        citation=LORA_CARD.citation,
    )


def prior_weight_decay(num_examples: int, prior_std: float) -> float:
    """The decay that stands for the prior N(0, prior_std^2) beside a mean NLL over n examples.

    -log posterior / n = mean NLL + sum_i w_i^2 / (2 n prior_std^2) + const, whose gradient adds w / (n prior_std^2).
    """
    return 1 / (num_examples * prior_std**2)
