import pytest
import torch
from helpers.models import TINY, random_ids

from blob_hf.trainer.dropout import no_base_dropout


@pytest.mark.parametrize("family", TINY)
def test_train_mode_without_dropout_is_eval_mode_and_rates_come_back(family):
    model = TINY[family]()
    inputs = {"input_ids": random_ids(3, 8)}
    if family in ("bart", "t5"):
        inputs["decoder_input_ids"] = random_ids(3, 5)
    expected = model(**inputs).logits
    model.train()
    if family == "bart":
        model.model.encoder.layerdrop = 0.9
    assert not torch.equal(model(**inputs).logits, expected)
    with no_base_dropout(model):
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert not torch.equal(model(**inputs).logits, expected)


def test_lora_dropout_stays():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TINY["bert"](), LoraConfig(target_modules=["query"], lora_dropout=0.4)).train()
    with no_base_dropout(model):
        rates = {m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" in n}
        assert rates == {0.4}
