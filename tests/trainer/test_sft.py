"""`BlobSFTTrainer` against TRL's own trainer and against loops over merged samples."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments

pytest.importorskip("trl", reason="needs TRL: pip install 'blob_hf[trl]'")

from helpers.models import randomize_b, words
from helpers.sft import llama, tokenizer
from trl import SFTConfig, SFTTrainer

from blob_hf import BlobConfig, BlobError, BlobModel, BlobSFTConfig, BlobSFTTrainer, Sampling
from blob_hf.tuner.posterior import gaussian_layers, posterior_samples

TARGETS = ["q_proj", "v_proj"]


def pairs(count=12, seed=0):
    prompts, completions = words(count, seed=seed), words(count, seed=seed + 100)
    return Dataset.from_dict({"prompt": [f"{text} " for text in prompts], "completion": completions})


def conversations(count=8):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in pairs(count)
        ]
    )


def texts(count=8):
    return Dataset.from_dict({"text": words(count)})


def settings(folder, **changes):
    defaults = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_length": 32,
    }  # fmt: skip
    return {**defaults, **changes}


def ours(folder, rows=None, model=None, peft_config=None, evaluated=None, **changes):
    point = isinstance(peft_config, LoraConfig) and not isinstance(peft_config, BlobConfig)
    args = BlobSFTConfig(**{"eval_samples": 3, "kl_cycle_steps": 2, **settings(folder, **changes)})
    return BlobSFTTrainer(
        llama() if model is None else model, args, train_dataset=pairs() if rows is None else rows,
        eval_dataset=evaluated, processing_class=tokenizer(), point_estimate=point,
        peft_config=peft_config or BlobConfig(r=4, target_modules=TARGETS, init_eps=0.4, task_type="CAUSAL_LM"),
    )  # fmt: skip


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


FORMS = {
    "completions": (pairs, {}),
    "whole": (pairs, {"completion_only_loss": False}),
    "packed": (pairs, {"packing": True, "max_length": 40, "per_device_train_batch_size": 1}),
    "wrapped": (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
    "assistant": (conversations, {"assistant_only_loss": True}),
    "accumulated": (pairs, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
}


FAST = ("completions", "packed")


@pytest.mark.parametrize("form", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FORMS])
def test_a_point_model_has_the_losses_and_figures_of_trl(tmp_path, form):
    rows, changes = FORMS[form]
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    mine = ours(tmp_path / "ours", rows(), peft_config=lora, **changes)
    mine.train()
    theirs = SFTTrainer(
        llama(), SFTConfig(**settings(tmp_path / "trl", **changes)), train_dataset=rows(),
        processing_class=tokenizer(), peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )  # fmt: skip
    theirs.train()
    for name in ("loss", "mean_token_accuracy", "entropy", "num_tokens", "grad_norm"):
        assert logged(mine, name) == pytest.approx(logged(theirs, name), rel=2e-4, abs=1e-6), name
    assert len(logged(mine, "loss")) == 3


def test_packed_rows_do_not_see_one_another(tmp_path):
    """The loss of one pack of all rows is that of all rows in one batch."""
    losses = []
    for changes in ({"per_device_train_batch_size": 6}, {"packing": True, "max_length": 200}):
        trainer = ours(tmp_path, pairs(6), peft_config=LoraConfig(r=4, target_modules=TARGETS), max_steps=1, **changes)
        trainer.train()
        losses += logged(trainer, "loss")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_moves_the_posterior_and_logs_its_kl(tmp_path):
    trainer = ours(tmp_path, kl_learning_rate=0.01, kl_gradient="decoupled")
    before = {name: layer.rho.detach().clone() for name, layer in gaussian_layers(trainer.model).items()}
    trainer.train()
    assert all(not torch.equal(layer.rho, before[name]) for name, layer in gaussian_layers(trainer.model).items())
    assert len(logged(trainer, "kl")) == 3 and trainer.kl_verdict is not None
    assert "forward" not in vars(trainer.model.get_base_model())


@torch.no_grad()
def _scores(model, whole, prompt):
    """log p of the tokens after a prompt."""
    log_probs = model(input_ids=whole).logits[0, prompt - 1 : -1].log_softmax(-1)
    return log_probs[range(whole.shape[1] - prompt), whole[0, prompt:]]


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_is_that_of_a_loop_over_merged_samples(tmp_path, packing):
    model = get_peft_model(llama(), BlobConfig(r=4, target_modules=TARGETS, init_eps=0.6, task_type="CAUSAL_LM"))
    randomize_b(model)
    rows = pairs(7, seed=3)
    trainer = BlobSFTTrainer(
        model, BlobSFTConfig(**settings(tmp_path, packing=packing, eval_samples=3, per_device_eval_batch_size=4)),
        train_dataset=pairs(), eval_dataset=rows, processing_class=tokenizer(),
    )  # fmt: skip
    found = trainer.evaluate()
    again = trainer.predict(rows, metric_key_prefix="eval").metrics

    made, base = tokenizer(), trainer.model
    predictives, means, samples, count = 0.0, 0.0, 0.0, 0
    for row in rows:
        prompt = made(row["prompt"], return_tensors="pt").input_ids.shape[1]
        whole = made(row["prompt"] + row["completion"] + "[END]", return_tensors="pt").input_ids
        each = []
        for sample in range(3):
            with posterior_samples(base, Sampling(1, first=sample)):
                each.append(_scores(base, whole, prompt))
        predictives -= (torch.stack(each).logsumexp(0) - math.log(3)).sum().item()
        samples -= torch.stack(each).sum(-1).mean().item()
        means -= _scores(base, whole, prompt).sum().item()
        count += whole.shape[1] - prompt
    assert found["eval_nll"] == pytest.approx(predictives / count, rel=1e-4)
    assert found["eval_mean_nll"] == pytest.approx(means / count, rel=1e-4)
    assert found["eval_sample_nll"] == pytest.approx(samples / count, rel=1e-4)
    assert found["eval_perplexity"] == pytest.approx(math.exp(predictives / count), rel=1e-4)
    assert found["eval_mean_perplexity"] == pytest.approx(math.exp(means / count), rel=1e-4)
    assert again["eval_nll"] == pytest.approx(found["eval_nll"], rel=1e-6)
    assert abs(found["eval_nll"] - found["eval_mean_nll"]) > 1e-4  # the samples do something


def test_a_resumed_training_is_the_whole_one(tmp_path):
    whole = ours(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = ours(tmp_path / "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]


def test_the_saved_adapter_has_mean_and_std_and_comes_back(tmp_path):
    trainer = ours(tmp_path, evaluated=pairs(5, seed=9))
    trainer.train()
    expected = trainer.evaluate()
    trainer.save_model()
    means, stds = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / "posterior_std.safetensors")
    assert len(stds) == len([name for name in means if "lora_A" in name]) == 4
    model = BlobModel.from_pretrained(tmp_path, model=llama())
    only = BlobSFTTrainer(model, trainer.args, eval_dataset=pairs(5, seed=9), processing_class=tokenizer())
    found = only.evaluate()
    assert only.train_dataset is None
    assert found["eval_nll"] == pytest.approx(expected["eval_nll"], rel=1e-6)


def test_a_quantised_model_keeps_its_posterior_in_float32(tmp_path):
    """TRL casts what is trained of a model with this mark; the base itself need not be quantised for that."""
    model = get_peft_model(llama(), BlobConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.get_base_model().is_loaded_in_4bit = True
    theirs = []

    class Seen(BlobSFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            theirs.append({p.dtype for p in model.parameters() if p.requires_grad})
            return super()._prepare_dataset(*args, **kwargs)

    trainer = Seen(model, BlobSFTConfig(**settings(tmp_path)), train_dataset=pairs(), processing_class=tokenizer())
    assert theirs[0] == {torch.bfloat16}  # TRL did
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) and parameter.dtype == torch.float32, name


def test_arguments_of_trl_and_transformers_get_blobs_defaults(tmp_path):
    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", learning_rate=3e-3)
    for given in (SFTConfig(**settings(tmp_path, learning_rate=3e-3)), plain):
        trainer = BlobSFTTrainer(
            llama(), given, train_dataset=pairs(), processing_class=tokenizer(),
            peft_config=BlobConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
        )  # fmt: skip
        assert isinstance(trainer.args, BlobSFTConfig)
        assert (trainer.args.learning_rate, trainer.args.gamma, trainer.args.eval_samples) == (3e-3, 8.0, 10)


def _without(name):
    made = tokenizer()
    for one in (name, "eos_token") if name == "pad_token" else (name,):
        setattr(made, one, None)
    return made


def of(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("rows", "made", "targets", "changes", "message"),
    [
        (conversations, lambda: tokenizer(None), TARGETS, {}, "the tokenizer has no chat template"),
        (pairs, lambda: _without("pad_token"), TARGETS, {}, "neither a padding nor an end token"),
        (pairs, lambda: _without("eos_token"), TARGETS, {}, "no end token"),
        (pairs, tokenizer, [*TARGETS, "lm_head"], {}, "no adapter on lm_head"),
        (pairs, tokenizer, TARGETS, {"loss_type": "dft"}, "loss_type must be nll"),
        (pairs, tokenizer, TARGETS, {"class_weights": "balanced"}, "texts have none"),
        (pairs, tokenizer, TARGETS, {"assistant_only_loss": True}, "not conversational"),
        (pairs, tokenizer, TARGETS, {"max_length": 1}, "no row has a token to train within max_length 1"),
        (pairs, tokenizer, TARGETS, {"chat_template_path": "nowhere"}, "chat_template_path must be a Jinja file"),
        (lambda: pairs().rename_columns({"prompt": "question"}), tokenizer, TARGETS, {}, "these have question, compl"),
        (lambda: of(prompt=["a", "b"], completion=["c", None]), tokenizer, TARGETS, {}, "row 2: completion is missing"),
        (lambda: of(prompt=[1], completion=["c"]), tokenizer, TARGETS, {}, "row 1: prompt must be a text or a list of"),
        (lambda: of(text=["a", ""]), tokenizer, TARGETS, {}, "training, row 2: text is empty; leave such rows out"),
        (lambda: of(messages=["hello"]), tokenizer, TARGETS, {}, "row 1: messages must be a list of messages"),
        (lambda: of(messages=[[{"role": "user"}]]), tokenizer, TARGETS, {}, "messages has no content in message 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, rows, made, targets, changes, message):
    with pytest.raises(BlobError, match=message) as caught:
        BlobSFTTrainer(
            llama(), BlobSFTConfig(**settings(tmp_path, **changes)), train_dataset=rows(), processing_class=made(),
            peft_config=BlobConfig(target_modules=targets, task_type="CAUSAL_LM"),
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (of(question=["a"]), "rows need the columns prompt and completion, messages, or text; these have question"),
        (of(prompt=["a", "b"], completion=[None, "c"]), "evaluation, row 1: completion is missing"),
    ],
)
def test_rows_to_evaluate_are_looked_at_as_those_to_train_on(tmp_path, rows, message):
    def trainer(**more):
        return BlobSFTTrainer(
            llama(), BlobSFTConfig(**settings(tmp_path)), train_dataset=pairs(), processing_class=tokenizer(),
            peft_config=BlobConfig(target_modules=TARGETS, task_type="CAUSAL_LM"), **more,
        )  # fmt: skip

    with pytest.raises(BlobError, match=message):
        trainer(eval_dataset=rows)
    with pytest.raises(BlobError, match=message):
        trainer().predict(rows)
