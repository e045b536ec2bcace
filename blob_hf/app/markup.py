"""HTML of the page: small parts that all views share. Whatever comes from outside goes through `escape`."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

__all__ = ["card", "cells", "escape", "figure", "message", "nats", "percent", "table"]


def percent(value: float) -> str:
    """A share, to a tenth of a percent."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def nats(value: float) -> str:
    """Nats, to the third decimal."""
    return f"{value:.3f}"


def message(text: str, kind: str = "info") -> str:
    """A sentence for the visitor; `kind` is info, busy or error. Screen readers speak it out."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="blob-message blob-{kind}" role="{role}" aria-live="polite">{escape(text)}</p>' if text else ""


def card(title: str, *body: str, note: str = "") -> str:
    """A part of the page with a heading."""
    below = f'<p class="blob-note">{escape(note)}</p>' if note else ""
    return f'<section class="blob-card"><h3>{escape(title)}</h3>{"".join(body)}{below}</section>'


def cells(values: Iterable[str], head: bool = False) -> str:
    """A row's cells; the values are HTML."""
    tag = "th" if head else "td"
    scope = ' scope="col"' if head else ""
    return "".join(f"<{tag}{scope}>{value}</{tag}>" for value in values)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; the cells of `rows` are HTML, and the first of each row is its heading."""
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{cells(row[1:])}</tr>' for row in rows)
    head = cells(map(escape, header), head=True)
    return (
        f'<div class="blob-scroll" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}">'
        f'<table class="blob-table {kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(path: Path, title: str) -> str:
    """A PNG file as part of the page, so that nothing has to be fetched for it."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure class="blob-figure"><img alt="{escape(title, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )
