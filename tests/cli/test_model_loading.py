"""Base models that are refused before their weights are read."""

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from blob_hf.cli.loading import LoadingArguments
from blob_hf.utils.errors import BlobError

SMALL = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_an_encoder_is_not_trained_to_write(tmp_path):
    BertConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(BlobError, match="is an encoder .bert.: its tokens see those that follow"):
        LoadingArguments().load_model(AutoModelForCausalLM, str(tmp_path))
    BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).save_pretrained(tmp_path)
    assert LoadingArguments().load_model(AutoModelForCausalLM, str(tmp_path)).config.is_decoder


def test_a_file_is_no_base_model(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(BlobError, match="it is a file; a folder is needed") as error:
        LoadingArguments().load_config(str(tmp_path / "model-q4.gguf"))
    assert "\n" not in str(error.value)
