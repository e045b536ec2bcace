"""Data for the two scripts: classification tasks, dialogue summaries, and the embedded demo."""
