"""Tiny models of several families, built from configs: no test needs the network."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from blob_hf import BlobConfig, get_blob_model


def tiny_bert(num_labels: int = 3) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, num_labels=num_labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tiny_roberta(num_labels: int = 2) -> RobertaForSequenceClassification:
    config = RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, num_labels=num_labels, pad_token_id=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def tiny_bart(**changes) -> BartForConditionalGeneration:
    sizes = {
        "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    return BartForConditionalGeneration(BartConfig(forced_eos_token_id=None, **{**sizes, **changes})).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


TINY = {"bert": tiny_bert, "roberta": tiny_roberta, "bart": tiny_bart, "t5": tiny_t5, "gpt2": tiny_gpt2}
TARGETS = {
    "bert": ["query", "value", "classifier"],
    "roberta": ["query", "value", "classifier.dense", "classifier.out_proj"],
    "bart": ["q_proj", "k_proj", "v_proj", "lm_head"],
    "t5": ["q", "k", "v"],
    "gpt2": ["c_attn"],
}


def randomize_b(model: torch.nn.Module, scale: float = 0.5) -> None:
    """LoRA's B starts at 0, where A has no effect; give it values so that noise in A is seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=scale)


def random_ids(rows: int, length: int, vocab: int = 60) -> torch.Tensor:
    return torch.randint(4, vocab, (rows, length))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the vocabulary w4 ... w58 and a; 0 pads, 1 stands for any other word, 2 ends a text."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, "[SEP]": 3, **{f"w{i}": i for i in range(4, 59)}, "a": 59}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single="$A [END]", pair="$A [SEP] $B:1 [END]:1", special_tokens=[("[SEP]", 3), ("[END]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", sep_token="[SEP]"
    )


def words(rows: int, longest: int = 9, seed: int = 0) -> list[str]:
    """Texts of that tokenizer, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (rows,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(4, 59, (n,), generator=generator).tolist()) for n in lengths]


def save_word_llama(folder, vocabulary, init_eps, **changes) -> None:
    """A tiny Llama whose tokens are these words (0 pads, 1 is any other, 2 ends), and a BLoB adapter on it, saved."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=2, pad_token_id=0, bos_token_id=None, **changes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = get_blob_model(
        LlamaForCausalLM.from_pretrained(folder / "base"),
        BlobConfig(target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM", init_eps=init_eps),
    )
    randomize_b(model)
    model.save_pretrained(folder / "adapter")
