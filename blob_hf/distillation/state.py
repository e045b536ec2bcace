"""What a distilled adapter remembers of its teacher, in method.json, by which it is loaded as one network."""

from collections.abc import Mapping
from dataclasses import dataclass

from blob_hf.baselines.base import MethodState, find_method, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.utils.errors import BlobError

_WITH_SAMPLES = "blob"
_PLAIN = "lora"


@register_method("distilled")
@dataclass(frozen=True)
class DistilledState(MethodState):
    """The teacher, and how it was asked.

    Attributes:
        teacher: Folder or Hub repo.
        teacher_method: As in `--method`.
        teacher_samples: N of the predictive that was learned.
        seed: Of these samples.
        rows: Inputs that the teacher has answered.
        answers: Along which texts, of models that write: of the data, or the teacher's own; "" of classes.
    """

    teacher: str = ""
    teacher_method: str = ""
    teacher_samples: int = 0
    seed: int = 0
    rows: int = 0
    answers: str = ""

    required = {"teacher": str, "teacher_samples": int}
    card = MethodCard(
        title="distilled LoRA adapter",
        about=(
            "One plain LoRA adapter that was trained to answer as the posterior predictive of a Bayesian adapter does: "
            "the average of many sampled networks, at the price of one forward. The loss is the KL divergence from the "
            "predictive's probabilities (of texts: of the next token). Plain PEFT and any LoRA server load it."
        ),
        limits=(
            "It has the predictive's confidence, not its samples: how far the networks disagree (the epistemic part) "
            "is not in it. It was taught on the inputs named here and can be worse elsewhere."
        ),
        citation="""@inproceedings{korattikara2015dark,
  title = {Bayesian Dark Knowledge},
  author = {Korattikara, Anoop and Rathod, Vivek and Murphy, Kevin and Welling, Max},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2015}
}""",
        tags=("distillation", "uncertainty"),
    )

    def settings(self) -> Mapping[str, object]:  # type: ignore[override]
        found = dict(super().settings())
        if not self.answers:
            found.pop("answers", None)
        return found


def require_samples(method: str, where: object) -> None:
    """Refuse a teacher that is one network.

    Args:
        method: That its adapter is of.
        where: The adapter, for the message.

    Raises:
        BlobError: It is.
    """
    if method == _WITH_SAMPLES or (method != _PLAIN and find_method(method).card.sampled):
        return
    raise BlobError(
        f"{where} is of method {method}: one network, without samples to distil; it costs one forward as it is"
    )
