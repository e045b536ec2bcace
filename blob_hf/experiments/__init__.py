"""The experiments of the report: `python -m blob_hf.experiments {mean,sampling}`."""
