"""The methods of the study, as flags of run_glue_blob.py, and the strengths that each may choose from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A method with everything that is fixed about it.

    Attributes:
        flags: Of run_glue_blob.py.
        strength: The flag whose value is chosen, by the held-out rows of the first seeds; None: nothing to choose.
        values: What it is chosen from, the default first.
        needs_lora: Whether it is fitted to the adapter that `lora` trained.
    """

    flags: tuple[str, ...]
    strength: str | None = None
    values: tuple[float, ...] = ()
    needs_lora: bool = False


METHODS = {
    "lora": Entry(("--method", "lora")),
    "lora_early_stopping": Entry(("--method", "lora", "--early_stopping_patience", "5")),
    "map": Entry(("--method", "map"), "beta", (0.2, 0.05, 0.02)),
    "mc_dropout": Entry(("--method", "mc_dropout"), "lora_dropout", (0.1, 0.3, 0.5)),
    "ensemble": Entry(("--method", "ensemble", "--ensemble_size", "3")),
    "laplace": Entry(
        ("--method", "laplace", "--laplace_predictive", "linearized", "--laplace_prior", "validation"), needs_lora=True
    ),
    "tfb": Entry(
        ("--method", "tfb", "--num_anchors", "64", "--tfb_samples", "5"),
        "tfb_tolerance",
        (0.01, 0.1, 1.0),
        needs_lora=True,
    ),
    "scalabl": Entry(("--method", "scalabl"), "kl_learning_rate", (0.2, 1.0, 5.0)),  # nats of log sigma a cycle
    "ivon": Entry(("--method", "ivon"), "ivon_ess", (1e6, 1e5, 1e7)),  # its std goes with 1 / sqrt(ess)
    "blob": Entry(("--method", "blob", "--posterior_scale", "fit")),  # at its default pull: nothing is chosen for it
}
