"""report.md of a run: results, the KL, plots, settings."""

from pathlib import Path

from blob_hf.reporting.run_summary import RunSummary
from blob_hf.reporting.tables import markdown_table, results_markdown, settings_markdown
from blob_hf.utils import files

REPORT = "report.md"


def write_report(folder: Path, run: RunSummary, name: str = REPORT) -> None:
    """Write report.md, or a file of another name: what a run came to, results, KL diagnosis, plots and settings."""
    data = run.data.name if run.data else "unknown data"
    body = [
        f"# {run.method} on {data}",
        *([run.sentence] if run.sentence else []),
        f"Base model: `{run.base_model}`.",
        *(f"## {results.title}\n\n{results_markdown(results.table)}" for results in run.results),
        *run.sections,
        *(["## Further findings\n\n" + "\n".join(f"- {note}" for note in run.notes)] if run.notes else []),
        *(["## KL\n\n" + "\n".join(f"- {note}" for note in run.kl_notes)] if run.kl_notes else []),
        *([markdown_table(("figure", "value"), run.kl_figures.items())] if run.kl_figures else []),
        *(["## Examples", *run.examples] if run.examples else []),
        *(["## Plots"] if run.plots else []),
        *(f"![{Path(plot).stem}]({plot})" for plot in run.plots),
        "## Settings\n\n" + settings_markdown(run.settings),
    ]
    files.write_text(folder / name, "\n\n".join(body) + "\n")
