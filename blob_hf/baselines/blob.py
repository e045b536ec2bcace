"""BLoB itself (Wang et al., NeurIPS 2024), as one of the methods: its posterior is trained by the trainer."""

from blob_hf.baselines.base import Method


class Blob(Method):
    """A Gaussian posterior over A, trained by backpropagation (see `layer.py` and `kl.py`)."""

    name = "blob"
    title = "BLoB adapter"
    about = (
        "LoRA whose A matrices are Gaussian posteriors (BLoB). `adapter_model.safetensors` is the posterior mean, an "
        "ordinary LoRA adapter; `posterior_std.safetensors` holds the standard deviation of every entry of A. N=0 is "
        "the posterior mean; N=S averages the probabilities of S posterior samples."
    )
    limits = (
        "The uncertainty covers the LoRA A matrices only; the base model and B are points. Calibration was measured on "
        "the data named here and can be worse elsewhere."
    )
    citation = """@inproceedings{wang2024blob,
  title = {BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models},
  author = {Wang, Yibin and Shi, Haizhou and Han, Ligong and Metaxas, Dimitris and Wang, Hao},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}"""
    tags = ("blob", "bayesian", "uncertainty")
    flags = frozenset(
        {
            "beta", "gamma", "kl_schedule", "kl_cycle_steps", "kl_weight", "kl_target_nats_per_weight",
            "kl_learning_rate", "kl_gradient", "train_samples", "init_eps", "std_parameterization", "noise",
            "eval_samples", "eval_seed", "antithetic", "posterior_batch_size",
        }
    )  # fmt: skip
    variational = True
    sampled = True
