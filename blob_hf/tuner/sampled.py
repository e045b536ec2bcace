"""A linear layer that can stand for many networks at once: one weight matrix for each block of a batch's rows.

What makes a posterior sample one network is here; what the samples are drawn from is the subclass's: the Gaussian of
`layer.GaussianA`, or whatever a baseline brings.
"""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blob_hf.tuner.draws import Noise
from blob_hf.tuner.in_flight import Frozen, fixed, frozen_linear, frozen_now, sample_major_linear
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.sharding import full_tensor, gathered


class SampledLinear(nn.Linear):
    """A linear layer without bias, in the place of LoRA's A or B, whose weights can be frozen at samples.

    What `forward(x)` uses: what its weight is frozen at in this context, if it is (see `in_flight`); else its weight,
    in train mode through `train_forward`.

    Args:
        linear: What it takes the place of; the weight stays the same parameter.
        layer: Name of the LoRA layer.
        part: `lora_A` or `lora_B`.

    Attributes:
        num_networks: How many networks there are, if they are not drawn but given; None: as many as one asks for.
    """

    num_networks: int | None = None

    def __init__(self, linear: nn.Linear, layer: str, part: str = "lora_A") -> None:
        nn.Module.__init__(self)  # not nn.Linear's: the trained or freshly initialised weight is taken over as it is
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.name = layer if part == "lora_A" else f"{layer}.{part}"  # names its random numbers
        self.weight_name = weight_name(layer, part)
        self.mean_only = False
        self.noise_scale = 1.0  # of the samples, beside what `draw` draws
        self.is_frozen_somewhere = False
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_frozen_somewhere:
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                return frozen_linear(x, self.weight, self.bias, id(self), self.name)
            frozen = frozen_now(self)
            if frozen is not None and frozen.weight is not None:
                return sample_major_linear(x, frozen, self.name)
            if frozen is not None:
                return F.linear(x, self.weight, self.bias)
        if self.mean_only or not self.training:
            return F.linear(x, self.weight, self.bias)
        return self.train_forward(x)

    def train_forward(self, x: Tensor) -> Tensor:
        """The layer in train mode, where a subclass may add noise."""
        return F.linear(x, self.weight, self.bias)

    def wanted_noise(self, sampling: Sampling) -> Noise | None:
        """What `draw` is going to ask `standard_normal` for, if it does."""
        return None

    def draw(self, sampling: Sampling) -> Tensor:
        """The samples of the weight, shape (num_samples, out_features, in_features).

        Sample s depends on (seed, s, layer name) alone: not on the number of samples, the device, the rank, the
        batch or any global random state.
        """
        raise NotImplementedError

    def samples(self, sampling: Sampling) -> Tensor:
        """What is drawn, with its distance from the weight scaled (see `scale_noise`)."""
        drawn = self.draw(sampling)
        if self.noise_scale == 1.0:
            return drawn
        with torch.no_grad(), gathered([self.weight]):
            return torch.lerp(full_tensor(self.weight).to(drawn.dtype).expand_as(drawn), drawn, self.noise_scale)

    def scale_noise(self, factor: float) -> None:
        """Make the samples lie `factor` times as far from the weight: a temperature factor^2 of the posterior."""
        self.noise_scale *= factor

    def freeze(self, sampling: Sampling) -> Frozen:
        """What this layer is at samples."""
        return Frozen(self.samples(sampling))

    def frozen_samples(self, sampling: Sampling) -> AbstractContextManager[None]:
        """Use these samples inside the block (sample-major rows)."""
        return fixed({self: self.freeze(sampling)})

    def drawn(self, sample: Sampling) -> dict[str, Tensor]:
        """The tensors of one sample (of one alone) by their names in the files of an adapter."""
        return {self.weight_name: self.samples(sample)[0]}

    def plain(self) -> nn.Linear:
        """An ordinary linear layer with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def fix_at_sample(self, sample: Sampling) -> None:
        """Overwrite the weight by one sample."""
        self.weight.copy_(self.samples(sample)[0])


def layer_name(path: str) -> str:
    """Name of a LoRA layer from its path in the PEFT model."""
    return path.removeprefix("base_model.model.")


def weight_name(layer: str, part: str = "lora_A") -> str:
    """What the weight of a LoRA layer is called in the files of an adapter."""
    return f"base_model.model.{layer}.{part}.weight"
