"""Beside the floors, what a run shows: tables, plots, report and model card, out of plain data."""

from blob_hf.reporting.model_card import model_card, write_model_card
from blob_hf.reporting.report import write_report
from blob_hf.reporting.run_summary import DataSource, MethodCard, Results, RunSummary
from blob_hf.reporting.tables import markdown_table, results_table

__all__ = [
    "DataSource",
    "MethodCard",
    "Results",
    "RunSummary",
    "markdown_table",
    "model_card",
    "results_table",
    "write_model_card",
    "write_report",
]
