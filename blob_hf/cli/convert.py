"""Turn a checkpoint of the BLoB authors' code into a blob_hf adapter: `blob convert SRC DST`.

Their checkpoints (github.com/Wang-ML-Lab/bayesian-peft) are PEFT folders whose adapter_model.safetensors also holds a
`lora_A_rho` beside each `lora_A.weight`. The std is rho^2, or log(1 + exp(rho)) if they trained with bayes_eps < 0. The
prior is not in the files.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from blob_hf.cli.arguments import OneLineParser
from blob_hf.cli.terminal import user_errors
from blob_hf.reporting.model_card import write_model_card
from blob_hf.reporting.run_summary import RunSummary
from blob_hf.trainer.summary import BLOB_CARD, adapter_settings
from blob_hf.tuner import adapter_files
from blob_hf.tuner.config import STD_PARAMETERIZATIONS, BlobConfig
from blob_hf.tuner.layer import std_to_save
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

_RHO = re.compile(r"(?P<layer>.+)\.lora_A_rho(\.\w+)?")  # some PEFT versions leave the adapter's name behind it


def convert(
    source: str, destination: str, prior_std: float = BlobConfig.prior_std, std_parameterization: str | None = None
) -> BlobConfig:
    """Write the adapter in `source` as posterior mean and std into `destination`.

    Args:
        source: Folder or Hub repo of the authors' checkpoint.
        destination: A folder without an adapter in it.
        prior_std: sigma_p of their run (`--bayes-beta`).
        std_parameterization: `"square"` or `"softplus"`; None goes by the sign of most rhos, which starts positive for
            the one and negative for the other.

    Returns:
        The configuration of the converted adapter.

    Raises:
        BlobError: Not such a checkpoint, damaged, rho and mean do not match, or the destination is taken.
    """
    folder, target = adapter_files.resolve(source), Path(destination)
    if (target / CONFIG_NAME).exists():
        raise BlobError(f"{target} already holds an adapter; choose another folder")
    if not prior_std > 0:
        raise BlobError(f"prior_std must be > 0, got {prior_std:g}")
    own = adapter_files.read_config(folder)
    weights, _ = adapter_files.read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    mean, rhos = split(weights, source)
    if std_parameterization is None:
        negative = sum(int((rho < 0).sum()) for rho in rhos.values())
        std_parameterization = "softplus" if 2 * negative > sum(rho.numel() for rho in rhos.values()) else "square"
    config = BlobConfig.from_lora(own, BlobConfig(prior_std=prior_std, std_parameterization=std_parameterization))
    with files.staged(target) as staging:
        adapter_files.write(
            staging, mean, {name: std_to_save(rho.float(), std_parameterization) for name, rho in rhos.items()}
        )
        config.save_pretrained(str(staging))
        adapter_files.read(staging)  # checks that all is finite and fits together before anything takes its place
    card = RunSummary(
        config.base_model_name_or_path or "", None, "blob", card=BLOB_CARD, settings=adapter_settings(config)
    )
    write_model_card(target, card)
    return config


def split(weights: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tell the plain LoRA adapter from the rhos, which get the name of the mean they belong to.

    Raises:
        BlobError: There is no rho, or one without a mean of its shape.
    """
    found = {name: match for name in weights if (match := _RHO.fullmatch(name))}
    if not found:
        raise BlobError(
            f"{source} has no lora_A_rho: it is a plain LoRA adapter, which BlobModel.from_pretrained loads as it is"
        )
    mean = {name: value for name, value in weights.items() if name not in found}
    rhos = {f"{match['layer']}.lora_A.weight": weights[name] for name, match in found.items()}
    for name, rho in rhos.items():
        if name not in mean or mean[name].shape != rho.shape or not torch.isfinite(rho).all():
            raise BlobError(f"{source}: the lora_A_rho of {name} has no mean of its shape, or is not finite")
    return mean, rhos


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="blob convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="folder or Hub repo of the authors' checkpoint")
    parser.add_argument("destination", help="new folder for the adapter")
    parser.add_argument(
        "--prior_std", type=float, default=BlobConfig.prior_std, help="their --bayes-beta (default 0.2)"
    )
    parser.add_argument(
        "--std_parameterization", choices=STD_PARAMETERIZATIONS, help="default: found by the sign of most rhos"
    )
    with user_errors():
        args = parser.parse_args(argv)
        config = convert(args.source, args.destination, args.prior_std, args.std_parameterization)
        print(
            f"{args.destination}: BLoB adapter of {config.base_model_name_or_path}, r={config.r}, std = "
            f"{config.std_parameterization}, prior std {config.prior_std:g} (not in the files: --prior_std sets it)"
        )


if __name__ == "__main__":
    main()
