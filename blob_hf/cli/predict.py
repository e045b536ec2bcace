"""Predict for new texts: `blob predict ADAPTER --input FILE --output FILE`, with what the samples say of its certainty.

The file needs no labels. A classifier's rows have the label, the probabilities and entropies in nats; a summarizer's
the summary of the posterior predictive, those of the samples, and how unsure its tokens are.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, Value
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blob_hf.cli.arguments import OneLineParser
from blob_hf.cli.limits import check_numbers
from blob_hf.cli.terminal import user_errors
from blob_hf.data.loading import load_files, require_columns
from blob_hf.data.summarization import DEFAULT_PROMPT, Prompt
from blob_hf.inference.generate import generate_mean, generate_predictive, generate_samples
from blob_hf.inference.predict import predict_classes
from blob_hf.inference.uncertainty import SEQUENCE_SCORES
from blob_hf.metrics.uncertainty import mutual_information, predictive_entropy
from blob_hf.tuner.adapter_files import resolve
from blob_hf.tuner.base_model import has_task_head
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.posterior import sampling_of
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

Row = dict[str, Any]


def predict_file(args: argparse.Namespace) -> int:
    """Write a JSON line for each row of the input, whole or not at all.

    Returns:
        Number of rows.

    Raises:
        BlobError: The adapter or the file cannot be read, or it is not clear which columns are the texts.
    """
    check_numbers(args)
    sampling = Sampling(args.num_samples, args.seed, batch_size=args.posterior_batch_size)
    data = load_files({"input": args.input})
    columns = args.text_columns or _text_columns(data["input"])
    require_columns(data, columns, "--text_columns")
    folder = resolve(args.adapter)
    model = BlobModel.from_pretrained(folder).eval()
    source = str(folder) if (folder / "tokenizer_config.json").is_file() else str(model.get_base_model().name_or_path)
    with fetching("tokenizer", source, "the adapter's base model"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    make = _classes if has_task_head(model.get_base_model()) else _texts
    sampling = sampling_of(model, sampling)
    batches = data["input"].select_columns(columns).iter(args.batch_size)
    rows: list[Row] = []
    with tqdm(total=len(data["input"]), desc="rows", disable=None) as bar:
        for batch in batches:
            texts = list(zip(*(batch[column] for column in columns), strict=True))
            for text, row in zip(texts, make(model, tokenizer, texts, sampling, args), strict=True):
                rows.append({"index": len(rows), **dict(zip(columns, text, strict=True)), **row})
            bar.update(len(texts))
    files.write_text(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _text_columns(rows: Dataset) -> list[str]:
    texts = [name for name, kind in rows.features.items() if kind in (Value("string"), Value("large_string"))]
    pair = ["sentence1", "sentence2"]
    if set(pair) <= set(texts):
        return pair
    if len(texts) != 1:
        found = ", ".join(rows.column_names)
        raise BlobError(f"which columns are the texts? name them with --text_columns; the file has {found}")
    return texts


def _classes(
    model: BlobModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], sampling: Sampling,
    args: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    encoded = tokenizer(
        *map(list, zip(*texts, strict=True)), truncation=True, max_length=args.max_length, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    found = predict_classes(model, dict(encoded.to(model.device)), sampling)
    samples = found.sample_log_probs.cpu().numpy()
    entropies, epistemic = predictive_entropy(samples), mutual_information(samples)
    config: Any = model.get_base_model().config
    for log_probs, total, own in zip(found.log_probs.cpu(), entropies, epistemic, strict=True):
        probabilities = {config.id2label[index]: value for index, value in enumerate(log_probs.exp().tolist())}
        yield {
            "label": config.id2label[int(log_probs.argmax())],
            "probabilities": probabilities,
            "entropy": float(total),
            "mutual_information": float(own),
        }


def _texts(
    model: BlobModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], sampling: Sampling,
    args: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    base: Any = model.get_base_model()
    if not base.config.is_encoder_decoder:
        raise BlobError(f"blob predict is for classifiers and encoder-decoder models, not for {type(base).__name__}")
    prompts = Prompt(args.prompt).encode([text for text, *_ in texts], tokenizer, args.max_length)
    inputs = dict(tokenizer.pad(prompts, return_tensors="pt").to(model.device))
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    def decoded(tokens: torch.Tensor) -> list[str]:
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    if not sampling.num_samples:
        for summary in decoded(generate_mean(model, inputs, **options)):
            yield {"summary": summary}
        return
    predictive = generate_predictive(model, inputs, sampling, **options)
    drawn = generate_samples(model, inputs, sampling, **options)
    for index, summary in enumerate(decoded(predictive.sequences)):
        scores = dict(zip(SEQUENCE_SCORES, predictive.scores[index].tolist(), strict=True))
        yield {"summary": summary, "samples": decoded(drawn[index]), "uncertainty": scores}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = OneLineParser(
        prog="blob predict", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    own.add_argument("adapter", help="folder or Hub repo of an adapter, of any method")
    own.add_argument("--input", required=True, help="csv, json or jsonl file of texts")
    own.add_argument("--output", required=True, help="JSON Lines file to write")
    own.add_argument("--text_columns", nargs="+", help="one or two columns; default: the only one with text")
    own.add_argument("--num_samples", type=int, default=Sampling.num_samples, help="posterior samples; 0: the mean")
    own.add_argument("--seed", type=int, default=Sampling.seed, help="names the samples")
    own.add_argument("--posterior_batch_size", type=int, help="samples together, to bound memory")
    own.add_argument("--batch_size", type=int, default=16, help="rows together")
    own.add_argument("--max_length", type=int, default=256, help="longest input in tokens")
    own.add_argument("--prompt", default=DEFAULT_PROMPT, help="summarizers: the prompt of the training")
    own.add_argument("--max_new_tokens", type=int, default=128, help="summarizers: longest summary in tokens")
    return own


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors():
        args = parser().parse_args(argv)
        count = predict_file(args)
        print(f"{count} predictions are in {args.output}")
