"""Losses of the user's own, by overriding `compute_loss` or as `compute_loss_func`: the KL must not depend on them."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.models import TARGETS, randomize_b, tiny_bart, tiny_bert
from helpers.training import arguments, blob_bert, parameters, rows
from peft import LoraConfig
from torch import nn
from transformers import Trainer

from blob_hf import BlobConfig, BlobSeq2SeqTrainer, BlobSeq2SeqTrainingArguments, BlobTrainer, get_blob_model
from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.utils.errors import BlobError, NonFiniteLossError


class Recipe(BlobTrainer):
    """As the documentation of transformers' Trainer shows it."""

    weight = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(weight=self.weight)(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class OfOutputs(BlobTrainer):
    """Calls ours for the outputs alone."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return F.cross_entropy(outputs.logits, inputs["labels"])


class OwnStep(BlobTrainer):
    """Replaces the whole micro-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = F.cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def mean_nll(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def focal(outputs, labels, num_items_in_batch=None):
    nll = F.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).sum() / num_items_in_batch


def train(folder, kind=BlobTrainer, func=None, **changes):
    """A training with plain SGD, which does not magnify the last bit as Adam does, and a KL that is heard."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "kl_schedule": "adaptive", "kl_cycle_steps": None, "kl_pull": 0.5}
    run = kind(
        model=blob_bert(init_eps=0.5), args=arguments(folder, **{**settings, **changes}), train_dataset=rows(),
        eval_dataset=rows(13, seed=1), compute_loss_func=func,
    )  # fmt: skip
    run.train()
    return run


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "accumulated"])
def ours(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("ours"), gradient_accumulation_steps=request.param)


@pytest.mark.parametrize(
    ("kind", "func"), [(Recipe, None), (OwnStep, None), (BlobTrainer, mean_nll)], ids=["recipe", "step", "func"]
)
def test_the_same_loss_by_another_way_is_the_same_training(tmp_path, ours, kind, func):
    """Weights, rho among them, the history with its adaptive weights, the log, the verdict."""
    found = train(tmp_path, kind, func, gradient_accumulation_steps=ours.args.gradient_accumulation_steps)
    before, moved = parameters(blob_bert(init_eps=0.5)), parameters(found.model)
    for name, value in parameters(ours.model).items():
        torch.testing.assert_close(moved[name], value, rtol=1e-6, atol=1e-6, msg=name)
        assert ".rho" not in name or not torch.equal(value, before[name])
    columns = pd.DataFrame(found.kl.history.rows), pd.DataFrame(ours.kl.history.rows)
    assert len(columns[0]) == 4 and columns[1]["kl_weight"].iloc[1:].min() > 0
    pd.testing.assert_frame_equal(*columns, rtol=1e-5)
    assert found.kl_verdict.name == ours.kl_verdict.name
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (found, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found.evaluate()["eval_nll"] == pytest.approx(ours.evaluate()["eval_nll"], rel=1e-5)


def test_the_kl_step_follows_a_loss_of_ones_own(tmp_path):
    """One step against torch's SGD on the weighted loss, and then the KL's own step."""
    weight = torch.tensor([1.0, 3.0, 0.5])
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "kl_learning_rate": 1e-3}
    settings |= {"kl_schedule": "constant", "kl_weight": 0.5, "kl_pull": None}
    truth = blob_bert(init_eps=0.5)
    run = train(tmp_path, type("Weighted", (Recipe,), {"weight": weight}), **settings)
    data = next(iter(run.get_train_dataloader()))
    moved, values = parameters(run.model), dict(truth.named_parameters())
    assert run.kl.history.rows[0]["kl_weight"] == 0.5
    # B is 0 at first, so that neither the noise nor A is in the gradient yet: A moves by the KL alone
    with no_base_dropout(truth):
        logits = truth.train()(input_ids=data["input_ids"]).logits
    nll = nn.CrossEntropyLoss(weight=weight)(logits, data["labels"])
    assert run.kl.history.rows[0]["nll"] == pytest.approx(nll.item(), rel=1e-5)
    for layer in gaussian_layers(truth).values():
        trained = (layer.weight, layer.rho)
        for parameter, gradient in zip(trained, torch.autograd.grad(layer.kl(0.2), trained), strict=True):
            name = next(name for name, value in values.items() if value is parameter)
            torch.testing.assert_close(moved[name], parameter - 1e-3 * 0.5 * gradient, rtol=1e-5, atol=1e-7, msg=name)


THROUGH = {"kl_gradient": "loss", "kl_pull": None, "kl_schedule": "uniform", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("kind", [Recipe, OfOutputs, OwnStep])
def test_a_kl_that_never_reaches_the_loss_is_refused(tmp_path, kind):
    before = parameters(blob_bert(init_eps=0.5))
    run = kind(blob_bert(init_eps=0.5), arguments(tmp_path, **THROUGH), train_dataset=rows())
    with pytest.raises(BlobError, match=f"of {kind.__name__} leaves it out: .*kl_gradient='decoupled'"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in parameters(run.model).items())


def test_a_function_leaves_the_kl_in_the_loss(tmp_path):
    found, ours = (train(tmp_path, func=func, **THROUGH) for func in (mean_nll, None))
    for name, value in parameters(ours.model).items():
        torch.testing.assert_close(parameters(found.model)[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_plain_trainer_with_this_function_trains_the_same_lora(tmp_path):
    def lora():
        torch.manual_seed(0)
        model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"]))
        randomize_b(model, 0.1)
        return model

    settings = {"base_dropout": True, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.3}
    ours, theirs = lora(), lora()
    for model, trainer, options in ((ours, BlobTrainer, {"point_estimate": True}), (theirs, Trainer, {})):
        args = arguments(tmp_path / trainer.__name__, **settings)
        trainer(model=model, args=args, train_dataset=rows(), compute_loss_func=focal, **options).train()
    for name, value in parameters(theirs).items():
        torch.testing.assert_close(parameters(ours)[name], value, msg=name)


def test_the_function_gets_the_batch_as_it_is(tmp_path):
    """Raw labels, the model's decoder inputs, the count of the whole step; in evaluation it is not asked."""
    torch.manual_seed(0)
    model = get_blob_model(tiny_bart(), BlobConfig(target_modules=TARGETS["bart"], task_type="SEQ_2_SEQ_LM"))
    calls = []

    def func(outputs, labels, num_items_in_batch=None):
        calls.append((labels, num_items_in_batch))
        return outputs.logits.square().mean()

    args = BlobSeq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    run = BlobSeq2SeqTrainer(model, args, compute_loss_func=func)
    ids, labels = torch.randint(4, 60, (2, 5)), torch.tensor([[5, 6, 2], [7, 2, -100]])
    batch = {"input_ids": ids, "labels": labels}
    with no_base_dropout(model):
        for layer in gaussian_layers(model).values():
            layer.mean_only = True
        loss, outputs = run.compute_loss(model.train(), dict(batch), return_outputs=True, num_items_in_batch=5)
        expected = model(input_ids=ids, labels=labels).logits
    torch.testing.assert_close(outputs.logits, expected)
    assert calls[0] == (labels, 5) and loss.item() == pytest.approx(expected.square().mean().item())
    nll = run.compute_loss(model.eval(), dict(batch))
    assert len(calls) == 1 and nll.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_mistakes(tmp_path):
    args = arguments(tmp_path, class_weights="balanced")
    with pytest.raises(BlobError, match="leave one of them out"):
        BlobTrainer(blob_bert(), args, train_dataset=rows(), compute_loss_func=focal)
    broken = type("Broken", (Recipe,), {"weight": torch.full((3,), float("nan"))})
    run = broken(blob_bert(), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(NonFiniteLossError, match="nan at step 1"):
        run.train()


def test_labels_that_only_the_own_loss_knows(tmp_path):
    """Many labels a row: trained, and judged by the weights alone."""

    class ManyLabels(BlobTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            return F.binary_cross_entropy_with_logits(model(**inputs).logits, labels)

    data = rows().map(lambda row: {"labels": [float(row["labels"] == 0), 1.0, 0.0]})
    run = ManyLabels(blob_bert(), arguments(tmp_path, max_steps=2), train_dataset=data)
    run.train()
    assert len(run.kl.history.rows) == 2 and run.kl_verdict.figures.sample_gap is None
