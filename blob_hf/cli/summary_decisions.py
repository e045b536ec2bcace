"""--conformal_alpha of a summarizer: the threshold from which on it abstains, and what that comes to."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from blob_hf.baselines.conformal_texts import SCORE, TextAbstention, fit_text_threshold, is_bad
from blob_hf.baselines.fitted_rules import fitted_to
from blob_hf.cli.answering import Answering, Answers
from blob_hf.cli.decisions import require_saved
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.data.summarization import Dialogue
from blob_hf.inference.decisions import Bools
from blob_hf.metrics.coverage import coverage_interval
from blob_hf.metrics.summarization import rouge_per_example
from blob_hf.utils.names import MEAN

METRICS = ["bad_given", "answered", "bad_of_answered", "bad", "rougeL_answered", "rougeL"]


def settle_abstention(
    answering: Answering, rows: Sequence[Dialogue] | None, method_args: MethodArguments, folder: Path | None
) -> TextAbstention:
    """The rule by which a trainer's model abstains: fitted to held-out rows, or that which it was saved with.

    Args:
        folder: Where to save it; None: nowhere.

    Raises:
        BlobError: There is neither.
    """
    trainer, alpha, loss = answering.trainer, method_args.conformal_alpha, method_args.conformal_max_loss
    model = trainer.blob_model
    if rows is not None and alpha is not None:
        found = answering([row.text for row in rows])
        references = [row.references for row in rows]
        thresholds = {
            kind: fit_text_threshold(own.scores[SCORE], is_bad(own.texts, references, loss), alpha)
            for kind, own in found.items()
        }
        sampling = answering.samplings.get("", answering.samplings[MEAN])
        facts = {**fitted_to(model, sampling), **answering.decoding}
        rule = TextAbstention(alpha, loss, SCORE, len(rows), thresholds[MEAN], thresholds.get(""), facts)
        model.set_companion(rule)
        if folder is not None:
            rule.save(model, folder)
    saved = model.companion(TextAbstention.slot)
    require_saved(saved, TextAbstention, method_args, ("alpha", "max_loss"))
    assert isinstance(saved, TextAbstention)
    return saved


def withheld(rule: TextAbstention, answering: Answering, found: Mapping[str, Answers]) -> dict[str, Bools]:
    """Which of the answers are withheld, by kind."""
    model, samplings = answering.trainer.blob_model, answering.samplings
    decided = {
        kind: rule.abstains(model, own.scores, samplings[kind], answering.decoding) for kind, own in found.items()
    }
    return {kind: one for kind, one in decided.items() if one is not None}


def abstention_metrics(
    rule: TextAbstention, abstain: Bools, answers: Answers, references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Shares of inputs, and mean ROUGE-L.

    Returns:
        answered; with references also bad_given, the share of all inputs that get a bad text, which is what is
        controlled; bad_of_answered, their share of the answered inputs (NaN where none is); bad, the share of bad
        texts if all were given; rougeL of all texts and rougeL_answered.
    """
    given = ~abstain
    found = {"answered": float(given.mean())}
    if not any(references):
        return found
    rouge = rouge_per_example(answers.texts, references)["rougeL"]
    bad = is_bad(answers.texts, references, rule.max_loss)
    return found | {
        "bad_given": float((bad & given).mean()),
        "bad_of_answered": float(bad[given].mean()) if given.any() else float("nan"),
        "bad": float(bad.mean()),
        "rougeL_answered": float(rouge[given].mean()) if given.any() else float("nan"),
        "rougeL": float(rouge.mean()),
    }


def withheld_sentence(rule: TextAbstention, metrics: Mapping[str, float], count: int) -> str:
    """What abstaining came to on rows with references, in plain words."""
    low, _ = coverage_interval(count, rule.rows, rule.alpha)
    return (
        f"{metrics['bad_given']:.1%} of {count} inputs get a summary of a ROUGE-L below {1 - rule.max_loss:g}, and "
        f"{metrics['answered']:.1%} get one at all (without abstaining {metrics['bad']:.1%} would be that bad); at "
        f"most {rule.alpha:.0%} was aimed at, and with {rule.rows} held-out rows up to {1 - low:.1%} is within chance "
        "for rows like these."
    )
