"""Where a run is reported to (`report_to`): what that needs to be installed, before anything has been computed."""

import importlib.util
from collections.abc import Iterable

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from blob_hf.utils.errors import BlobError

# Modules of which one is needed, and what to install.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow", "mlflow_skinny"), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


def check_reporters(names: Iterable[str]) -> None:
    """Refuse to report to what is unknown or not installed.

    Raises:
        BlobError: naming what to install.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise BlobError(f"report_to must be among none, all, {known}; got {name!r}")
        modules, package = _NEEDS.get(name, ((), ""))
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise BlobError(f"report_to {name} needs a package that is not installed: pip install {package}")
