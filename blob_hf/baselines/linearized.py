"""Weights with a Gaussian from the curvature of the loss, and the network linearised in them (Immer et al., 2021).

f(x; W) ~ f(x; W_MAP) + J (W - W_MAP), so that the logits are Gaussian: what depends on the network is the gradients J,
one backward pass a class; what depends on the prior, and the draws of logits, cost next to nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blob_hf.inference.predict import ClassPrediction, log_mean_exp
from blob_hf.tuner.draws import standard_normal
from blob_hf.tuner.in_flight import Frozen, Later, fixed
from blob_hf.tuner.posterior import posterior_mean, sampled_layers
from blob_hf.tuner.sampled import SampledLinear
from blob_hf.tuner.sampling import Sampling
from blob_hf.tuner.stacks import in_last_layers
from blob_hf.utils.errors import BlobError
from blob_hf.utils.sharding import full_tensor, gathered


@dataclass(frozen=True)
class Factors:
    """Eigenvalues and eigenvectors of the two Kronecker factors of one weight `(out, in)`."""

    l_out: Tensor
    l_in: Tensor
    u_out: Tensor
    u_in: Tensor

    def scale(self, prior_precision: float) -> Tensor:
        """Stds in the coordinates of the eigenvectors, `(out, in)`."""
        return (torch.outer(self.l_out, self.l_in) + prior_precision).rsqrt()


class LaplaceLinear(SampledLinear):
    """LoRA's A or B with a Gaussian from the curvature of the loss."""

    def __init__(self, linear: nn.Linear, layer: str, part: str, factors: Factors, prior_precision: float) -> None:
        super().__init__(linear, layer, part)
        self.prior_precision = prior_precision
        for name, tensor in vars(factors).items():  # buffers follow the model; their file is written by `save`
            self.register_buffer(name, tensor.to(linear.weight.device), persistent=False)

    @property
    def factors(self) -> Factors:
        """The fitted curvature."""
        return Factors(self.l_out, self.l_in, self.u_out, self.u_in)  # type: ignore[arg-type]

    @torch.no_grad()
    def draw(self, sampling: Sampling) -> Tensor:
        noise = standard_normal(self.name, sampling, (self.out_features, self.in_features))
        factors = self.factors
        scaled = noise.to(self.weight.device) * factors.scale(self.prior_precision)
        with gathered([self.weight]):
            return full_tensor(self.weight) + (factors.u_out @ scaled @ factors.u_in.T).to(self.weight.dtype)

    def covariance(self, gradients: Tensor) -> Tensor:
        """Covariance of outputs with these gradients `(rows, outputs, out, in)`: `(rows, outputs, outputs)`."""
        factors = self.factors
        scale = self.noise_scale * factors.scale(self.prior_precision)
        rotated = factors.u_out.T @ gradients.float() @ factors.u_in * scale
        flat = rotated.flatten(2)
        return flat @ flat.transpose(1, 2)


def laplace_layers(model: nn.Module, last: int | None = None) -> list[LaplaceLinear]:
    """The layers with a Laplace posterior; with `last` those in so many last layers of the model and its head.

    Raises:
        BlobError: None of them is there, or the model has not so many.
    """
    layers = [layer for layer in sampled_layers(model) if isinstance(layer, LaplaceLinear)]
    if last is None:
        return layers
    is_last = in_last_layers(model, last)
    there = {module for path, module in model.named_modules() if is_last(path)}
    if not (found := [layer for layer in layers if layer in there]):
        raise BlobError(f"no weight with a Laplace posterior is in the last {last} layers; take more of them")
    return found


@dataclass(frozen=True)
class Linearized:
    """A network linearised in its weights at the mean, for the rows of a batch.

    Attributes:
        mean: Logits there, `(rows, classes)`, float32.
        gradients: Of the logits by each of the model's Laplace layers, `(rows, classes, out, in)`.
    """

    mean: Tensor
    layers: list[LaplaceLinear]
    gradients: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, inputs: dict[str, Any], last: int | None = None) -> "Linearized":
        """Each row gets a copy of the weights of its own, like a sample, so that one backward pass a class gives the
        gradients of all rows.

        Args:
            last: As `Sampling.layers`: below so many last layers the weights are the mean.
        """
        layers = laplace_layers(model, last)
        rows = len(next(value for value in inputs.values() if isinstance(value, Tensor) and value.dim()))
        copies = [layer.weight.detach().expand(rows, -1, -1).clone().requires_grad_() for layer in layers]
        frozen: dict[SampledLinear, Frozen | Later] = {
            layer: Frozen(copy) for layer, copy in zip(layers, copies, strict=True)
        }
        with torch.enable_grad(), posterior_mean(model), fixed(frozen):
            logits = model(**inputs).logits.float()
            classes = logits.shape[1]
            per_class = [
                torch.autograd.grad(logits[:, c].sum(), copies, retain_graph=c < classes - 1) for c in range(classes)
            ]
        gradients = [torch.stack(of_layer, dim=1) for of_layer in zip(*per_class, strict=True)]
        return cls(logits.detach(), layers, gradients)

    @torch.no_grad()
    def covariance(self) -> Tensor:
        """J Sigma J^T of each row at the layers' prior precision, `(rows, classes, classes)`, float32."""
        parts = [layer.covariance(own) for layer, own in zip(self.layers, self.gradients, strict=True)]
        return torch.stack(parts).sum(0)

    def predict(self, sampling: Sampling) -> ClassPrediction:
        """Classes where logits ~ N(mean, J Sigma J^T): S draws of the logits.

        Sample s has the same standard normal draw for every row, so that it does not depend on the batch.
        """
        values, vectors = torch.linalg.eigh(self.covariance())
        # the symmetric root: eigenvectors have a sign that rounding may turn
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
        noise = standard_normal("logits", sampling, self.mean.shape[-1:])
        draws = self.mean.unsqueeze(1) + noise.to(self.mean.device) @ root.transpose(1, 2)
        samples = F.log_softmax(draws, dim=-1)
        return ClassPrediction(log_mean_exp(samples, dim=1), samples, F.log_softmax(self.mean, dim=-1))


def linearized_prediction(model: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> ClassPrediction:
    """Classes under the network linearised in its weights at the mean, from S draws of the logits."""
    return Linearized.of(model, inputs, sampling.layers).predict(sampling)
