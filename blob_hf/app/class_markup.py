"""A classifier's answer as HTML."""

import math

from blob_hf.app.class_view import ClassRow, ClassView, Decision, FittedDecisions
from blob_hf.app.markup import card, escape, message, nats, percent, table

_IN_SET = ' <small class="blob-in-set">in the set</small>'
_PLURALS = {"class": "classes", "choice": "choices"}
_LISTED = 20  # classes of a prediction set, of many


def classes_html(view: ClassView) -> str:
    """Probabilities with their spread, the split of the entropy, and the posterior mean's answer beside."""
    return f'<div class="blob-cards">{_probabilities(view)}{_entropies(view)}{_posterior_mean(view)}</div>'


def _probabilities(view: ClassView) -> str:
    sampled = view.num_samples > 0
    header = [view.kind, "probability", *(["std"] if sampled else []), "N=0"]
    rows = [
        [
            escape(row.name), _bar(row) + percent(row.probability) + (_IN_SET if row.in_set else ""),
            *([f"± {percent(row.std)}"] if sampled else []), percent(row.mean),
        ]
        for row in view.rows
    ]  # fmt: skip
    others = f"{view.other_count} other {_PLURALS[view.kind]}"
    more = f" {others} have {percent(view.others)} together." if view.other_count else ""
    said = (
        f"The bar is the average over {view.num_samples} sampled networks, each tick one of them, std their spread."
        if sampled
        else "Of the posterior mean alone: no samples were drawn."
    )
    inside = table(f"Probability of each {view.kind}", header, rows, f"blob-classes blob-of-{view.kind}")
    return card(f"{view.kind.capitalize()} probabilities", inside, note=said + more)


def _bar(row: ClassRow) -> str:
    ticks = "".join(f'<i style="left:{100 * value:.2f}%"></i>' for value in row.samples)
    return f'<span class="blob-bar" aria-hidden="true"><b style="width:{100 * row.probability:.2f}%"></b>{ticks}</span>'


def _entropies(view: ClassView) -> str:
    parts = (
        ("entropy (total)", view.entropy, "of the averaged probabilities"),
        ("aleatoric", view.aleatoric, "what every network is unsure of"),
        ("epistemic", view.epistemic, "what the networks disagree about"),
    )
    rows = [[escape(name), nats(value), escape(meaning)] for name, value, meaning in parts]
    whole = max(view.aleatoric + view.epistemic, 1e-9)
    split = (
        '<div class="blob-split" aria-hidden="true">'
        f'<b class="blob-aleatoric" style="width:{100 * view.aleatoric / whole:.2f}%"></b>'
        f'<b class="blob-epistemic" style="width:{100 * view.epistemic / whole:.2f}%"></b></div>'
    )
    note = (
        "A temperature was fitted to the averaged probabilities: the total is after it, its parts are before."
        if view.is_calibrated
        else "The total is the sum of the other two."
    )
    return card("How unsure, in nats", split, table("Entropies", ["", "nats", "what it is"], rows), note=note)


def _posterior_mean(view: ClassView) -> str:
    same = "the same answer" if view.mean_label == view.label else "another answer"
    rows = [
        [escape(name), escape(label), percent(confidence), nats(entropy)]
        for name, label, confidence, entropy in (
            (_of_samples(view), view.label, view.confidence, view.entropy),
            ("posterior mean (N=0)", view.mean_label, view.mean_confidence, view.mean_entropy),
        )
    ]
    note = f"The posterior mean is a plain LoRA adapter: {same}. Entropies in nats."
    header = ["", "answer", "probability", "entropy"]
    return card("Beside LoRA's answer", table("Answers of samples and mean", header, rows), note=note)


def _of_samples(view: ClassView) -> str:
    return f"{view.num_samples} samples" if view.num_samples else "this answer"


def decision_html(decision: Decision, view: ClassView | None) -> str:
    """Answer or abstain, what the threshold does on the evaluation set, and what was fitted to decide by."""
    fitted = fitted_html(view.fitted) if view is not None and view.fitted is not None else ""
    return f"{_verdict(decision, view)}{message(threshold_sentence(decision))}{fitted}"


def fitted_html(fitted: FittedDecisions) -> str:
    """The prediction set, whether the fitted rule answers, and what is promised; where nothing is, that it is not."""
    title = "Decisions that were fitted to this adapter"
    body = [_set_html(fitted), _rule_html(fitted)] if fitted.made else []
    if not fitted.promise.holds:
        return card(title, message(fitted.promise.said, "busy"), *body)
    return card(title, *body, note=fitted.promise.said)


def _set_html(fitted: FittedDecisions) -> str:
    names = fitted.prediction_set
    if not names:
        return "<p><strong>None of them</strong> is as likely here as that of most of the held-out rows.</p>"
    listed = ", ".join(f'<b class="blob-in-set">{escape(name)}</b>' for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} others" if len(names) > _LISTED else ""
    share = f" with {100 * fitted.coverage:g}\N{NO-BREAK SPACE}%" if fitted.promise.holds else ""
    what = f"One of these{share}" if len(names) > 1 else f"This one{share}"
    return f"<p><strong>{what}:</strong> {listed}{more}</p>"


def _rule_html(fitted: FittedDecisions) -> str:
    said = "Ask a person" if fitted.abstains else "Answer"
    if fitted.answered_from is None:
        why = "no threshold could be promised by the held-out rows, so nothing is answered"
    else:
        why = f"the likeliest has {percent(fitted.confidence)}, answered from {percent(fitted.answered_from)} on"
    return f'<p role="status"><strong>{said}:</strong> {why}</p>'


def _verdict(decision: Decision, view: ClassView | None) -> str:
    if view is None or decision.answers is None:
        return ""
    limit = f"entropy {nats(view.entropy)} nats, threshold {nats(decision.threshold)}"
    if decision.answers:
        said = f"<strong>Answers: {escape(view.label)}</strong> ({percent(view.confidence)})"
        return f'<p class="blob-verdict blob-answers" role="status">{said}<br><small>{limit}</small></p>'
    said = f"<strong>Abstains</strong> (it would be {escape(view.label)}, {percent(view.confidence)})"
    return f'<p class="blob-verdict blob-abstains" role="status">{said}<br><small>{limit}</small></p>'


def threshold_sentence(decision: Decision) -> str:
    """What the threshold does to the rows whose truth is known."""
    if not decision.rows:
        return (
            "No predictions with labels are saved beside this adapter, so it is not known what a threshold does to "
            "accuracy and coverage: a run that evaluates leaves them."
        )
    of = f"{decision.rows} {decision.split} rows"
    drawn = "" if decision.num_samples is None else f" (measured with N={decision.num_samples})"
    if math.isnan(decision.accuracy):
        of_all = percent(decision.accuracy_of_all)
        return f"At this threshold none of the {of} is answered; of all {of_all} are right{drawn}."
    return (
        f"At this threshold {percent(decision.coverage)} of the {of} are answered, and {percent(decision.accuracy)} of "
        f"these are right; of all {percent(decision.accuracy_of_all)}{drawn}."
    )
