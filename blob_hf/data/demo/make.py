"""Make the demo's files: `python -m blob_hf.data.demo.make --out DIR` (about 7 minutes on one core).

The backbone is pretrained on dialogues of the same grammar with other seeds: to restore corrupted text, and to answer
questions about a dialogue. It never sees the demo's prompt, nor a reply with its label.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from blob_hf.data.demo.text import Example, examples, replies

SIZES = {"train": 600, "validation": 60, "test": 40}
AMBIGUOUS = 0.25  # share of dialogues that leave a fact open; none in pretraining
REPLY_SIZES = {"train": 1000, "validation": 300}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 1000
LENGTH, BATCH = 128, 32


def write_text(folder: Path, seed: int) -> None:
    """The jsonl files: dialogues (three references each in test) and replies."""
    stream, seen = examples(random.Random(seed), AMBIGUOUS), set()
    for split in ("test", "validation", "train"):
        rows: list[dict[str, Any]] = []
        while len(rows) < SIZES[split] * (3 if split == "test" else 1):
            example = next(stream)
            if example.dialogue in seen:  # no dialogue stands in two splits
                continue
            seen.add(example.dialogue)
            number = len(rows) // 3 if split == "test" else len(rows)
            references = example.summaries if split == "test" else example.summaries[number % 3 : number % 3 + 1]
            for k, summary in enumerate(references, start=1):
                row_id = f"test_{number}_{k}" if split == "test" else f"{split}_{number}"
                rows.append({"id": row_id, "dialogue": example.dialogue, "summary": summary, "topic": example.topic})
        _write_rows(folder / f"dialogues_{split}.jsonl", rows)
    for offset, (split, count) in enumerate(REPLY_SIZES.items(), start=1):
        _write_rows(folder / f"replies_{split}.jsonl", replies(random.Random(seed + offset), count))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BART's special tokens; a pair is `<s> A </s> B </s>`, two </s> in every row."""
    stream = examples(random.Random(seed + 100))
    texts = [text for _ in range(3000) for text in _texts(next(stream))]
    texts += [f"{row['sentence1']} {row['sentence2']}" for row in replies(random.Random(seed + 101), 2000)]
    texts += ["Dialogue:\n\nSummary: Question: Answer:"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        mask_token="<mask>", cls_token="<s>", sep_token="</s>", model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _texts(example: Example) -> list[str]:
    return [example.dialogue, *example.summaries]


def corrupt(text: str, rng: random.Random) -> str:
    """BART's noise on words: spans become one mask, and lines change places."""
    lines = text.split("\n")
    if len(lines) > 1 and rng.random() < 0.5:
        rng.shuffle(lines)
    words = "\n".join(lines).split(" ")
    out: list[str] = []
    while words:
        if rng.random() < 0.12:
            out.append("<mask>")
            del words[: rng.choice([1, 1, 2, 3])]
        else:
            out.append(words.pop(0))
    return " ".join(out)


def pretraining_pair(example: Example, rng: random.Random) -> tuple[str, str]:
    """Source and target of one pretraining example."""
    kind = rng.random()
    if kind < 0.4:
        question, answer = rng.choice(example.questions)
        return f"Question: {question}?\n{example.dialogue}", answer
    if kind < 0.7:
        facts = rng.sample(example.questions, 2)
        asked = " and ".join(question for question, _ in facts)
        return f"Question: {asked}?\n{example.dialogue}", " and ".join(answer for _, answer in facts)
    text = rng.choice(example.summaries) if rng.random() < 0.5 else example.dialogue
    return corrupt(text, rng), text


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> BartForConditionalGeneration:
    """Train the backbone from scratch."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=256, dropout=0.0,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        scale_embedding=True,
    )  # fmt: skip
    config.num_labels = 2  # of the replies, so that loading a classifier needs no further word
    model = BartForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    rng = random.Random(seed + 200)
    stream, start = examples(rng), time.time()
    for step in range(1, steps + 1):
        pairs = [pretraining_pair(next(stream), rng) for _ in range(BATCH)]
        source = tokenizer(
            [pair[0] for pair in pairs], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        target = tokenizer(
            [pair[1] for pair in pairs], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        labels = target.input_ids.masked_fill(target.input_ids == tokenizer.pad_token_id, -100)
        loss = model(**source, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    return model


def _load_as_float32(config_file: Path) -> None:
    """Half the size on disk, but from_pretrained gives float32: CPUs are slow in half precision."""
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder to write to.")
    parser.add_argument("--steps", type=int, default=1000, help="Pretraining steps; 0 makes the text alone.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out, args.seed)
    if args.steps:
        tokenizer = train_tokenizer(args.seed)
        tokenizer.save_pretrained(args.out / "backbone")
        pretrain(tokenizer, args.steps, args.seed).half().save_pretrained(args.out / "backbone")
        _load_as_float32(args.out / "backbone" / "config.json")


if __name__ == "__main__":
    main()
