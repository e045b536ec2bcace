"""Sections of README in the site: a line `{{ README }}` or `{{ README: Heading }}` stands for the text there."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def section(heading: str | None) -> str:
    """README's text under a heading, or the one above the first heading."""
    parts = re.split(r"^## (.+)\n", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading is None:
        return parts[0]
    if heading not in named:
        raise KeyError(f"README.md has no section {heading!r}")
    return f"## {heading}\n{named[heading]}"


def on_page_markdown(markdown: str, **_: object) -> str:
    def included(match: re.Match[str]) -> str:
        text = section(match[1])
        text = re.sub(r"\]\(docs/", "](", text)
        return re.sub(r"(?<!!)\[([^\]]*)\]\((?![a-z_]+\.md\)|https?:)[^)]*\)", r"\1", text)  # files outside the site

    return re.sub(r"^\{\{ README(?:: (.+?))? \}\}$", included, markdown, flags=re.MULTILINE)
