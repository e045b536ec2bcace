"""What each method costs relative to plain PEFT LoRA: training step, training, fit, memory and evaluation, on MiniLM.

    python benchmarks/methods.py --rounds 4

The rows are random tokens, 32 x 64 a batch; every method trains (or is fitted to a LoRA that has been trained) and is
evaluated by the trainer, as in the scripts. Rounds alternate between the methods, so a busy machine slows all of them
alike; times are medians over rounds. Peak memory is the peak resident set of a fresh process that trains, fits and
evaluates once (Linux; the median of three, which still vary by some 5 %).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from train_step import MODELS
from transformers import TrainerCallback

from blob_hf import BlobModel, BlobTrainer, BlobTrainingArguments
from blob_hf.baselines.laplace import library_is_there
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import FittedRoute, Job, Route
from blob_hf.cli.routes import ROUTES

WARM_UP = 2
POST_HOC = [name for name, route in ROUTES.items() if isinstance(route, FittedRoute)]


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step of all trainings."""

    def __init__(self):
        self.seconds, self._start = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > WARM_UP:
            self.seconds.append(time.perf_counter() - self._start)


def rows(count: int) -> Dataset:
    ids = torch.randint(1000, 20000, (count, 64), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


def new_model(route: Route, name: str) -> BlobModel:
    base, _, targets = MODELS[name]()
    lora = {"target_modules": targets, "r": 8, "lora_alpha": 8, "lora_dropout": route.default_dropout}
    return route.fresh_model(base, lora, {})


def run(route: Route, folder: str, args: argparse.Namespace, model: BlobModel | None, times: StepTimes):
    """Train, or fit to a model that has been trained."""
    settings = BlobTrainingArguments(
        output_dir=folder, max_steps=WARM_UP + args.steps, eval_samples=args.samples, report_to="none",
        per_device_train_batch_size=32, per_device_eval_batch_size=32, disable_tqdm=True, save_strategy="no",
        use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    data = rows(args.rows)

    def make_trainer(model: BlobModel, own: BlobTrainingArguments = settings) -> BlobTrainer:
        return BlobTrainer(
            model=model, args=route.arguments(own, data), train_dataset=data, eval_dataset=data.select(range(32)),
            point_estimate=route.name != "blob" and not model.has_posterior, callbacks=[times],
        )  # fmt: skip

    def make_model() -> BlobModel:
        return new_model(route, args.model)

    trainer = make_trainer(model or make_model())
    method_args = MethodArguments(route.name, num_anchors=args.rows // 2)
    return trainer, route.train(Job(settings, method_args, make_model, make_trainer), trainer)


def costs(method: str, args: argparse.Namespace) -> dict[str, float]:
    """Train (and fit) once, evaluate once."""
    with tempfile.TemporaryDirectory() as folder:
        times = StepTimes()
        model = run(ROUTES["lora"], folder, args, None, StepTimes())[0].model if method in POST_HOC else None
        trainer, outcome = run(ROUTES[method], folder, args, model, times)
        start = time.perf_counter()
        trainer.evaluate()
        evaluation = time.perf_counter() - start
    return {
        "parameters": outcome.trained_parameters,
        "trainings": len(times.seconds) / args.steps,
        "step": statistics.median(times.seconds) if times.seconds else float("nan"),
        "fit_rows": outcome.fit_forwards,
        "fit": outcome.fit_runtime,
        "networks": trainer.eval_sampling.num_samples,
        "evaluation": evaluation,
    }


def peak_memory(method: str, args: argparse.Namespace) -> float:
    """Peak resident set in MiB of a fresh process (median of some processes)."""
    command = [sys.executable, __file__, "--memory_of", method]
    for name in ("model", "steps", "samples", "rows", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    count = args.memory_processes
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(count)]
    return statistics.median(json.loads(output.splitlines()[-1]) for output in outputs)


def table(rounds: list[dict[str, dict[str, float]]], memory: dict[str, float]) -> str:
    medians = {
        method: {name: statistics.median(one[method][name] for one in rounds) for name in first}
        for method, first in rounds[0].items()
    }
    lora = medians["lora"]
    lines = [
        "| method | trained parameters | train step | trainings | rows passed to fit | fit, in LoRA steps "
        "| peak memory | networks | evaluation |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, own in medians.items():
        post_hoc = method in POST_HOC
        step = "" if post_hoc else f"{own['step'] / lora['step']:.3f}"
        fit = f"{own['fit_rows']:.0f} | {own['fit'] / lora['step']:.1f}" if post_hoc else " | "
        trainings = "1 (of lora)" if post_hoc else f"{own['trainings']:.0f}"
        lines.append(
            f"| {method} | {own['parameters']:.0f} | {step} | {trainings} | {fit} "
            f"| {memory[method] / memory['lora']:.2f} | {own['networks']:.0f} "
            f"| {own['evaluation'] / lora['evaluation']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="Rounds measured, after one to warm up.")
    parser.add_argument("--steps", type=int, default=5, help=f"Steps timed of a training, after {WARM_UP}.")
    parser.add_argument("--samples", type=int, default=10, help="Networks of an evaluation, but for an ensemble (3).")
    parser.add_argument("--rows", type=int, default=128, help="Rows of the data; TFB's anchors are half of them.")
    parser.add_argument("--model", choices=["minilm", "tiny"], default="minilm")
    parser.add_argument("--methods", nargs="+", choices=list(ROUTES), default=list(ROUTES), help="Beside lora.")
    parser.add_argument("--memory_processes", type=int, default=3, help="Processes whose median memory is shown.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory_of", choices=list(ROUTES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        costs(args.memory_of, args)
        # not ru_maxrss, which a child process inherits from its parent
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(json.dumps(int(peak.split()[1]) / 1024))
        return
    names = ["lora", *(name for name in args.methods if name != "lora")]
    if "laplace" in names and not library_is_there():
        names.remove("laplace")
        print("laplace is left out: pip install laplace-torch")
    rounds = [{method: costs(method, args) for method in names} for _ in range(args.rounds + 1)][1:]
    memory = {method: peak_memory(method, args) for method in names}
    print(f"\n{args.model}, batch 32 x 64, {args.rows} rows, {args.rounds} rounds, {args.threads} threads")
    print(f"ratios to lora: {statistics.median(one['lora']['step'] for one in rounds):.3f} s a step")
    print(table(rounds, memory))


if __name__ == "__main__":
    main()
