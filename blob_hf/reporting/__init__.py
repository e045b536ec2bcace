"""What a run shows: tables, plots, report and model card."""
