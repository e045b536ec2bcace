"""Floor 5, the experiments of the report: `blob experiments {glue,sensitivity,mean,sampling}`."""
