import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.models import TARGETS, TINY, random_ids, randomize_b, tiny_bert
from helpers.training import arguments, blob_bert, parameters, rows, trainer
from peft import LoraConfig, PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer

from blob_hf import (
    BlobConfig,
    BlobModel,
    BlobSeq2SeqTrainer,
    BlobSeq2SeqTrainingArguments,
    BlobTrainer,
    get_blob_model,
)
from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.trainer.kl.history import COLUMNS, LOGGED
from blob_hf.trainer.kl.schedule import KLSchedule, kl_cycle_length
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError, NonFiniteLossError

# ----- training --------------------------------------------------------------------------------------------------


def test_the_logged_loss_is_the_nll_and_the_kl_stands_beside_it(tmp_path):
    model = blob_bert()
    kl_before = model.kl_divergence().item()
    run = trainer(tmp_path, model, gamma=8.0)
    run.train()
    table = pd.read_csv(tmp_path / "kl_history.csv")
    assert tuple(table.columns) == COLUMNS and table["step"].tolist() == [1, 2, 3, 4]
    schedule = KLSchedule("geometric", cycle_steps=2)
    assert table["kl_weight"].tolist() == pytest.approx([schedule(step) for step in (1, 2, 3, 4)])
    assert table["kl"][0] == pytest.approx(kl_before, rel=1e-6)
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    for row, entry in zip(table.to_dict("records"), logs, strict=True):
        for name in LOGGED:
            assert entry[name] == pytest.approx(row[name], rel=1e-6)
        assert entry["loss"] == pytest.approx(row["nll"], rel=1e-5)
        assert entry["kl_loss"] == pytest.approx(row["kl_weight"] * row["kl"], rel=1e-6)
        assert row["elbo"] == pytest.approx(row["nll"] + row["kl"])
    assert table["kl"].iloc[-1] < kl_before  # the KL was applied
    trained = next(entry for entry in run.state.log_history if "train_loss" in entry)
    assert trained["train_loss"] == pytest.approx(table["nll"].mean(), rel=1e-5)


def test_cycle_comes_from_gamma_the_examples_and_the_global_batch(tmp_path):
    run = trainer(tmp_path, kl_cycle_steps=None, gamma=6.0, gradient_accumulation_steps=2, max_steps=2)
    run.train()
    assert run.kl.schedule.cycle_steps == kl_cycle_length(24, 6.0, 16)


@pytest.mark.parametrize("kl_gradient", ["decoupled", "loss"])
def test_gradient_accumulation_is_the_same_as_one_large_batch(tmp_path, kl_gradient):
    """1 x 8 against 4 x 2, noise off (eval-mode A): same weights, same logged NLL, KL and loss."""
    finals, tables = [], []
    for accumulation in (1, 4):
        model = blob_bert()
        for layer in gaussian_layers(model).values():
            layer.mean_only = True
        run = trainer(
            tmp_path / str(accumulation), model, per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation, kl_gradient=kl_gradient, kl_schedule="constant", kl_weight=1e-4,
        )  # fmt: skip
        run.train()
        finals.append(parameters(model))
        tables.append(pd.DataFrame([entry for entry in run.state.log_history if "nll" in entry]))
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for column in ("nll", "kl", "kl_weight", "loss"):
        assert tables[0][column].tolist() == pytest.approx(tables[1][column].tolist(), rel=1e-4)


def test_kl_gradient_through_the_loss_is_autograd_on_nll_plus_kl(tmp_path):
    model, truth = blob_bert(), blob_bert()
    data = rows(8)
    run = trainer(
        tmp_path, model, data, max_steps=1, kl_gradient="loss", kl_schedule="constant", kl_weight=1e-3, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    for network in (model, truth):
        for layer in gaussian_layers(network).values():
            layer.mean_only = True
    run.train()
    batch = torch.tensor(data["input_ids"])
    loss = F.cross_entropy(truth(input_ids=batch).logits, torch.tensor(data["labels"]))
    (loss + 1e-3 * truth.kl_divergence()).backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in truth.named_parameters() if p.grad is not None}
    for name, value in parameters(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_plain_lora_is_trained_as_transformers_trainer_does(tmp_path):
    def lora():
        torch.manual_seed(0)
        return get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"]))

    ours, theirs = lora(), lora()
    trainer(
        tmp_path / "a", ours, point_estimate=True, base_dropout=True
    ).train()  # same seed, so the same dropout masks
    Trainer(model=theirs, args=arguments(tmp_path / "b"), train_dataset=rows()).train()
    for name, value in parameters(theirs).items():
        torch.testing.assert_close(parameters(ours)[name], value, msg=name)
    assert not (tmp_path / "a" / "kl_history.csv").exists()


def test_label_smoothing_is_transformers_own(tmp_path):
    model = blob_bert()
    run = trainer(tmp_path, model, label_smoothing_factor=0.2, kl_schedule="none")
    for layer in gaussian_layers(model).values():
        layer.mean_only = True
    batch = {"input_ids": random_ids(4, 8), "labels": torch.tensor([0, 1, 2, 0])}
    run.kl.schedule = KLSchedule("none")
    with no_base_dropout(model):
        loss = run.compute_loss(model.train(), dict(batch))
        expected = run.label_smoother({"logits": model(input_ids=batch["input_ids"]).logits}, batch["labels"])
    torch.testing.assert_close(loss, expected)


def test_several_training_samples_average_their_nlls(tmp_path):
    model = blob_bert(init_eps=0.9)
    randomize_b(model)
    run = trainer(tmp_path, model, train_samples=3)
    batch = {"input_ids": random_ids(4, 8), "labels": torch.tensor([0, 1, 2, 0])}
    model.train()
    torch.manual_seed(1)
    loss = run.compute_loss(model, dict(batch))
    torch.manual_seed(1)
    each = [F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"]) for _ in range(3)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert each[0] != each[1]


@pytest.mark.parametrize("base_dropout", [False, True])
def test_the_backbones_dropout_is_off_unless_wanted(tmp_path, base_dropout):
    seen = []
    model = blob_bert()
    dropout = model.get_base_model().bert.embeddings.dropout
    dropout.register_forward_hook(lambda module, args, output: seen.append(torch.equal(args[0], output)))
    run = trainer(tmp_path, model, base_dropout=base_dropout)
    run.train()
    assert all(seen) is not base_dropout
    assert dropout.p == 0.1


@pytest.mark.parametrize("extra", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_bf16_and_gradient_checkpointing_train(tmp_path, extra):
    model = blob_bert("flipout")
    before = parameters(model)
    run = trainer(tmp_path, model, **extra)
    run.train()
    after = parameters(model)
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in after.values())
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == len(after)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    finals = []
    for checkpointing in (False, True):
        model = blob_bert("flipout", init_eps=0.5)
        randomize_b(model)
        trainer(tmp_path / str(checkpointing), model, gradient_checkpointing=checkpointing).train()
        finals.append(parameters(model))
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, msg=name)


def test_load_best_model_at_end_brings_back_mean_and_std(tmp_path):
    run = trainer(
        tmp_path, blob_bert(init_eps=0.5), max_steps=6, save_strategy="steps", eval_strategy="steps", save_steps=2,
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        learning_rate=0.5,
    )  # fmt: skip
    run.train()
    best = BlobModel.from_pretrained(
        run.state.best_model_checkpoint, model=blob_bert().get_base_model().__class__(run.model.config)
    )
    layers = gaussian_layers(best)
    for name, layer in gaussian_layers(run.model).items():
        torch.testing.assert_close(layers[name].std, layer.std)
        assert torch.equal(layers[name].weight, layer.weight)


def test_a_non_finite_loss_stops_before_the_weights_are_spoiled(tmp_path):
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    original = run._nll

    def nll(model, inputs, count):
        value, outputs = original(model, inputs, count)
        return (value * float("nan") if run.state.global_step == 3 else value), outputs

    run._nll = nll
    with pytest.raises(NonFiniteLossError, match=r"nan at step 4; try a lower learning_rate.*checkpoint-2"):
        run.train()
    assert all(torch.isfinite(value).all() for value in parameters(run.model).values())
    assert (tmp_path / "checkpoint-2" / "posterior_std.safetensors").is_file()


# ----- evaluation ------------------------------------------------------------------------------------------------


def test_evaluation_is_exact_with_a_short_last_batch_and_averages_probabilities(tmp_path):
    model = blob_bert(init_eps=0.9)
    randomize_b(model)
    data = rows(13, seed=1)
    run = trainer(tmp_path, model, per_device_eval_batch_size=8)
    output = run.predict(data, metric_key_prefix="eval")
    log_probs, samples, mean = output.predictions
    assert log_probs.shape == (13, 3) and samples.shape == (13, 3, 3)
    ids, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])
    with torch.no_grad(), model.eval().posterior_samples(3, seed=0):
        probs = model(input_ids=ids.repeat(3, 1)).logits.softmax(-1).view(3, 13, 3)
    np.testing.assert_allclose(np.exp(log_probs), probs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(np.exp(samples), probs.transpose(0, 1), rtol=1e-4)
    exact = F.nll_loss(probs.mean(0).log(), labels).item()
    assert output.metrics["eval_loss"] == output.metrics["eval_nll"] == pytest.approx(exact, rel=1e-5)
    exact_mean = F.cross_entropy(model(input_ids=ids).logits, labels).item()
    assert output.metrics["eval_mean_nll"] == pytest.approx(exact_mean, rel=1e-5)
    assert run.evaluate()["eval_nll"] == pytest.approx(exact, rel=1e-5)


def test_no_eval_samples_is_plain_peft_on_the_saved_mean(tmp_path):
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = get_blob_model(base, BlobConfig(target_modules=TARGETS["bert"]))
    randomize_b(model)
    run = trainer(tmp_path / "run", model, eval_samples=0)
    run.save_model()
    data = rows(13, seed=1)
    found = run.predict(data).predictions[0]
    plain = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "run").eval()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor(data["input_ids"])).logits.log_softmax(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ----- sequence to sequence --------------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(56))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>"
    )


def dialogue_rows(count, labels=True):
    generator = torch.Generator().manual_seed(3)
    data = {"input_ids": [torch.randint(4, 60, (4 + i % 4,), generator=generator).tolist() for i in range(count)]}
    data["attention_mask"] = [[1] * len(row) for row in data["input_ids"]]
    if labels:
        data["labels"] = [[*row[: 2 + i % 3], 2] for i, row in enumerate(data["input_ids"])]
    return Dataset.from_dict(data)


def seq2seq(folder, model, **changes):
    args = vars(arguments(folder))
    defaults = {key: args[key] for key in ("output_dir", "max_steps", "learning_rate", "report_to", "eval_samples")}
    args = BlobSeq2SeqTrainingArguments(
        **{**defaults, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "kl_cycle_steps": 2,
           "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "dataloader_pin_memory": False,
           "logging_steps": 1, **changes}
    )  # fmt: skip
    words = tokenizer()
    return BlobSeq2SeqTrainer(
        model=model, args=args, train_dataset=dialogue_rows(12), eval_dataset=dialogue_rows(7),
        data_collator=DataCollatorForSeq2Seq(words, model=model.get_base_model()), processing_class=words,
    )  # fmt: skip


def blob_seq2seq(family="bart", **config):
    torch.manual_seed(0)
    config = BlobConfig(target_modules=TARGETS[family], task_type="SEQ_2_SEQ_LM", noise="shared", **config)
    model = get_blob_model(TINY[family](), config)
    randomize_b(model)
    return model.eval()


def test_token_nll_is_exact_and_padding_is_not_scored(tmp_path):
    model = blob_seq2seq(init_eps=0.9)
    found = seq2seq(tmp_path, model).evaluate()
    nll = mean_nll = count = 0.0
    for row in dialogue_rows(7):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        shifted = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), labels[:, :-1]], dim=1)
        with torch.no_grad(), model.posterior_samples(3, seed=0):
            logits = model(input_ids=ids.repeat(3, 1), decoder_input_ids=shifted.repeat(3, 1)).logits
        nll -= logits.softmax(-1).mean(0).log()[range(labels.shape[1]), labels[0]].sum().item()
        mean_logits = model(input_ids=ids, decoder_input_ids=shifted).logits[0]
        mean_nll += F.cross_entropy(mean_logits, labels[0], reduction="sum").item()
        count += labels.shape[1]
    assert found["eval_nll"] == found["eval_loss"] == pytest.approx(nll / count, rel=1e-4)
    assert found["eval_mean_nll"] == pytest.approx(mean_nll / count, rel=1e-4)


def test_rows_without_labels_are_generated_one_summary_per_sample(tmp_path):
    model = blob_seq2seq(init_eps=0.9)
    run = seq2seq(tmp_path, model)
    mean, samples = run.predict(dialogue_rows(7, labels=False), max_new_tokens=6).predictions
    assert mean.shape == (7, 7) and samples.shape == (7, 3, 7)
    row = dialogue_rows(7)[5]
    with model.posterior_samples(Sampling(1, seed=0, first=2)):
        alone = model.generate(input_ids=torch.tensor([row["input_ids"]]), max_new_tokens=6)[0]
    assert samples[5, 2, : len(alone)].tolist() == alone.tolist()


def test_predict_with_generate_gives_scores_and_summaries(tmp_path):
    run = seq2seq(tmp_path, blob_seq2seq("t5"), predict_with_generate=True, generation_max_length=6)
    run.compute_metrics = lambda prediction: {"count": len(prediction.predictions)}
    metrics = run.evaluate()
    assert metrics["eval_count"] == 6 and np.isfinite(metrics["eval_nll"])


def test_sequence_training_normalises_by_the_tokens_of_the_whole_batch(tmp_path):
    finals = []
    for accumulation in (1, 4):
        model = blob_seq2seq()
        for layer in gaussian_layers(model).values():
            layer.mean_only = True
        run = seq2seq(
            tmp_path, model, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
        )
        run.train()
        finals.append(parameters(model))
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_causal_models_shift_their_labels(tmp_path):
    torch.manual_seed(0)
    model = get_blob_model(TINY["gpt2"](), BlobConfig(target_modules=TARGETS["gpt2"], task_type="CAUSAL_LM"))
    ids = random_ids(6, 8)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    run = BlobTrainer(model=model, args=arguments(tmp_path, eval_samples=0), train_dataset=data, eval_dataset=data)
    expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert run.evaluate()["eval_nll"] == pytest.approx(expected, rel=1e-5)
    run.train()
    assert run.state.log_history[0]["nll"] > 0


# ----- bad input -------------------------------------------------------------------------------------------------


def test_model_and_method_must_agree(tmp_path):
    lora = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(BlobError, match="needs a model with a posterior"):
        trainer(tmp_path, lora)
    with pytest.raises(BlobError, match="needs plain LoRA"):
        trainer(tmp_path, blob_bert(), point_estimate=True)
    with pytest.raises(BlobError, match=r"got 0.3, but the model was made with prior_std=0.2"):
        trainer(tmp_path, blob_bert(), beta=0.3)


def test_regression_labels_are_refused(tmp_path):
    data = Dataset.from_dict({"input_ids": random_ids(8, 8).tolist(), "labels": [0.5] * 8})
    with pytest.raises(BlobError, match="regression"):
        trainer(tmp_path, data=data).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0}, "beta must be > 0, got 0"),
        ({"gamma": -1}, "gamma must be > 0, got -1"),
        ({"eval_samples": -1}, "eval_samples must be >= 0, got -1"),
        ({"train_samples": 0}, "train_samples must be >= 1"),
        ({"kl_schedule": "cyclic"}, "kl_schedule must be one of auto, geometric"),
        ({"kl_gradient": "both"}, "kl_gradient must be one of decoupled, loss"),
        ({"kl_cycle_steps": 0}, "kl_cycle_steps must be >= 1"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(BlobError, match=message):
        arguments(tmp_path, **change)


def test_history_file_is_plain_csv(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    header, first, *_ = (tmp_path / "kl_history.csv").read_text().splitlines()
    assert header == "step,nll,kl,kl_weight,kl_loss,elbo,posterior_std,lr_scale" and first.startswith("1,")
    assert json.loads(json.dumps(pd.read_csv(tmp_path / "kl_history.csv").to_dict("records")))[0]["step"] == 1
