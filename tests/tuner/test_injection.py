"""BLoB through PEFT's own doors: never silently plain LoRA, never a sample that is two networks."""

import peft
import pytest
import torch
from helpers.models import TINY
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import hotswap
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from blob_hf import BlobConfig, BlobModel, Sampling, bayesianize, export_samples, get_blob_model
from blob_hf.tuner import injection
from blob_hf.tuner.layer import GaussianA
from blob_hf.tuner.posterior import gaussian_layers, posterior_samples
from blob_hf.utils.errors import BlobError

pytestmark = pytest.mark.filterwarnings("ignore")
WIDE = {"r": 2, "lora_alpha": 4, "init_eps": 0.8}  # stds that one sees
X = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def with_b(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model whose LoRA does something: B is 0 at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def bert(**settings) -> BlobModel:
    torch.manual_seed(7)
    return with_b(get_blob_model(TINY["bert"](), BlobConfig(target_modules=["query", "value"], **{**WIDE, **settings})))


def is_noisy(model: nn.Module) -> bool:
    with torch.no_grad():
        return not torch.equal(model(input_ids=X).logits, model(input_ids=X).logits)


# ----- PEFT's functions -------------------------------------------------------------------------------------------


def by_get_peft_model(config):
    return peft.get_peft_model(TINY["bert"](), config)


def by_mixed_model(config):
    return peft.get_peft_model(TINY["bert"](), config, mixed=True)


def by_a_second_adapter(config):
    model = peft.get_peft_model(TINY["bert"](), LoraConfig(target_modules=["query"]))
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


def by_transformers(config):
    base = TINY["bert"]()
    base.add_adapter(config)
    return base


@pytest.mark.parametrize("make", [by_get_peft_model, by_mixed_model, by_a_second_adapter, by_transformers])
def test_a_blob_config_makes_a_posterior_whoever_takes_it(make):
    torch.manual_seed(0)
    model = with_b(make(BlobConfig(target_modules=["query", "value"], **WIDE)))
    layers = gaussian_layers(model)
    assert list(layers) == [f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]
    model.train()
    for layer in layers.values():
        layer.requires_grad_(True)
    assert is_noisy(model)
    model(input_ids=X).logits.sum().backward()
    assert all(layer.rho.grad.abs().sum() > 0 for layer in layers.values())
    model.eval()
    assert not is_noisy(model)
    with torch.no_grad(), posterior_samples(model, Sampling(2, seed=3)):
        both = model(input_ids=X.repeat(2, 1)).logits.unflatten(0, (2, -1))
    assert (both[0] - both[1]).abs().max() > 1e-4


def test_plain_lora_is_left_as_it_is():
    model = peft.get_peft_model(TINY["bert"](), LoraConfig(target_modules=["query"]))
    assert not gaussian_layers(model) and type(model.base_model) is LoraModel
    assert {type(m.lora_A["default"]) for m in model.modules() if isinstance(m, LoraLayer)} == {nn.Linear}


def test_what_is_changed_of_peft_is_where_it_was():
    """A release that moves one of these would let plain LoRA through."""
    assert LoraLayer.update_layer.__wrapped__ is injection._update_layer
    assert LoraModel._create_and_replace.__wrapped__ is injection._create_and_replace
    assert LoraModel.add_weighted_adapter.__wrapped__ is injection._add_weighted_adapter
    assert hotswap.hotswap_adapter_from_state_dict.__wrapped__ is injection._hotswap_from_state_dict
    assert hotswap._pad_lora_weights.__wrapped__ is injection._pad_lora_weights
    assert lora.ParamWrapper.forward is not None


def test_an_adapter_added_in_eval_mode_is_quiet():
    model = bert().eval()
    model.add_adapter("late", BlobConfig(target_modules=["query"], lora_dropout=0.5, **WIDE))
    model.set_adapter("late")
    with_b(model)
    assert not is_noisy(model)
    model.train()
    assert is_noisy(model)


def test_what_fails_leaves_the_model_as_it_was():
    model = bert().eval()
    before, expected = [name for name, _ in model.named_modules()], model(input_ids=X).logits
    with pytest.raises(BlobError, match="word_embeddings is Embedding"):
        model.add_adapter("bad", BlobConfig(target_modules=["query", "dense", "word_embeddings"]))
    assert [name for name, _ in model.named_modules()] == before and list(model.peft_config) == ["default"]
    assert torch.equal(model(input_ids=X).logits, expected)
    base = TINY["bert"]()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(BlobError, match="word_embeddings is Embedding"):
        get_blob_model(base, BlobConfig(target_modules=["query", "word_embeddings"]))
    assert [name for name, _ in base.named_modules()] == names
    get_blob_model(base, BlobConfig(target_modules=["query"]))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention])
def test_layers_whose_a_is_not_called_as_a_linear_layer_are_refused(kind):
    sizes = {nn.Embedding: (7, 8), nn.MultiheadAttention: (8, 2)}
    base = nn.ModuleDict({"linear": nn.Linear(8, 8), "odd": kind(*sizes.get(kind, (8, 8, 1)))})
    for make in (get_blob_model, peft.get_peft_model):
        with pytest.raises(BlobError, match=rf"odd is {kind.__name__}: .*leave it out of target_modules"):
            make(base, BlobConfig(target_modules=["linear", "odd"]))
    plain = peft.get_peft_model(
        nn.ModuleDict({"odd": kind(*sizes.get(kind, (8, 8, 1)))}), LoraConfig(target_modules=["odd"])
    )
    with pytest.raises(BlobError, match="odd is"):
        bayesianize(plain)


def test_hot_swapping_is_refused(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    with pytest.raises(BlobError, match=r"load_adapter\(folder, 'default'\) swaps a posterior in place"):
        hotswap.hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert all((layer.std > 0).all() for layer in gaussian_layers(model).values())
    with pytest.raises(BlobError, match="would drop the posterior"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    other = with_b(bert(), seed=1)
    other.load_adapter(tmp_path, "default")
    with (
        torch.no_grad(),
        model.posterior_samples(2, seed=1, repeat=True),
        other.posterior_samples(2, seed=1, repeat=True),
    ):
        torch.testing.assert_close(model.eval()(input_ids=X).logits, other.eval()(input_ids=X).logits)


def test_eva_gives_each_layer_its_rank_and_keeps_the_posterior():
    config = BlobConfig(
        target_modules=["query", "value"],
        r=4,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
        init_eps=0.5,
    )
    model = get_blob_model(TINY["bert"](), config)
    name = "base_model.model.bert.encoder.layer.{}.attention.self.{}"
    ranks = {name.format(i, part): i + 2 + (part == "value") for i in (0, 1) for part in ("query", "value")}
    directions = {key: torch.linalg.qr(torch.randn(16, rank))[0].T for key, rank in ranks.items()}
    peft.initialize_lora_eva_weights(model, eva_state_dict=dict(directions))
    for key, layer in gaussian_layers(model).items():
        torch.testing.assert_close(layer.weight, directions[f"base_model.model.{key}"])
        assert layer.rho.shape == layer.weight.shape and (layer.std > 0).all()
    assert len(gaussian_layers(model)) == 4
    with_b(model)
    assert is_noisy(model.train())


# ----- several adapters -------------------------------------------------------------------------------------------


def two_active() -> BlobModel:
    model = bert()
    model.add_adapter("second", BlobConfig(target_modules=["query"], prior_std=0.7, **{**WIDE, "r": 3}))
    model.base_model.set_adapter(["default", "second"])
    return with_b(model).eval()


def test_two_active_adapters_have_the_kl_and_the_noise_of_both():
    model = two_active()
    layers = gaussian_layers(model)
    assert len(layers) == 6
    parts = [gaussian_layers(model, name).values() for name in ("default", "second")]
    kl = sum(layer.kl(0.2) for layer in parts[0]) + sum(layer.kl(0.7) for layer in parts[1])
    torch.testing.assert_close(model.kl_divergence(), kl)
    sample = Sampling(1, seed=4)
    with posterior_samples(model, sample):
        draws = {}
        for module in model.modules():
            if isinstance(module, LoraLayer) and "second" in module.lora_A:
                for name in ("default", "second"):
                    layer = module.lora_A[name]
                    eps = (layer(torch.eye(16)).T - layer.weight) / layer.std
                    draws[name] = eps
    assert (draws["default"][:2] - draws["second"][:2]).abs().max() > 0.5  # not the same noise twice
    model.base_model.set_adapter(["default"])
    with posterior_samples(model, sample):  # the first one's do not depend on the second
        alone = [module for module in model.modules() if isinstance(module, LoraLayer) and "second" in module.lora_A]
        layer = alone[-1].lora_A["default"]
        torch.testing.assert_close((layer(torch.eye(16)).T - layer.weight) / layer.std, draws["default"])


def test_rows_that_choose_their_adapter_get_its_samples():
    model = bert().eval()
    model.add_adapter("second", BlobConfig(target_modules=["query", "value"], **{**WIDE, "r": 3}))
    with_b(model)
    names = ["default", "second", "default"]
    with torch.no_grad():
        with model.posterior_samples(3, seed=2):
            mixed = model(input_ids=X.repeat(3, 1), adapter_names=names * 3).logits.unflatten(0, (3, -1))
        for row, name in enumerate(names):
            model.set_adapter(name)
            with model.posterior_samples(3, seed=2):
                alone = model(input_ids=X[row : row + 1].repeat(3, 1)).logits
            torch.testing.assert_close(mixed[:, row], alone)


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_a_weighted_sum_of_posteriors_is_one(tmp_path, kind):
    """Mean: PEFT's of the means. Variance of each entry of B A: from independent entries of A, in closed form."""
    model = bert().eval()
    model.add_adapter("second", BlobConfig(target_modules=["query", "value"], **WIDE))
    with_b(model)
    weights = {"default": 0.7, "second": -1.5}
    model.add_weighted_adapter(list(weights), list(weights.values()), "both", combination_type=kind)
    model.set_adapter("both")
    for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
        stds = {name: module.lora_A[name].std for name in weights}
        factors = {name: abs(weights[name] * module.scaling[name]) for name in weights}
        own = module.lora_A["both"]
        if kind == "cat":  # exact: the variance of the sum of the two updates
            expected = sum(
                (factors[name] ** 2) * module.lora_B[name].weight.square() @ stds[name].square() for name in weights
            )
            found = module.scaling["both"] ** 2 * module.lora_B["both"].weight.square() @ own.std.square()
        else:
            expected = sum(factors[name] * stds[name].square() for name in weights)
            found = own.std.square()
        torch.testing.assert_close(found, expected)
    model.save_pretrained(tmp_path)
    again = BlobModel.from_pretrained(tmp_path / "both", TINY["bert"]())
    again.get_base_model().load_state_dict(
        {k: v for k, v in model.get_base_model().state_dict().items() if "lora" not in k}, strict=False
    )
    with (
        torch.no_grad(),
        model.posterior_samples(2, seed=1, repeat=True),
        again.posterior_samples(2, seed=1, repeat=True),
    ):
        torch.testing.assert_close(model(input_ids=X).logits, again(input_ids=X).logits)


def test_weighted_sums_that_are_no_gaussian_are_refused():
    model = bert()
    model.add_adapter("second", BlobConfig(target_modules=["query", "value"], **WIDE))
    with pytest.raises(BlobError, match="combination_type='svd' of Gaussians is not a Gaussian"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    model.add_adapter("plain", LoraConfig(target_modules=["query", "value"], r=2))
    with pytest.raises(BlobError, match="'plain' is plain"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "both", combination_type="cat")
    assert "both" not in model.peft_config


def test_an_adapter_with_a_point_in_it_is_no_posterior():
    model = bert()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.lora_A["default"] = nn.Linear(16, 2, bias=False)
    with pytest.raises(BlobError, match=r"query is plain LoRA: .*bayesianize"), model.posterior_samples(2):
        pass
    bayesianize(model)
    with model.posterior_samples(2):
        assert isinstance(layer.lora_A["default"], GaussianA)


# ----- LoRA on parameters: the experts of MoE models --------------------------------------------------------------


def tiny_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def moe(**settings) -> BlobModel:
    config = BlobConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2, init_eps=0.8, **settings)
    return with_b(get_blob_model(tiny_moe(), config))


def test_all_linear_makes_the_experts_a_posterior_and_trains_it():
    model = moe()
    layers = gaussian_layers(model)
    experts = [name for name in layers if ".experts." in name]
    assert experts == ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
    model.train()
    for layer in layers.values():
        layer.mean_only = layer.name not in experts
    assert is_noisy(model)
    model(input_ids=X).logits.square().mean().backward()
    assert all(layers[name].rho.grad.abs().sum() > 0 and layers[name].weight.grad is not None for name in experts)


def test_samples_of_experts_are_single_networks(tmp_path):
    """Each of several samples in one batch equals the plain PEFT adapter exported from it, on the plain base."""
    model = moe().eval()
    with torch.no_grad(), model.posterior_samples(3, seed=5):
        found = model(input_ids=X.repeat(3, 1)).logits.unflatten(0, (3, -1))
    for index, folder in enumerate(export_samples(model, 3, 5, tmp_path)):
        plain = PeftModel.from_pretrained(tiny_moe(), folder)
        torch.testing.assert_close(found[index], plain(input_ids=X).logits)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_experts_come_back_from_their_files_and_a_second_adapter_is_named_alike(tmp_path):
    model = moe().eval()
    model.save_pretrained(tmp_path)
    again = BlobModel.from_pretrained(tmp_path, tiny_moe())
    with (
        torch.no_grad(),
        model.posterior_samples(2, seed=5, repeat=True),
        again.posterior_samples(2, seed=5, repeat=True),
    ):
        assert torch.equal(model(input_ids=X).logits, again(input_ids=X).logits)
    model.load_adapter(tmp_path, "second")
    assert list(gaussian_layers(model, "second")) == list(gaussian_layers(model, "default"))
    merged = BlobModel.from_pretrained(tmp_path, tiny_moe()).merge_posterior_sample(seed=5, index=1)
    with torch.no_grad(), model.posterior_samples(Sampling(1, seed=5, first=1)):
        torch.testing.assert_close(model(input_ids=X).logits, merged(input_ids=X).logits)


def test_a_trained_plain_adapter_on_experts_is_made_a_posterior_around_it():
    plain = with_b(peft.get_peft_model(tiny_moe(), LoraConfig(r=2, target_modules="all-linear"))).eval()
    expected = plain(input_ids=X).logits
    model = bayesianize(plain, BlobConfig(init_eps=0.8))
    assert torch.equal(model(input_ids=X).logits, expected)
    with torch.no_grad(), model.posterior_samples(1):
        assert (model(input_ids=X).logits - expected).abs().max() > 1e-3
