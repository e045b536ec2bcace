"""Deep ensembles of adapters (Lakshminarayanan et al., NeurIPS 2017): sample s is the member s, all of its weights.

The members are adapters of one PEFT model. Samples of the first one's layers are the weights of all of them, so that
one batch, or one `generate`, serves all members. A classification head is part of a member, whether PEFT trained it
(`modules_to_save`) or it is frozen at random under LoRA: adapters of different seeds have different ones.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from blob_hf.baselines.base import Method
from blob_hf.trainer.checkpoints import newest_complete
from blob_hf.tuner import adapter_files
from blob_hf.tuner.adapter_files import METHOD_FILE
from blob_hf.tuner.base_model import head_parameters
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered

FOLDER = "_members"  # of a run: the trainings of its members, with their checkpoints; pushes leave out names with _
FINISHED = "finished.json"  # in a member's training: its settings and what came out


_MEMBER = re.compile(r"member-\d+")


class MemberLinear(SampledLinear):
    """A linear layer of the first member, whose samples are those of all members in order; seeds play no part.

    Args:
        others: Weight and bias (or None) of the same layer in the other members.
        weight_name: In the files of an adapter, where it is not LoRA's A or B.
    """

    def __init__(
        self,
        linear: nn.Linear,
        others: Sequence[tuple[Tensor, Tensor | None]],
        layer: str,
        part: str = "lora_A",
        weight_name: str | None = None,
    ) -> None:
        super().__init__(linear, layer, part)
        self.bias = linear.bias
        self.weight_name = weight_name or self.weight_name
        for index, (weight, bias) in enumerate(others):  # buffers follow the model from device to device
            self.register_buffer(f"_weight_{index}", weight.detach(), persistent=False)
            self.register_buffer(f"_bias_{index}", None if bias is None else bias.detach(), persistent=False)
        self.num_members = 1 + len(others)
        self._biases = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.bias is None:
            return out
        if self._samples is None:
            return out + self.bias.to(out.dtype)
        blocks = out.view(len(self._biases), -1, out.shape[-1]) + self._biases.to(out.dtype).unsqueeze(1)
        return blocks.view_as(out)

    def _stacked(self, name: str, first: int, count: int) -> Tensor:
        own = getattr(self, name)
        with gathered([own]):
            every = [full_tensor(own), *(getattr(self, f"_{name}_{i}") for i in range(self.num_members - 1))]
            return torch.stack([tensor.detach() for tensor in every[first : first + count]])

    @torch.no_grad()
    def draw(self, num_samples: int, seed: int, first: int = 0, antithetic: bool = False) -> Tensor:
        if first + num_samples > self.num_members:
            raise BlobError(
                f"the ensemble has {self.num_members} members, but {first + num_samples} samples were asked for"
            )
        return self._stacked("weight", first, num_samples)

    def drawn(self, seed: int, index: int) -> dict[str, Tensor]:
        tensors = super().drawn(seed, index)
        if self.bias is not None:
            tensors[self.weight_name.removesuffix("weight") + "bias"] = self._stacked("bias", index, 1)[0]
        return tensors

    @contextmanager
    def frozen_samples(self, num_samples: int, seed: int, first: int = 0, antithetic: bool = False) -> Iterator[None]:
        outer = self._biases
        if self.bias is not None:
            self._biases = self._stacked("bias", first, num_samples)
        try:
            with super().frozen_samples(num_samples, seed, first, antithetic):
                yield
        finally:
            self._biases = outer

    @torch.no_grad()
    def fix_at_sample(self, seed: int, index: int) -> None:
        bias = None if self.bias is None else self._stacked("bias", index, 1)[0]
        super().fix_at_sample(seed, index)
        if bias is not None:
            self.bias.copy_(bias)


class Ensemble(Method):
    """K adapters of different seeds, trained one after another, or each elsewhere and put together here."""

    name = "ensemble"
    title = "ensemble of LoRA adapters"
    about = (
        "An ensemble of plain LoRA adapters of different seeds: the first one here, the others in the subfolders "
        "`member-2`, `member-3` ... N=0 is the first member; N=K averages the probabilities of all K."
    )
    limits = "The members start from different seeds on the same data; what all of them get wrong stays hidden."
    citation = """@inproceedings{lakshminarayanan2017ensembles,
  title = {Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles},
  author = {Lakshminarayanan, Balaji and Pritzel, Alexander and Blundell, Charles},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2017}
}"""
    tags = ("uncertainty", "ensemble")
    flags = frozenset({"ensemble_size", "ensemble_members", "eval_samples", "posterior_batch_size"})
    sampled = True
    retrains = True
    facts = {"members": list}

    def check(self, args: Any) -> None:
        members = args.ensemble_members
        size = args.ensemble_size if members is None else len(members)
        if size < 2:
            what = "ensemble_size" if members is None else "the number of ensemble_members"
            raise BlobError(f"{what} must be >= 2, got {size}; one adapter is method lora")

    def unread(self, args: Any) -> frozenset[str]:
        return frozenset({"ensemble_size"}) if args.ensemble_members else frozenset()

    def settings(self, model: Any) -> dict[str, Any]:
        return {**super().settings(model), "members": len(model.method_facts.get("members", ()))}

    def num_samples(self, model: Any, args: Any) -> int:
        return len(model.method_facts["members"]) if super().num_samples(model, args) else 0

    def attach(self, model: Any, facts: Mapping[str, Any], folder: Path | None = None) -> None:
        if folder is not None:
            others = facts["members"][1:]
            if not all(isinstance(name, str) and _MEMBER.fullmatch(name) for name in others):
                raise BlobError(f"{folder / METHOD_FILE} is damaged: its members are {others!r}; get it again")
            beside = folder.parent  # PEFT's layout of a model whose first member is not named `default`
            home = folder if all((folder / name).is_dir() for name in others) else beside
            load_members(model, [home / name for name in others])
            model.method_facts = dict(facts)

    def train(self, trainer: Any, fit: Callable[[Any], TrainOutput], resume: Any) -> TrainOutput:
        args = trainer.args
        if trainer.model_init is None:
            raise BlobError("method ensemble makes several models: give the trainer model_init= instead of model=")
        if args.ensemble_members:
            folders = [adapter_files.resolve(member) for member in args.ensemble_members]
            outputs = []
        else:
            folders = [Path(args.output_dir, FOLDER, str(k + 1)) for k in range(args.ensemble_size)]
            outputs = [_train_member(trainer, fit, k, folder) for k, folder in enumerate(folders)]
        model = trainer.call_model_init()
        if not args.ensemble_members:  # else it begins with the first one
            model.load_adapter(folders[0], model.active_adapter)
        load_members(model, folders[1:])
        trainer.take_model(model)
        steps, losses = sum(one.global_step for one in outputs), [one.training_loss for one in outputs]
        runtime = sum(one.metrics.get("train_runtime", 0.0) for one in outputs)
        loss = sum(losses) / len(losses) if losses else math.nan
        return TrainOutput(steps, loss, {"train_runtime": runtime, "train_loss": loss} if outputs else {})


def _train_member(trainer: Any, fit: Callable[[Any], TrainOutput], index: int, folder: Path) -> TrainOutput:
    """Train member `index` as `--method lora` with the seed `seed + index` would; go on with what is there already.

    Raises:
        BlobError: What is there was trained with other settings.
    """
    args = trainer.args
    settings = json.loads(json.dumps(trainer.defining_settings(), default=str))
    settings = {name: value for name, value in settings.items() if not name.startswith("ensemble_")}
    if (folder / FINISHED).is_file():
        finished = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        changed = [name for name in settings if finished["settings"].get(name) != settings[name]]
        if changed:
            raise BlobError(f"{folder} holds a member trained with another {changed[0]}; choose another --output_dir")
        trainer.trained_parameters += finished["trained_parameters"]
        return TrainOutput(finished["steps"], finished["loss"], {"train_runtime": finished["runtime"]})
    before = trainer.trained_parameters
    kept = {name: getattr(args, name) for name in ("output_dir", "seed", "push_to_hub")}
    args.output_dir, args.seed, args.push_to_hub = str(folder), args.seed + index, False
    try:
        output = fit(True if newest_complete(folder) else None)
        trainer.save_model(str(folder))
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
    if args.should_save:
        finished = {
            "settings": settings,
            "steps": output.global_step,
            "loss": output.training_loss,
            "runtime": output.metrics.get("train_runtime", 0.0),
            "trained_parameters": trainer.trained_parameters - before,
        }
        files.write_text(folder / FINISHED, json.dumps(finished, indent=1, default=str) + "\n")
    trainer.accelerator.wait_for_everyone()  # before anyone reads the member or starts over
    return output


# ----- putting members together -----------------------------------------------------------------------------------


def load_members(model: Any, folders: Sequence[Path]) -> None:
    """Load further members into a `BlobModel` that holds the first one, and make its layers those of all.

    Raises:
        BlobError: A member's adapter is missing, damaged or of another shape.
    """
    first = model.active_adapter
    own = model.peft_config[first]
    head = _head(model)
    names, heads = [first], [head]
    for number, path in enumerate(folders, start=2):
        folder, name = adapter_files.resolve(path), f"member-{number}"
        _check_alike(own, type(own).from_pretrained(str(folder)), folder)
        model.add_adapter(name, copy.deepcopy(own))
        model.load_adapter(folder, name)
        names.append(name)
        heads.append(_head(model))
    parameters = head_parameters(model)
    with torch.no_grad(), gathered(list(parameters.values()), write=True):
        for key, parameter in parameters.items():  # loading a member has put its head in the base model
            parameter.copy_(head[key])
    model.set_adapter(first)
    _join_lora(model, names)
    _join_heads(model, names, heads)
    model.member_heads = dict(zip(names, heads, strict=True))
    model.method_facts = {"method": Ensemble.name, "members": names}


def _head(model: PeftModel) -> dict[str, Tensor]:
    parameters = head_parameters(model)
    with gathered(list(parameters.values())):
        return {name: value.detach().clone() for name, value in parameters.items()}


def _check_alike(first: Any, other: Any, folder: Path) -> None:
    for name in ("r", "lora_alpha", "use_rslora"):
        if getattr(first, name) != getattr(other, name):
            raise BlobError(
                f"{folder} cannot be a member: its {name} is {getattr(other, name)}, the first member's "
                f"{getattr(first, name)}"
            )


def _join_lora(model: PeftModel, names: Sequence[str]) -> None:
    first, others = names[0], names[1:]
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and first in module.lora_A:
            for part in ("lora_A", "lora_B"):
                weights: Any = getattr(module, part)
                rest = [(weights[name].weight, None) for name in others]
                weights[first] = MemberLinear(weights[first], rest, layer_name(path), part)


def _join_heads(model: PeftModel, names: Sequence[str], heads: Sequence[Mapping[str, Tensor]]) -> None:
    """Give the linear layers of a head, trained or frozen, the weights of every member."""
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    wrappers = [path for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for path, linear in linears.items():
        own = f"{path}.weight"
        if own in heads[0]:
            rest = [(head[own], head.get(f"{path}.bias")) for head in heads[1:]]
        elif saved := next((w for w in wrappers if path.startswith(f"{w}.modules_to_save.{names[0]}")), None):
            inside = path.removeprefix(f"{saved}.modules_to_save.{names[0]}")
            paths = [f"{saved}.modules_to_save.{name}{inside}" for name in names[1:]]
            rest = [(linears[one].weight, linears[one].bias) for one in paths]
            own = own.replace(f".modules_to_save.{names[0]}", "")  # as in the files
        else:
            continue
        parent, _, name = path.rpartition(".")
        member = MemberLinear(linear, rest, layer_name(path), weight_name=own)
        setattr(model.get_submodule(parent), name, member)
