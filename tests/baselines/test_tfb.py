"""Training-free Bayesianization: the rotation and the search, against brute force."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bert
from helpers.running import GLUE, run_script
from helpers.training import arguments, blob_bert, fit, rows
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoTokenizer

from blob_hf import BlobError, BlobModel, BlobTrainer
from blob_hf.baselines.tfb import TFBConfig, anchor_rows, largest_sigma, rotate
from blob_hf.baselines.tfb import fit_tfb as library_fit
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.routes import find_route
from blob_hf.cli.tfb import main
from blob_hf.data import demo
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampling import Sampling


@pytest.mark.parametrize("out", [30, 5, 2])  # a head of two classes has fewer outputs than the rank
def test_the_product_stays_and_its_noise_is_isotropic_in_the_column_space_of_b(out):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 12, generator=generator), torch.randn(out, 5, generator=generator)
    rotated = rotate(a, b)
    assert rotated.a.shape == a.shape and rotated.b.shape == b.shape
    torch.testing.assert_close(rotated.b @ rotated.a, b @ a, atol=1e-5, rtol=1e-5)
    # Cov of one column of B' E with independent E_i ~ N(0, unit_std_i^2) is the projection on B's column space
    covariance = rotated.b @ torch.diag(rotated.unit_std**2) @ rotated.b.T
    projection = b @ torch.linalg.pinv(b)
    torch.testing.assert_close(covariance, projection, atol=1e-4, rtol=1e-4)


def test_directions_that_b_does_not_have_get_no_noise():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(9, 2, generator=generator) @ torch.randn(2, 4, generator=generator)
    rotated = rotate(torch.randn(4, 6, generator=generator), b)
    assert (rotated.unit_std > 0).sum() == 2 and torch.isfinite(rotated.unit_std).all()


def test_bisection_finds_what_a_grid_finds():
    def change(sigma):
        return 3 * sigma**2 + 0.1 * sigma

    for tolerance in (1e-4, 0.01, 0.1):
        found = largest_sigma(change, tolerance, bound=1.0, steps=14)
        grid = np.linspace(0, 1, 100_001)
        best = grid[change(grid) <= tolerance].max()
        assert found.sigma <= best + 1e-5 and found.sigma == pytest.approx(best, abs=2**-14 + 1e-5)
        assert found.change == change(found.sigma) <= tolerance and not found.at_bound
        assert len(found.tried) == 15


def test_the_ends_of_the_search():
    assert largest_sigma(lambda s: 0.0, 0.01, 0.5, 3).at_bound
    nothing = largest_sigma(lambda s: 1.0, 0.01, 0.5, 3)
    assert nothing.sigma == 0.0 and nothing.change == 0.0


def lora_bert(seed=0):
    torch.manual_seed(seed)
    model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4)).eval()
    randomize_b(model, 0.4)
    return model


def fit_tfb(folder, model, data=None, **changes):
    changes = {"num_anchors": 20, "tfb_samples": 2, **changes}
    return fit(folder, "tfb", lambda: model, rows(30) if data is None else data, **changes)[0]


def test_the_network_stays_and_only_noise_is_added(tmp_path):
    plain, model = lora_bert(), lora_bert()
    ids = random_ids(6, 8)
    fit_tfb(tmp_path, model, tfb_tolerance=0.05, tfb_bound=4.0)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    state = model.companion("method")
    sigma = state.sigma_q
    assert 0 < sigma < 4 and 0 <= state.relative_change <= 0.05
    # of every layer: the sampled product is the trained one plus sigma_q times white noise in B's column space
    for name, layer in gaussian_layers(model).items():
        module = model.get_submodule(f"base_model.model.{name}")
        trained = plain.get_submodule(f"base_model.model.{name}")
        b = trained.lora_B["default"].weight.detach()
        product = b @ trained.lora_A["default"].weight.detach()
        noise = (module.lora_B["default"].weight @ layer.draw(Sampling(4000, seed=1)) - product).detach()
        covariance = torch.einsum("sij,skj->ik", noise, noise) / (4000 * noise.shape[2])
        expected = sigma**2 * b @ torch.linalg.pinv(b)
        # 4,000 x 16 draws: 0.6 % of the largest variance each, 5 sigma
        assert (covariance - expected).abs().max() < 0.03 * sigma**2


def test_the_search_finds_what_a_grid_over_the_real_loss_finds(tmp_path):
    model = lora_bert()
    trainer = fit_tfb(tmp_path, model, tfb_tolerance=0.02, tfb_bound=1.0)
    facts = asdict(model.companion("method"))
    anchors = anchor_rows(rows(30), 20)
    assert facts["anchors"] == 20 and facts["anchor_nll"] == pytest.approx(trainer.mean_nll(anchors, 0), rel=1e-5)
    stds = {name: layer.std.detach() / facts["sigma_q"] for name, layer in gaussian_layers(model).items()}
    changes = {}
    for sigma in np.linspace(0.005, 1.0, 200):
        for name, layer in gaussian_layers(model).items():
            layer.set_std(float(sigma) * stds[name])
        changes[sigma] = trainer.mean_nll(anchors, 2) / facts["anchor_nll"] - 1
    first_too_wide = min(sigma for sigma, change in changes.items() if change > 0.02)
    assert facts["sigma_q"] == pytest.approx(first_too_wide, abs=0.005 + 1 / 1024)
    by_brute_force = -torch.stack([_log_probs(model, facts, stds, anchors, s) for s in range(2)]).mean().item()
    assert by_brute_force / facts["anchor_nll"] - 1 == pytest.approx(facts["relative_change"], abs=1e-4)


def _log_probs(model, facts, stds, anchors, sample):
    for name, layer in gaussian_layers(model).items():
        layer.set_std(facts["sigma_q"] * stds[name])
    with torch.no_grad(), model.posterior_samples(Sampling(1, seed=0, first=sample)):
        logits = model(input_ids=torch.tensor(anchors["input_ids"])).logits
    return logits.log_softmax(-1)[range(len(anchors)), torch.tensor(anchors["labels"])]


def test_any_dataset_can_hold_the_anchors(tmp_path):
    found = []
    for data in (rows(30), [dict(row) for row in rows(30)]):
        model = lora_bert()
        fit_tfb(tmp_path, model, data)
        found.append(model.companion("method"))
    assert found[0] == found[1]


def test_a_saved_posterior_predicts_the_same_and_is_a_blob_adapter(tmp_path):
    trainer = fit_tfb(tmp_path, lora_bert(), tfb_tolerance=0.05)
    trainer.save_model()
    metrics = trainer.evaluate()
    torch.manual_seed(0)
    loaded = BlobModel.from_pretrained(tmp_path, model=tiny_bert()).eval()
    assert loaded.method == "tfb" and loaded.companion("method") == trainer.model.companion("method")
    args = arguments(tmp_path / "again")
    again = BlobTrainer(model=loaded, args=args, eval_dataset=rows(13, seed=1)).evaluate()
    for name in ("eval_nll", "eval_mean_nll", "eval_sample_nll"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)
    assert (tmp_path / "posterior_std.safetensors").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "TFB adapter" in card and "| sigma q |" in card and "beta" not in card


def test_mistakes_are_one_line(tmp_path, caplog):
    with pytest.raises(BlobError, match="num_anchors must be >= 1, got 0"):
        find_route("tfb").check(MethodArguments("tfb", num_anchors=0))
    with pytest.raises(BlobError, match="tfb_tolerance must be >= 0, got -1"):
        find_route("tfb").check(MethodArguments("tfb", tfb_tolerance=-1))
    with pytest.raises(BlobError, match="^bound must be > 0, got 0"):  # a library error has no flag in it
        TFBConfig(bound=0)
    with pytest.raises(BlobError, match="needs anchor examples, but there are none"):
        fit_tfb(tmp_path, lora_bert(), rows(3).select([]))
    with pytest.raises(BlobError, match="needs anchor examples, but there are none"):
        anchor_rows(rows(3).select([]), 5)
    with pytest.raises(BlobError, match="needs a plain LoRA adapter, but this one has a posterior"):
        fit_tfb(tmp_path, blob_bert())
    untrained = lora_bert()
    randomize_b(untrained, 0.0)
    with pytest.raises(BlobError, match="needs a trained adapter, but B is 0 in every layer"):
        fit_tfb(tmp_path, untrained)
    memorised = lora_bert()
    with pytest.raises(BlobError, match="relative change of the anchors' loss, but that is 0 under the adapter"):
        library_fit(memorised, lambda networks: 0.0)
    assert not gaussian_layers(memorised)  # as it was
    fit_tfb(tmp_path, lora_bert(), tfb_tolerance=0.0, tfb_bound=1e9)
    assert "the posterior is a point" in caplog.text
    caplog.clear()
    fit_tfb(tmp_path, lora_bert(), tfb_bound=1e-6)
    assert "sigma_q is at its bound 1e-06" in caplog.text


@pytest.fixture
def trained(tmp_path, monkeypatch):
    quick = ["--demo", "--method", "lora", "--use_cpu", "true", "--compare_base", "false", "--do_train"]
    assert run_script(monkeypatch, GLUE, *quick, "--max_steps", 10, "--output_dir", tmp_path / "lora") == 0
    return tmp_path / "lora"


def command(*arguments):
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.mark.slow
def test_the_command_works_on_an_adapter_from_disk(trained, tmp_path, capsys):
    anchors = demo.CLASSIFICATION_FILES["validation"]
    quick = ["--anchor_file", anchors, "--max_length", 64, "--num_anchors", 60]
    assert command(trained, tmp_path / "tfb", *quick) == 0
    assert "sigma_q = " in capsys.readouterr().out
    loaded = BlobModel.from_pretrained(tmp_path / "tfb")
    mean, before = loaded.eval(), AutoPeftModelForSequenceClassification.from_pretrained(str(trained)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tfb")
    texts = tokenizer(["that is great", "no, not today"], return_tensors="pt", padding=True)
    torch.testing.assert_close(mean(**texts).logits, before(**texts).logits, atol=1e-4, rtol=1e-4)
    # mistakes
    assert command(trained, tmp_path / "tfb", *quick) == 2
    assert "already holds an adapter" in capsys.readouterr().err
    assert command(tmp_path / "tfb", tmp_path / "again", *quick) == 2
    assert "is of method tfb, with samples already" in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert command(trained, tmp_path / "new", "--anchor_file", empty) == 2
    assert "empty.jsonl is empty" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "hi", "label": {label}}}\n' for label in range(3)))
    assert command(trained, tmp_path / "new", "--anchor_file", other) == 2
    assert "unknown class '2' in row 2 of train" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
