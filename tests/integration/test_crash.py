"""A run that is killed at random points and resumed ends as if it had never stopped, to the last bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blob_hf.trainer.checkpoints import find_corruption, newest_complete

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--demo", "--do_train", "--max_steps", "40", "--save_steps", "2", "--logging_steps", "5", "--use_cpu", "true",
    "--kl_cycle_steps", "7", "--lora_dropout", "0.1", "--compare_base", "false", "--std_parameterization", "softplus",
]  # fmt: skip


def start(folder, *more):
    command = [sys.executable, ROOT / "run_glue_blob.py", *OPTIONS, "--output_dir", folder, *more]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def step_of(checkpoint):
    return 0 if checkpoint is None else int(Path(checkpoint).name.removeprefix("checkpoint-"))


def kill_after(process, folder, step, delay):
    """kill -9 some time after a checkpoint of at least `step` has appeared; whether the run was still going."""
    while process.poll() is None:
        if any(step_of(path) >= step for path in folder.glob("checkpoint-*")):
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_random_points_and_resumed(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    folder, chance, kills = tmp_path / "killed", random.Random(7), 0
    for step in (2, 12, 24):
        resume = ["--resume_from_checkpoint", "true"] if newest_complete(folder) else []
        kills += kill_after(start(folder, *resume), folder, step, chance.uniform(0, 0.25))
        for checkpoint in folder.glob("checkpoint-*"):  # except one whose deletion was cut short
            assert find_corruption(checkpoint) is None or step_of(checkpoint) < step_of(newest_complete(folder))
    assert kills == 3 and 24 <= step_of(newest_complete(folder)) < 40
    last = start(folder, "--resume_from_checkpoint", "true")
    assert last.wait() == 0, last.stderr.read()
    for name in ("adapter_model.safetensors", "posterior_std.safetensors", "kl_history.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
