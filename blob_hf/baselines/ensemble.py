"""Deep ensembles of adapters (Lakshminarayanan et al., NeurIPS 2017): sample s is the member s, all of its weights.

The members are adapters of one PEFT model. Samples of the first one's layers are the weights of all of them, so that
one batch, or one `generate`, serves all members. A classification head is part of a member, whether PEFT trained it
(`modules_to_save`) or it is frozen at random under LoRA: adapters of different seeds have different ones.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from blob_hf.baselines.base import METHOD_FILE, MethodState, register_method
from blob_hf.reporting.run_summary import MethodCard
from blob_hf.trainer.checkpoints import newest_complete
from blob_hf.trainer.training_args import DEFINING, BlobTrainingArguments, changed_arguments
from blob_hf.tuner import adapter_files
from blob_hf.tuner.adapter_files import NAMES
from blob_hf.tuner.base_model import head_parameters
from blob_hf.tuner.in_flight import Frozen
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import lora_layers
from blob_hf.tuner.sampled import SampledLinear, layer_name
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered, num_trained

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
        self.num_networks: int = 1 + len(others)

    def scale_noise(self, factor: float) -> None:
        raise BlobError("an ensemble's members are networks of their own, not noise around one: nothing to scale")

    def _stacked(self, name: str, sampling: Sampling) -> Tensor:
        own = getattr(self, name)
        with gathered([own]):
            every = [full_tensor(own), *(getattr(self, f"_{name}_{i}") for i in range(self.num_networks - 1))]
            return torch.stack([every[index].detach() for index in sampling.indices])

    @torch.no_grad()
    def draw(self, sampling: Sampling) -> Tensor:
        if sampling.indices.stop > self.num_networks:
            raise BlobError(
                f"the ensemble has {self.num_networks} members, but {sampling.indices.stop} samples were asked for"
            )
        return self._stacked("weight", sampling)

    def drawn(self, sample: Sampling) -> dict[str, Tensor]:
        tensors = super().drawn(sample)
        if self.bias is not None:
            tensors[self.weight_name.removesuffix("weight") + "bias"] = self._stacked("bias", sample)[0]
        return tensors

    def freeze(self, sampling: Sampling) -> Frozen:
        return Frozen(self.samples(sampling), None if self.bias is None else self._stacked("bias", sampling))

    @torch.no_grad()
    def fix_at_sample(self, sample: Sampling) -> None:
        bias = None if self.bias is None else self._stacked("bias", sample)[0]
        super().fix_at_sample(sample)
        if bias is not None:
            self.bias.copy_(bias)


@register_method("ensemble")
@dataclass(frozen=True)
class EnsembleState(MethodState):
    """The members.

    Attributes:
        members: Names of their adapters in the model, the first one's first.
    """

    members: list[str] = field(default_factory=list)

    files = (METHOD_FILE, *(f"member-*/{name}" for name in NAMES))
    required = {"members": list}
    card = MethodCard(
        title="ensemble of LoRA adapters",
        about=(
            "An ensemble of plain LoRA adapters of different seeds: the first one here, the others in the subfolders "
            "`member-2`, `member-3` ... N=0 is the first member; N=K averages the probabilities of all K."
        ),
        limits="The members start from different seeds on the same data; what all of them get wrong stays hidden.",
        citation="""@inproceedings{lakshminarayanan2017ensembles,
  title = {Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles},
  author = {Lakshminarayanan, Balaji and Pritzel, Alexander and Blundell, Charles},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2017}
}""",
        tags=("uncertainty", "ensemble"),
        sampled=True,
    )

    def settings(self) -> dict[str, object]:
        return {"members": len(self.members)}

    def attach(self, model: BlobModel, folder: Path) -> None:
        others = self.members[1:]
        if not all(isinstance(name, str) and _MEMBER.fullmatch(name) for name in others):
            raise BlobError(f"{folder / METHOD_FILE} is damaged: its members are {others!r}; get it again")
        beside = folder.parent  # PEFT's layout of a model whose first member is not named `default`
        home = folder if all((folder / name).is_dir() for name in others) else beside
        join_members(model, [home / name for name in others])


# ----- training members -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedMember:
    """A member's training: where its adapter is, and what it cost.

    Attributes:
        runtime: Seconds.
        trained_parameters: By gradient.
    """

    folder: Path
    steps: int
    loss: float
    runtime: float
    trained_parameters: int

    def state(self) -> TrainerState:
        """Its trainer's, at the end of the training."""
        return TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))


def train_members(
    make_trainer: Callable[[Any], Any], args: BlobTrainingArguments, size: int, folder: Path
) -> list[TrainedMember]:
    """Train members of the seeds `args.seed`, `args.seed + 1`, ..., each as plain LoRA with its seed would be.

    What is there already is gone on with, or reused.

    Args:
        make_trainer: From a member's training arguments to a trainer of a fresh plain LoRA model.
        size: K >= 2.
        folder: A folder for each member's training is made here.

    Raises:
        BlobError: size < 2, or what is there was trained with other settings.
    """
    check_size(size)
    return [_train_member(make_trainer, args, index, folder / str(index + 1)) for index in range(size)]


_OF_A_POSTERIOR = {"beta", "gamma", "train_samples", *(name for name in DEFINING if name.startswith("kl_"))}


def check_size(size: int) -> None:
    """Refuse an ensemble of fewer than two."""
    if size < 2:
        raise BlobError(f"an ensemble needs 2 members or more, got {size}; one adapter is method lora")


def _train_member(make_trainer: Callable[[Any], Any], args: Any, index: int, folder: Path) -> TrainedMember:
    # a member is plain LoRA, whatever beta is
    settings = {name: getattr(args, name) for name in DEFINING if name not in _OF_A_POSTERIOR}
    settings = json.loads(json.dumps(settings, default=str))
    if (folder / FINISHED).is_file():
        finished = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        changed = [name for name in settings if finished["settings"].get(name) != settings[name]]
        if changed:
            raise BlobError(f"{folder} holds a member trained with another {changed[0]}; choose another folder")
    else:
        own = changed_arguments(args, output_dir=str(folder), seed=args.seed + index, push_to_hub=False)
        trainer = make_trainer(own)
        output = trainer.train(True if newest_complete(folder) else None)
        trainer.save_model(str(folder))
        trainer.save_state()
        finished = {
            "settings": settings,
            "steps": output.global_step,
            "loss": output.training_loss,
            "runtime": output.metrics.get("train_runtime", 0.0),
            "trained_parameters": num_trained(trainer.model),
        }
        if args.should_save:
            files.write_text(folder / FINISHED, json.dumps(finished, indent=1, default=str) + "\n")
        trainer.accelerator.wait_for_everyone()  # before anyone reads the member or starts over
    costs = (finished["steps"], finished["loss"], finished["runtime"], finished["trained_parameters"])
    return TrainedMember(folder, *costs)


# ----- putting members together -----------------------------------------------------------------------------------


def join_members(model: BlobModel, folders: Sequence[str | Path]) -> EnsembleState:
    """Load further members into a model that holds the first one, and make its layers those of all, in place.

    Args:
        model: With the first member's plain LoRA adapter.
        folders: Folders or Hub repos of the others.

    Returns:
        The members; the model has them as its companion.

    Raises:
        BlobError: A member's adapter is missing, damaged or of another shape.
    """
    first = str(model.active_adapter)
    own: Any = model.peft_config[first]
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
    model.adapter_heads = dict(zip(names, heads, strict=True))
    state = EnsembleState(names)
    model.set_companion(state)
    return state


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
    for path, module in lora_layers(model, first):
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
