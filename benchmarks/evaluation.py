"""Monte Carlo evaluation with S posterior samples relative to S evaluations of plain LoRA, on MiniLM.

    python benchmarks/evaluation.py --samples 10

Rounds alternate between the two; the ratio is that of the medians.
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig
from train_step import MODELS

from blob_hf import BlobConfig, Sampling, get_blob_model, get_lora_model
from blob_hf.inference.predict import repeat_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "tiny"], default="minilm")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, batch, targets = MODELS[args.model]()
    plain = get_lora_model(base, LoraConfig(target_modules=targets, r=8, lora_alpha=8)).eval()
    base, _, _ = MODELS[args.model]()
    blob = get_blob_model(base, BlobConfig(target_modules=targets, r=8, lora_alpha=8)).eval()
    inputs = {"input_ids": batch["input_ids"]}

    def seconds(run) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            run()
        return time.perf_counter() - start

    def lora() -> None:
        for _ in range(args.samples):
            plain(**inputs)

    def samples(per_forward: int) -> None:
        for part in Sampling(args.samples, batch_size=per_forward).batches():
            with blob.posterior_samples(part):
                blob(**repeat_rows(inputs, part.num_samples))

    runs = {
        f"{args.samples} plain LoRA evaluations": lora,
        f"{args.samples} samples, one per forward": lambda: samples(1),
        f"{args.samples} samples, all in one forward": lambda: samples(args.samples),
    }
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(args.rounds + 1)][1:]
    medians = {name: statistics.median(one[name] for one in times) for name in runs}
    reference = next(iter(medians.values()))
    size = " x ".join(map(str, batch["input_ids"].shape))
    print(f"\n{args.model}, batch {size}, {args.rounds} rounds, {args.threads} threads")
    print("| evaluation | seconds | ratio |\n| --- | ---: | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / reference:.3f} |")


if __name__ == "__main__":
    main()
