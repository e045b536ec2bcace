"""Floor 5, the experiments of the report: `blob experiments {study,active,glue,sensitivity,mean,sampling}`."""
