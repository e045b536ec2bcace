"""What differs between the engines that train on many processes: DDP, DeepSpeed ZeRO, FSDP."""

import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from blob_hf.tuner.adapter_names import embedding_names
from blob_hf.tuner.base_model import head_parameters, is_resized
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor

OWN_OPTIMIZER = (
    "the DeepSpeed config has an 'optimizer' section, whose steps would leave out the KL: remove the section (the "
    "Trainer's optimizer is used under ZeRO, too)"
)


def engine_of(accelerator: Accelerator) -> str:
    """Name of the engine whose optimizer state a checkpoint has: `torch` (one process or DDP), `fsdp`, `zero-2 x 4`.

    ZeRO's states are shards of one number of processes; FSDP's are resharded on loading.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero-{accelerator.state.deepspeed_plugin.zero_stage} x {accelerator.num_processes}"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "torch"


def require_whole_models(accelerator: Accelerator, what: str) -> None:
    """Refuse to fit to, or to train, several whole models where an engine holds the one model.

    Args:
        what: That needs them, for the message.

    Raises:
        BlobError: This is DeepSpeed or FSDP.
    """
    if engine_of(accelerator) != "torch":
        raise BlobError(
            f"{what} works with whole models, not under DeepSpeed or FSDP: train plain LoRA adapters there, then make "
            "it from them in one process or under DDP"
        )


def require_deepspeed(config: dict[str, Any] | str | None) -> None:
    """Raise a BlobError when a DeepSpeed config is given, but cannot be used.

    Raises:
        BlobError: DeepSpeed is not installed, the config is not readable, or it brings an optimizer of its own.
    """
    if not config:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise BlobError("deepspeed needs DeepSpeed: pip install 'blob_hf[deepspeed]'")
    if not isinstance(config, dict):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BlobError(f"cannot read the DeepSpeed config {config}: {' '.join(str(error).split())}") from error
    if "optimizer" in config:
        raise BlobError(OWN_OPTIMIZER)


def require_device(args: TrainingArguments) -> None:
    """Refuse DeepSpeed where there is nothing but a CPU that nobody has asked for: accelerate fails an assertion then.

    Raises:
        BlobError: So it is.
    """
    on_cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.deepspeed and not on_cpu and not torch.accelerator.is_available():
        raise BlobError("deepspeed found no GPU on this machine; to run it on the CPU set use_cpu true")


@contextmanager
def plain_evaluation(trainer: Trainer) -> Iterator[None]:
    """Inside the block an untrained model under ZeRO-0 to -2 is evaluated as it is, on its own device.

    These stages shard only what training needs (optimizer states, gradients), and transformers has no DeepSpeed
    engine for them but a training's: "ZeRO inference only makes sense with ZeRO Stage 3".
    """
    plain = trainer.is_deepspeed_enabled and trainer.deepspeed is None and not is_deepspeed_zero3_enabled()
    if plain:
        trainer.is_deepspeed_enabled = False
    try:
        yield
    finally:
        if plain:
            trainer.is_deepspeed_enabled = True


def check_not_for_inference(trainer: Trainer) -> None:
    """Refuse to train a model that DeepSpeed has wrapped to be evaluated: that engine has no backward.

    Raises:
        BlobError: ZeRO-3, and the model was evaluated before its training.
    """
    if trainer.deepspeed is not None and trainer.accelerator.deepspeed_engine_wrapped is None:
        raise BlobError(
            "ZeRO-3 cannot train a model in the process that has evaluated it untrained; leave that evaluation out, or "
            "take ZeRO-2"
        )


def join_deepspeed(args: TrainingArguments) -> None:
    """Tell DeepSpeed of the processes that training arguments have connected.

    On CPUs accelerate connects them by itself, and ZeRO-3 would load a model as if there were one process.
    """
    if args.deepspeed and args.world_size > 1:
        import deepspeed.comm

        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(torch.distributed.get_backend(), verbose=False)


def check_deepspeed(args: TrainingArguments) -> None:
    """Refuse a DeepSpeed config whose values contradict the training arguments (both would claim the batch size)."""
    config = getattr(args, "hf_deepspeed_config", None)
    mismatches = [line.removeprefix("- ") for line in getattr(config, "mismatches", [])]
    if mismatches:
        raise BlobError(
            f"the DeepSpeed config contradicts the training arguments ({'; '.join(mismatches)}); set it to 'auto' there"
        )


def check_fsdp_training(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse models that FSDP2 cannot shard.

    Raises:
        BlobError: Two of its layers share one weight (BART and T5 tie their head to the embeddings).
    """
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if ties and getattr(accelerator, "is_fsdp2", False):
        owners = [id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
        if len(set(owners)) < len(owners):
            raise BlobError(
                "FSDP2 cannot shard the tied embeddings of this model (BART and T5 have them): use DeepSpeed ZeRO-3"
            )


def check_fsdp_evaluation(accelerator: Accelerator, untrained: bool) -> None:
    """Refuse to evaluate what FSDP2 has not trained: accelerate shards a model with its optimizer alone.

    Args:
        untrained: Whether the model has not been wrapped by a training.

    Raises:
        BlobError: So it is.
    """
    if getattr(accelerator, "is_fsdp2", False) and untrained:
        raise BlobError(
            "FSDP2 can evaluate only what it has trained in the same run: leave out an evaluation before training, and "
            "evaluate a saved adapter in one process, under DDP or ZeRO-3"
        )


def gathered_adapter(model: PeftModel) -> dict[str, Tensor]:
    """The parameters that an adapter's files are made from, whole and on the CPU (a collective under FSDP2)."""
    config: LoraConfig = model.active_peft_config  # type: ignore[assignment]
    shared = {*head_parameters(model), *(embedding_names(model) if is_resized(model.get_base_model(), config) else ())}
    return {
        name: full_tensor(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ".lora_" in name or name in shared
    }


def decorrelate_noise(seed: int, accelerator: Accelerator, model: nn.Module) -> None:
    """Give each process noise of its own: with equal seeds the k-th rows of all processes would share theirs.

    Noise that the batch is meant to share (`noise="shared"`) stays the same on all of them: N processes then train as
    one process with the whole batch.
    """
    kinds = {layer.noise for layer in gaussian_layers(model).values()}
    if accelerator.num_processes > 1 and "shared" not in kinds:
        torch.manual_seed(seed + accelerator.process_index)


def shutdown(accelerator: Accelerator | None = None) -> None:
    """End a run on all processes together: one that exits first would abort the others' connections.

    gloo's threads drop the tensors of a finished collective under Python's lock. A thread that still waits for the lock
    while Python exits is killed, which aborts the process; nothing tells when they are done, so they get a moment.

    Args:
        accelerator: Ends its trackers, too.
    """
    state = PartialState()
    state.wait_for_everyone()
    if accelerator is None:
        state.destroy_process_group()
    else:
        accelerator.end_training()
    if state.num_processes > 1:
        time.sleep(0.5)
