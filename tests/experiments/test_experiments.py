"""The experiments as a user runs them, on the demo made small."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from helpers.running import run_experiment

from blob_hf.experiments import setup
from blob_hf.experiments.setup import ExperimentArguments, Summarizers

SMALL = ["--demo", "--num_dialogues", "3", "--max_new_tokens", "10"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Both demo adapters, trained for a few steps."""
    folder = tmp_path_factory.mktemp("adapters")
    blob, lora = (setup._train_demo(method, folder / method, max_steps=5) for method in ("blob", "lora"))
    return ["--blob", blob, "--lora", lora]


def sampling(folder, adapters, *more):
    return ["sampling", *SMALL, *adapters, "--num_samples", "4", "--output_dir", str(folder), *more]


def test_experiment_iii(tmp_path, adapters, capsys):
    assert run_experiment(*["mean", *SMALL, *adapters, "--output_dir", tmp_path, "--batch_size", "2"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    for part in ("| ROUGE-L |", "published BLoB", "0.409 +- 0.151", "paired t-test p", "paired bootstrap"):
        assert part in text
    table = pd.read_json(tmp_path / "summaries.jsonl", lines=True)
    assert len(table) == 6 and set(table["arm"]) == {"blob", "lora"} and table["dialogue"].nunique() == 3
    shown = f"{table[table['arm'] == 'blob']['rouge1_max'].mean():.3f}"
    assert f"| ROUGE-1 | {shown} +-" in text


@pytest.mark.slow
def test_experiment_iv(tmp_path, adapters, capsys):
    assert run_experiment(*sampling(tmp_path, adapters)) == 0
    text = (tmp_path / "report.md").read_text()
    for part in ("max over references", "## Comparisons", "| weights |", "| interaction |", "| mbr |"):
        assert part in text
    table = pd.read_json(tmp_path / "samples.jsonl", lines=True)
    assert table.groupby("arm").size().to_dict() == {
        "blob-mean-greedy": 3, "blob-mean-sampling": 12, "blob-sample-greedy": 12, "blob-sample-sampling": 12,
        "lora-greedy": 3, "lora-sampling": 12,
    }  # fmt: skip
    assert not table.duplicated(["dialogue", "arm", "sample"]).any()
    for name in ("density_mean", "density_max", "density_min", "more_samples"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5000
    before = (tmp_path / "samples.jsonl").read_text()
    shutil.rmtree(tmp_path / "units" / "blob-sample-sampling")
    (tmp_path / "units" / "lora-sampling" / "00001.jsonl").unlink()
    assert run_experiment(*sampling(tmp_path, adapters)) == 0
    assert (tmp_path / "samples.jsonl").read_text() == before


def test_other_settings_and_other_mistakes_are_one_line(tmp_path, adapters, capsys):
    arms = ["--arms", "lora-greedy"]
    assert run_experiment(*sampling(tmp_path, adapters, *arms)) == 0
    blob, lora = adapters[1], adapters[3]
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"id": "1", "dialogue": " ", "summary": "x"}) + "\n")
    for arguments, message in (
        (sampling(tmp_path, adapters, *arms, "--seed", "5"), "holds a run of different settings (seed 0 -> 5)"),
        (sampling(tmp_path, adapters, *arms, "--num_samples", "5"), "num_samples 4 -> 5"),
        (sampling(tmp_path / "a", adapters, "--num_samples", "0"), "num_samples must be >= 1, got 0"),
        (sampling(tmp_path / "b", ["--blob", lora, "--lora", lora]), "is an adapter of method lora; exchange it"),
        (
            sampling(tmp_path / "c", ["--blob", blob, "--lora", blob], *arms),
            "is an adapter of method blob; exchange it",
        ),
        (sampling(tmp_path / "d", adapters, "--arms", "blob"), "invalid choice"),
        (sampling(tmp_path / "e", adapters, "--test_file", empty), "dialogue 1 is empty"),
        (["mean", "--output_dir", tmp_path / "f"], "give --blob and --lora"),
        (
            ["nothing"],
            "name an experiment, one of study, active, glue, multiple_choice, sensitivity, mean, sampling, picture; "
            "got nothing",
        ),
        ([], "got nothing"),
    ):
        capsys.readouterr()
        assert run_experiment(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    unit = tmp_path / "units" / "lora-greedy" / "00000.jsonl"
    unit.write_text('{"half')
    assert run_experiment(*sampling(tmp_path, adapters, *arms)) == 2
    assert f"{unit} is damaged; delete it" in capsys.readouterr().err


def test_long_dialogues_are_cut_with_a_count(adapters, caplog):
    args = ExperimentArguments(blob=adapters[1], lora=adapters[3], test_file=setup.DEMO["test_file"], num_dialogues=4)
    dialogues = setup.load_dialogues(args)
    args.max_source_length = 40
    _, prompts = Summarizers(args, dialogues)("blob")
    assert all(len(prompt) <= 40 for prompt in prompts)
    assert "4 of 4 dialogues are longer than 40 tokens and were cut" in caplog.text


def command(folder, adapters, *launcher):
    launcher = launcher or (sys.executable,)
    return [*launcher, "-m", "blob_hf.experiments", *sampling(folder, adapters)]


@pytest.mark.slow
def test_killed_and_resumed_and_on_two_processes_it_is_the_same(tmp_path, adapters):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command(tmp_path / "whole", adapters), env=environment, check=True, capture_output=True)
    for wanted in (3, 9, 14):  # kill -9 when so many units are there
        process = subprocess.Popen(command(tmp_path / "killed", adapters), env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("killed/units/*/*.jsonl"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(tmp_path / "killed", adapters), env=environment, check=True, capture_output=True)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    subprocess.run(command(tmp_path / "two", adapters, *launcher), env=environment, check=True, capture_output=True)
    whole = (tmp_path / "whole" / "samples.jsonl").read_text()
    assert len(whole.splitlines()) == 54
    assert (tmp_path / "killed" / "samples.jsonl").read_text() == whole
    assert (tmp_path / "two" / "samples.jsonl").read_text() == whole
