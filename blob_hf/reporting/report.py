"""report.md of a run: results, the KL, plots, settings."""

from pathlib import Path

from blob_hf.reporting.run_summary import RunSummary
from blob_hf.reporting.tables import results_markdown, settings_markdown
from blob_hf.utils import files


def write_report(folder: Path, run: RunSummary) -> None:
    """Write report.md: results, KL diagnosis, plots and settings of one run."""
    data = run.data.name if run.data else "unknown data"
    body = [
        f"# {run.method} on {data}",
        f"Base model: `{run.base_model}`.",
        *(f"## {results.title}\n\n{results_markdown(results.table)}" for results in run.results),
        *run.sections,
        *(["## KL\n\n" + "\n".join(f"- {note}" for note in run.kl_notes)] if run.kl_notes else []),
        *(["\n".join(f"- {note}" for note in run.notes)] if run.notes else []),
        *(["## Examples", *run.examples] if run.examples else []),
        *(f"![{Path(plot).stem}]({plot})" for plot in run.plots),
        "## Settings\n\n" + settings_markdown(run.settings),
    ]
    files.write_text(folder / "report.md", "\n\n".join(body) + "\n")
