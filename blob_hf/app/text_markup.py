"""A written text as HTML: its tokens coloured by their epistemic uncertainty, the samples, and how they agree."""

from collections.abc import Sequence

from blob_hf.app.engine import Progress
from blob_hf.app.markup import card, escape, message, nats, percent, table
from blob_hf.app.text_view import LEVEL_NAMES, LEVELS, FittedAbstention, TextView, TokenView

_NAMES = {
    "token_nll": ("negative log-probability a token", "nats"),
    "token_entropy": ("entropy a token (total)", "nats"),
    "token_aleatoric": ("aleatoric a token", "nats"),
    "mutual_information": ("epistemic a token", "nats"),
    "dissimilarity": ("dissimilarity of the samples, 1 - ROUGE-L", ""),
    "cluster_entropy": ("entropy over groups of like samples", "nats"),
    "disagreement": ("share of the samples that mean something else", ""),
    "semantic_entropy": ("semantic entropy", "nats"),
    "discrete_semantic_entropy": ("semantic entropy, counted", "nats"),
    "semantic_sets": ("sets of one meaning", ""),
    "eigv": ("sets of one meaning, continuous", ""),
    "degree": ("degree of the graph of likenesses", ""),
}


def text_html(view: TextView, title: str, sampled: bool) -> str:
    """All that is known of a text.

    Args:
        title: How it was chosen.
        sampled: Whether networks were drawn: else there is no epistemic part.
    """
    unknown = "" if sampled else "Of the posterior mean alone: without samples nothing is epistemic."
    written = "".join(token_html(one) for one in view.tokens) if view.text else ""
    body = f'<p class="blob-text">{written.strip() or "<em>The model has written nothing.</em>"}</p>'
    parts = [fitted_html(view.fitted)] if view.fitted is not None else []
    parts += [card(title, body, legend_html() if sampled else "", token_table(view.tokens), note=unknown)]
    if view.samples:
        parts += [_samples(view), _chosen(view), _differences(view)]
    return f'<div class="blob-cards blob-wide">{"".join(parts)}{_scores(view)}</div>'


def fitted_html(fitted: FittedAbstention) -> str:
    """Whether the fitted rule gives the text, and what is promised; where nothing is, that it is not."""
    title = "Decisions that were fitted to this adapter"
    body = [_rule_html(fitted)] if fitted.made else []
    if not fitted.promise.holds:
        return card(title, message(fitted.promise.said, "busy"), *body)
    return card(title, *body, note=fitted.promise.said)


def _rule_html(fitted: FittedAbstention) -> str:
    name, unit = _NAMES.get(fitted.score, (fitted.score, ""))
    limit = "every text is given" if fitted.below is None else f"texts are given below {nats(fitted.below)}"
    said = "Abstain: better ask a person than give this text" if fitted.abstains else "Give the text"
    value = escape(f"{name} {nats(fitted.value)} {unit}".strip())
    return f'<p role="status"><strong>{said}:</strong> {value}, {limit}</p>'


def token_html(token: TokenView) -> str:
    """A token in the text; those that the networks disagree about can be reached by the keyboard."""
    if not token.text:
        return ""
    said = token_title(token)
    focus = ' tabindex="0"' if token.level else ""
    own = token.text.lstrip()
    before = token.text[: len(token.text) - len(own)]  # a blank is neither coloured nor underlined
    return (
        f'{escape(before)}<span class="blob-token blob-level-{token.level}"{focus} '
        f'data-epistemic="{token.epistemic:.6f}" title="{escape(said, quote=True)}">{escape(own)}</span>'
    )


def token_title(token: TokenView) -> str:
    """What is shown over a token: its probability, the three entropies, the runners-up."""
    others = ", ".join(f"{name} {percent(value)}" for name, value in token.runners_up)
    lines = [
        f"{token.name}: {percent(token.probability)}; {LEVEL_NAMES[token.level]}",
        f"entropy {nats(token.total)} = aleatoric {nats(token.aleatoric)} + epistemic {nats(token.epistemic)} nats",
        *([f"instead: {others}"] if others else []),
    ]
    return "\n".join(lines)


def legend_html() -> str:
    """What colours and underlines mean."""
    edges = (0.0, *LEVELS)
    items = [
        f'<li><span class="blob-token blob-level-{level}">{escape(name)}</span> '
        + (f"below {LEVELS[0]:g}" if level == 0 else f"from {edges[level]:g}")
        + "</li>"
        for level, name in enumerate(LEVEL_NAMES)
    ]
    intro = "Colour and underline say how much the networks disagree about a token: epistemic uncertainty, nats"
    return f'<div class="blob-legend"><p>{intro}</p><ul>{"".join(items)}</ul></div>'


def token_table(tokens: Sequence[TokenView]) -> str:
    """The same as over the tokens, to read without a mouse."""
    header = ["token", "level", "probability", "entropy", "aleatoric", "epistemic", "runners-up"]
    rows = [
        [
            escape(one.name), str(one.level), percent(one.probability), nats(one.total), nats(one.aleatoric),
            nats(one.epistemic), escape(", ".join(f"{name} {percent(value)}" for name, value in one.runners_up)),
        ]
        for one in tokens
    ]  # fmt: skip
    inside = table("Tokens with their uncertainty in nats", header, rows)
    return f"<details><summary>All tokens as a table</summary>{inside}</details>"


def _samples(view: TextView) -> str:
    with_sets = view.samples[0].meaning is not None
    header = ["network", "text", "agreement", "log-probability", *(["meaning"] if with_sets else [])]
    rows = [
        [
            f"{number}{' (MBR)' if one.is_mbr else ''}", escape(one.text), nats(one.agreement), f"{one.log_prob:.2f}",
            *([str(one.meaning)] if with_sets else []),
        ]
        for number, one in enumerate(view.samples, start=1)
    ]  # fmt: skip
    note = "Agreement: mean ROUGE-L with the other samples (0 to 1). Log-probability: of the text, under its own "
    note += "network, nats."
    note += " Samples with the same number of meaning say the same." if with_sets else ""
    return card(
        f"What each of {len(rows)} networks writes",
        table("Texts of the samples", header, rows, "blob-samples"),
        note=note,
    )


def _chosen(view: TextView) -> str:
    note = "Minimum Bayes risk chooses the sample that is most like the others."
    return card("The MBR choice", f'<p class="blob-text">{escape(view.mbr)}</p>', note=note)


def _differences(view: TextView) -> str:
    words = " ".join(
        f"<span>{escape(word)}</span>"
        if share == 1
        else f'<mark title="in {percent(share)} of the samples">{escape(word)}</mark>'
        for word, share in view.words
    )
    note = "The text itself; marked are its words that not all samples have at their place."
    return card("Where the samples differ from the text", f'<p class="blob-text">{words}</p>', note=note)


def _scores(view: TextView) -> str:
    rows = [
        [escape(_NAMES.get(name, (name, ""))[0]), nats(value), escape(_NAMES.get(name, (name, ""))[1])]
        for name, value in view.scores.items()
    ]
    note = "Higher is less certain. Of a token: means over the tokens of the text."
    return card(
        "How unsure of the whole text", table("Scores of the text", ["score", "value", "unit"], rows), note=note
    )


def progress_html(progress: Progress, num_samples: int) -> str:
    """How far an answer is, and what is written so far."""
    if progress.stage < 0:
        return message("Waiting for another visitor's answer to end.", "busy")
    sampling = progress.stage == 0 and num_samples > 0
    what = f"{len(progress.texts)} networks write" if sampling else "The averaged networks write"
    what = "The posterior mean writes" if num_samples == 0 else what
    lines = "".join(f"<li>{escape(text)}</li>" for text in progress.texts)
    said = message(f"{what}: {progress.tokens} tokens", "busy")
    return f'{said}<ul class="blob-growing" aria-hidden="true">{lines}</ul>'
