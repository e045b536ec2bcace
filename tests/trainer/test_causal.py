"""Causal models: what of training and sampling depends on the base's precision, and what does not on recomputation."""

import pytest
import torch
from datasets import Dataset
from helpers.models import randomize_b
from helpers.training import arguments, parameters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from blob_hf import BlobConfig, BlobTrainer, Sampling, get_blob_model, predict_classes
from blob_hf.inference.choices import ChoiceCollator, ChoiceScoring
from blob_hf.inference.cut_head import cut_head

LETTERS = (11, 7, 40)
COLLATE = ChoiceCollator(0, "letter")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def blob(base=None, targets=("q_proj", "v_proj", "lm_head"), **config):
    torch.manual_seed(1)
    lora = {"target_modules": list(targets), "task_type": "CAUSAL_LM", "noise": "shared"}
    model = get_blob_model(base or llama(), BlobConfig(**lora, **config))
    scoring = ChoiceScoring("letter", LETTERS)
    model.set_companion(scoring), scoring.attach(model, None)
    return model


def rows():
    ids = torch.randint(1, 64, (16, 9), generator=torch.Generator().manual_seed(2)).tolist()
    shorter = [row[: 4 + place % 5] for place, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": shorter, "num_choices": [3] * 16, "labels": [row[0] % 3 for row in ids]})


def train(folder, model, **changes):
    args = arguments(folder, max_steps=3, remove_unused_columns=False, seed=3, **changes)
    run = BlobTrainer(model, args, COLLATE, rows(), rows())
    run.train()
    return run


def test_gradient_checkpointing_trains_as_without(tmp_path):
    """The same noise is drawn again in the backward pass, and the head is cut in both."""
    plain, checkpointed = blob(init_eps=0.5), blob(init_eps=0.5)
    before = parameters(plain)
    train(tmp_path / "plain", plain)
    train(tmp_path / "checkpointed", checkpointed, gradient_checkpointing=True)
    assert checkpointed.get_base_model().model.gradient_checkpointing
    found = parameters(checkpointed)
    for name, value in parameters(plain).items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("quantised_head", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains_scores_and_writes(tmp_path, bits, quantised_head):
    """bitsandbytes on the CPU. A head that it leaves as it is, the default, is cut; one that it quantises is whole."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    # without a threshold for outliers, which are those of a batch, rows do not influence each other
    options = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    if quantised_head:
        options["llm_int8_skip_modules"] = ["nothing"]
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    assert ("bit" in type(base.lm_head).__name__) == quantised_head
    model = blob(base, init_eps=0.9)
    before = parameters(model)
    assert train(tmp_path / "run", model).evaluate()["eval_nll"] < 5
    for name, value in parameters(model).items():
        assert value.dtype == torch.float32 and not torch.equal(value, before[name]), name
    randomize_b(model.eval())
    inputs = COLLATE([{**row, "labels": None} for row in rows().select(range(3)).to_list()])
    together = predict_classes(model, dict(inputs), Sampling(3, batch_size=3)).sample_log_probs
    written = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], sampling=3, max_new_tokens=3,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    with cut_head(model, LETTERS) as cut, torch.no_grad():
        model(input_ids=inputs["input_ids"])
    assert cut.done is not quantised_head
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for s in range(3):
        with torch.no_grad(), model.posterior_samples(Sampling(1, first=s)):
            ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            logits = model(**ids, position_ids=places).logits[:, -1, list(LETTERS)]
            torch.testing.assert_close(together[:, s], logits.log_softmax(-1), rtol=1e-3, atol=1e-3)
            alone = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(written.unflatten(0, (-1, 3))[:, s], alone)


def test_a_batch_whose_texts_were_cut_before_their_targets_has_no_loss_and_ends_nothing(tmp_path):
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 6] * 2 + ids[2:]})
    torch.manual_seed(1)
    model = get_blob_model(llama(), BlobConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", noise="shared"))
    args = arguments(tmp_path, max_steps=4, per_device_train_batch_size=1)  # each text once
    run = BlobTrainer(model, args, train_dataset=data)
    run.train()
    nlls = sorted(row["nll"] for row in run.kl.history.rows)
    assert nlls[:2] == [0, 0] and 0 < nlls[2] < nlls[3] < 10
