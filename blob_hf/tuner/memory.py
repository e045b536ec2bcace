"""What training and evaluation hold in memory, counted from a model, which may be on the meta device.

with torch.device("meta"):
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.bfloat16)
print(memory_of(get_blob_model(base, BlobConfig(r=8, target_modules=["q_proj", "v_proj"])), bits=4).gigabytes())
"""

from dataclasses import asdict, dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.rows import ROW
from blob_hf.utils.errors import BlobError

_FLOAT32 = 4
_NF4_BLOCK = 64  # weights that share a float32 scale (Dettmers et al., 2023, without double quantisation)
_KL_TEMPORARIES = 10  # rows of `in_rows` at once, in `descend_rho`
_LAYER_BYTES = 34  # a layer's activations in half precision, bytes per token and hidden unit (Korthikanti et al., 2022)
_LOGIT_BYTES = 10  # a logit in half precision, in float32 and its gradient in float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one process that shards nothing.

    Attributes:
        base: Frozen weights.
        adapter: What is trained without the stds: A's means, B, and modules that are trained in full.
        std: The parameters of the stds.
        gradients, optimizer: Of what is trained; AdamW's two moments.
        kl_step: What the decoupled KL step allocates for a moment.
        samples: Frozen posterior samples, in evaluation alone.
        activations: Of a training step with gradient checkpointing: what layers start from, and one layer computed
            again. An estimate: kernels decide how much a layer really keeps.
        logits: Of the loss over the vocabulary; none where the head is cut.
    """

    base: int
    adapter: int
    std: int
    gradients: int
    optimizer: int
    kl_step: int
    samples: int
    activations: int
    logits: int

    @property
    def training(self) -> int:
        """All but the samples."""
        return sum(asdict(self).values()) - self.samples

    def gigabytes(self) -> dict[str, float]:
        """In units of 10^9 bytes, with the sum of a training."""
        return {name: value / 1e9 for name, value in {**asdict(self), "training": self.training}.items()}


def memory_of(
    model: BlobModel, bits: int | None = None, num_samples: int = 10, batch_size: int = 1, length: int = 512,
    logits: bool = True,
) -> Memory:  # fmt: skip
    """What a model with a posterior holds.

    Args:
        bits: 8 or 4: the base's linear layers but the head as bitsandbytes keeps them. None: as they are.
        num_samples: S of the evaluation.
        batch_size, length: Of a training step, rows and tokens of each.
        logits: Whether the loss is over the vocabulary at every token.

    Raises:
        BlobError: Other bits, or the model has no posterior.
    """
    if bits not in (None, 8, 4):
        raise BlobError(f"bits must be 8, 4 or None, got {bits}")
    gaussian = list(gaussian_layers(model).values())
    if not gaussian:
        raise BlobError("the model has no posterior; make one with get_blob_model or bayesianize")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    std = sum(layer.rho.nbytes for layer in gaussian)
    counts = [layer.rho.numel() for layer in gaussian]
    row = min(sum(counts), max(ROW, *counts))
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    tokens, frozen = batch_size * length, list(_frozen(model))
    half = max((parameter.element_size() for parameter, _ in frozen if parameter.is_floating_point()), default=2)
    layer_starts = config.num_hidden_layers * tokens * config.hidden_size * half
    return Memory(
        base=sum(_bytes(parameter, bits if is_linear else None) for parameter, is_linear in frozen),
        adapter=sum(parameter.nbytes for parameter in trained) - std,
        std=std,
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=2 * sum(parameter.nbytes for parameter in trained),
        kl_step=_KL_TEMPORARIES * _FLOAT32 * row,
        samples=num_samples * sum(layer.weight.nbytes for layer in gaussian),
        activations=layer_starts + _LAYER_BYTES * tokens * config.hidden_size * half // 2,
        logits=_LOGIT_BYTES * tokens * config.vocab_size if logits else 0,
    )


def _frozen(model: BlobModel) -> list[tuple[Tensor, bool]]:
    """Each frozen parameter of the base model once, and whether it is the weight of a linear layer but the head."""
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, LoraLayer) else head
    linear = {
        id(module.weight) for module in base.modules() if isinstance(module, nn.Linear) and module is not head
    }  # LoRA's own are trained
    return [(parameter, id(parameter) in linear) for parameter in base.parameters() if not parameter.requires_grad]


def _bytes(parameter: Tensor, bits: int | None) -> int:
    if bits == 8:  # a float32 scale for each row
        return parameter.numel() + _FLOAT32 * parameter.shape[0]
    if bits == 4:
        return parameter.numel() // 2 + _FLOAT32 * -(-parameter.numel() // _NF4_BLOCK)
    return parameter.nbytes
