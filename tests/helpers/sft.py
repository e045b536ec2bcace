"""A tiny Llama and a tokenizer with a chat template, for supervised fine-tuning."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}[SEP] {{ message['role'] }} "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} [END] {% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[SEP] assistant {% endif %}"
)


def tokenizer(template=CHAT):
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, "[SEP]": 3, **{f"w{i}": i for i in range(4, 59)}, "assistant": 59}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", sep_token="[SEP]"
    )
    made.chat_template = template
    return made


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)
