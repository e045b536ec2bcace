"""The parts that names of metrics are made of: `eval_` + `mean_` + `nll`, `nll` + `_sample_std`, `mbr_` + `rougeL`."""

MEAN, STD = "mean_", "_sample_std"  # a metric of the posterior mean, and the std of a metric over samples
CHOICES = ("predictive", "mbr")  # ways to one text from the samples, each with metrics of its own
