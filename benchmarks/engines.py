"""Seconds per step and memory per process of each engine, for a BERT large enough to see what is sharded.

    python benchmarks/engines.py --layers 12 --hidden 1024

Each engine is a fresh run of `--processes` processes with one thread each on the CPU (gloo); the parameters are
those that a process holds after the last step. The resident set on a CPU also has what the allocator keeps of gathered
parameters. The global batch is the same for all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from blob_hf import BlobConfig, BlobTrainer, BlobTrainingArguments, get_blob_model
from blob_hf.trainer.engines import shutdown

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ["ddp", "zero1", "zero2", "zero3"]
GLOBAL_BATCH = 8


class Meter(TrainerCallback):
    """Time of each step, and the memory after it."""

    def __init__(self):
        self.times, self.memory = [time.perf_counter()], 0

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())
        self.memory = psutil.Process().memory_info().rss


def worker(args):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8,
        intermediate_size=4 * args.hidden, num_labels=2,
    )  # fmt: skip
    model = get_blob_model(BertForSequenceClassification(config), BlobConfig(target_modules=["query", "value"]))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    training_args = BlobTrainingArguments(
        args.out, per_device_train_batch_size=GLOBAL_BATCH // processes, max_steps=args.steps, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=100, dataloader_pin_memory=False,
        kl_cycle_steps=3, deepspeed=str(ROOT / "ds_configs" / f"{args.worker}.json") if "zero" in args.worker else None,
    )  # fmt: skip
    ids = torch.randint(5, 1000, (64, 64))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    meter = Meter()
    trainer = BlobTrainer(model=model, args=training_args, train_dataset=data, callbacks=[meter])
    trainer.train()
    steps = [b - a for a, b in zip(meter.times[2:-1], meter.times[3:], strict=True)]
    found = {"seconds": sorted(steps)[len(steps) // 2], "memory": meter.memory}
    base = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    # what a process keeps between steps: under ZeRO-3 its shard, the parameter itself is then empty
    held = sum(p.nbytes + (p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else 0) for p in model.parameters())
    Path(args.out, f"{training_args.process_index}.json").write_text(
        json.dumps({**found, "parameters": base, "held": held})
    )
    shutdown(trainer.accelerator)


def measure(args, engine, processes):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [__file__, "--worker", engine, "--out", folder]
        command += ["--layers", str(args.layers), "--hidden", str(args.hidden), "--steps", str(args.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{engine} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("[0-9].json"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    print("| engine | processes | seconds per step | speed against one | parameters held (MiB) | resident set (MiB) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    alone = None
    for engine, processes in [("one process", 1), *((engine, args.processes) for engine in args.engines)]:
        rows = measure(args, engine, processes)
        seconds = max(row["seconds"] for row in rows)
        alone = alone or seconds
        memory = max(row["memory"] for row in rows) / 2**20
        held = max(row["held"] for row in rows) / 2**20
        speed = f"{seconds:.2f} | {alone / seconds:.2f}x"
        print(f"| {engine} | {processes} | {speed} | {held:.0f} | {memory:.0f} |", flush=True)
    print(f"{rows[0]['parameters'] / 1e6:.0f} million parameters in float32, global batch {GLOBAL_BATCH} x 64 tokens")


if __name__ == "__main__":
    main()
