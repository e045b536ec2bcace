"""Scoring multiple choice: S posterior samples in one batch against S plain passes, and the cut head against the whole.

    python benchmarks/scoring.py --samples 10

An untrained Llama (d 512, 4 layers, a vocabulary of 32,000, LoRA on q, v and lm_head as published) answers questions of
five choices, by letters and by texts. Rounds alternate; ratios are those of the medians, on one CPU thread of the
process's own seconds, so that a machine that is busy with others does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model, get_lora_model
from blob_hf.inference import cut_head
from blob_hf.inference.choices import ChoiceCollator, ChoiceScoring
from blob_hf.inference.predict import repeat_rows, sample_outputs

CHOICES = 5
Runs = dict[str, Callable[[], object]]


def llama(tiny: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    if tiny:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000 if tiny else 32000, **sizes))


def batch(scoring: str, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Random questions; a choice's text is of four tokens."""
    draw = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        return torch.randint(5, 1000, (length,), generator=draw).tolist()

    made = []
    for _ in range(rows):
        row = {"input_ids": ids(), "num_choices": CHOICES, "labels": None}
        if scoring == "text":
            row |= {"input_ids": [ids() for _ in range(CHOICES)], "choice_tokens": [4] * CHOICES}
            row |= {"choice_lengths": [4.0] * CHOICES}
        made.append(row)
    return {name: value.to(device) for name, value in ChoiceCollator(0, scoring)(made).items()}


def scoring_runs(plain: BlobModel, blob: BlobModel, inputs: dict[str, torch.Tensor], scoring: str, count: int) -> Runs:
    """S passes of plain LoRA and of S samples, over the same questions."""

    @torch.no_grad()
    def once(rows: dict[str, torch.Tensor]) -> None:
        plain(**rows)

    def passes() -> None:
        for _ in range(count):
            once(inputs)

    def samples(per_forward: int) -> None:
        with torch.no_grad():
            for _ in sample_outputs(blob, inputs, Sampling(count, batch_size=per_forward)):
                pass

    return {
        f"{scoring}: {count} passes of plain LoRA": passes,
        f"{scoring}: one pass of plain LoRA, {count} times the rows": lambda: once(repeat_rows(inputs, count)),
        f"{scoring}: {count} samples, one a forward": lambda: samples(1),
        f"{scoring}: {count} samples, all in one forward": lambda: samples(count),
    }


def head_runs(blob: BlobModel, inputs: dict[str, torch.Tensor]) -> tuple[Runs, Runs]:
    """A pass and a step with the whole head, as if it could not be cut, and with the cut one."""
    labels = torch.zeros(len(inputs["num_choices"]), dtype=torch.long, device=inputs["num_choices"].device)

    def forward() -> None:
        with torch.no_grad():
            blob(**inputs)

    def step() -> None:
        torch.nn.functional.cross_entropy(blob(**inputs).logits, labels).backward()
        blob.zero_grad()

    def whole(run: Callable[[], None]) -> None:
        with mock.patch.object(cut_head, "parts_of_head", lambda head: "it is measured whole"):
            run()

    def of(name: str, run: Callable[[], None]) -> Runs:
        return {f"letter: {name}, the whole head": lambda: whole(run), f"letter: {name}, the head cut": run}

    return of("a pass", forward), of("forward and backward", step)


def measure(runs: Runs, rounds: int, device: str, clock: Callable[[], float]) -> None:
    """Print the medians of alternating rounds, and their ratios to the first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    medians = {name: statistics.median(one[1:]) for name, one in times.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {median / next(iter(medians.values())):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8, help="questions in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of a question, with a choice's text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the base weights")
    parser.add_argument("--tiny", action="store_true", help="a model not worth measuring: to see that this runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lora = {"target_modules": ["q_proj", "v_proj", "lm_head"], "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    bases = [llama(args.tiny).to(args.device, getattr(torch, args.dtype)) for _ in range(2)]
    plain = get_lora_model(bases[0], LoraConfig(**lora)).eval()
    blob = get_blob_model(bases[1], BlobConfig(**lora)).eval()
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    print(f"{args.rows} questions of {args.length} tokens, {CHOICES} choices, {args.device}, {args.threads} thread(s)")
    print("| scoring | seconds | ratio |\n| --- | ---: | ---: |")
    for scoring in ("letter", "text"):
        how = ChoiceScoring(scoring, tuple(range(5, 5 + CHOICES)) if scoring == "letter" else (0,) * CHOICES)
        plain.set_companion(how), blob.set_companion(how)
        inputs = batch(scoring, args.rows, args.length, args.device)
        measure(scoring_runs(plain, blob, inputs, scoring, args.samples), args.rounds, args.device, clock)
        for runs in head_runs(blob, inputs) if scoring == "letter" else ():
            measure(runs, args.rounds, args.device, clock)


if __name__ == "__main__":
    main()
