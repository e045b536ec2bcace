"""Run an experiment: `python -m blob_hf.experiments NAME ...`, see `EXPERIMENTS`."""

import sys

from accelerate import PartialState

from blob_hf import cli
from blob_hf.experiments import active, glue, mean, picture, sampling, sensitivity, study
from blob_hf.trainer.engines import shutdown
from blob_hf.utils.errors import BlobError

EXPERIMENTS = {
    "study": study.main,
    "active": active.main,
    "glue": glue.main,
    "multiple_choice": glue.multiple_choice,
    "sensitivity": sensitivity.main,
    "mean": mean.main,
    "sampling": sampling.main,
    "picture": picture.main,
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with cli.user_errors():
        if not argv or argv[0] not in EXPERIMENTS:
            found = argv[0] if argv else "nothing"
            raise BlobError(f"name an experiment, one of {', '.join(EXPERIMENTS)}; got {found}")
        EXPERIMENTS[argv[0]](argv[1:])
        if PartialState._shared_state:  # those that only start runs have no processes of their own
            shutdown()


if __name__ == "__main__":
    main()
