import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from blob_hf import cli
from blob_hf.cli.folders import LOCK_FILE, SETTINGS_FILE, release_locks
from blob_hf.cli.published import PublishedDefaults
from blob_hf.cli.routes import ROUTES
from blob_hf.trainer.checkpoints import seal
from blob_hf.trainer.training_args import BlobTrainingArguments
from blob_hf.utils.errors import BlobError


@dataclass
class Data:
    file: str | None = None
    columns: list[str] | None = None
    demo: bool = field(default=False)


@dataclass
class TrainingArguments(PublishedDefaults, BlobTrainingArguments):
    """As a script has them."""


TYPES = (Data, BlobTrainingArguments)
DEMO = {"file": "demo.jsonl", "max_steps": 7}


def parse(*argv):
    return cli.parse_arguments(TYPES, DEMO, "test", argv)


def test_demo_sets_defaults_that_explicit_flags_override():
    data, args = parse("--demo", "--max_steps", "3")
    assert (data.file, args.max_steps) == ("demo.jsonl", 3)
    data, args = parse()
    assert (data.file, args.max_steps) == (None, -1)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_is_the_same_as_the_flags(tmp_path, kind):
    path = tmp_path / f"config.{kind}"
    config = {"demo": True, "columns": ["a", "b"], "learning_rate": 5e-4, "beta": 0.3, "do_train": True, "fp16": False}
    text = json.dumps(config) if kind == "json" else "".join(f"{k}: {v}\n" for k, v in config.items())
    path.write_text(text.replace("0.0005", "5e-4"))  # YAML reads 5e-4 as a text
    data, args = parse(str(path))
    assert (data.file, data.columns, data.demo) == ("demo.jsonl", ["a", "b"], True)
    assert (args.learning_rate, args.beta, args.do_train, args.max_steps) == (5e-4, 0.3, True, 7)


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "must map argument names"), ("{", "cannot read the configuration")]
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(BlobError, match=message):
        parse(str(path))
    with pytest.raises(BlobError, match="cannot read the configuration"):
        parse(str(tmp_path / "gone.yaml"))


def test_unknown_names_and_values():
    with pytest.raises(BlobError, match="no_such_flag"):
        parse("--no_such_flag", "1")
    with pytest.raises(BlobError, match="invalid choice: 'cyclic'"):
        parse("--kl_schedule", "cyclic")
    with pytest.raises(BlobError, match="beta must be > 0, got -1"):
        parse("--beta", "-1")


def test_errors_are_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_, cli.user_errors():
        raise BlobError("this is wrong; do that")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: this is wrong; do that\n"


def training(folder, **changes):
    return BlobTrainingArguments(str(folder), report_to="none", use_cpu=True, do_train=True, **changes)


@pytest.fixture
def claim():
    """Claims a folder for one run after another."""

    def one(args, *others, fresh=False):
        release_locks()
        return cli.claim_output_dir(args, fresh, *others)

    yield one
    release_locks()


def finish(folder):
    (folder / "adapter_config.json").write_text("{}")


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_text("x")
    seal(path)
    return path


def test_a_folder_of_different_settings_is_not_overwritten(tmp_path, claim):
    def args(**changes):
        return training(tmp_path, **{"beta": 0.2, **changes})

    claim(args(), Data("x")).settle()
    finish(tmp_path)
    before = (tmp_path / SETTINGS_FILE).read_text()
    claim(args(logging_steps=3), Data("x"))  # only shows more
    for changed, data, name in (
        (args(beta=0.3), Data("x"), "beta 0.2 -> 0.3"),
        (args(), Data("y"), "file 'x' -> 'y'"),
    ):
        with pytest.raises(BlobError, match=f"{name}.*choose another --output_dir"):
            claim(changed, data)
    assert (tmp_path / SETTINGS_FILE).read_text() == before


def test_a_start_that_failed_leaves_the_folder_free(tmp_path, claim):
    folder = tmp_path / "new"
    claim(training(folder))  # and fails before it settles
    release_locks()
    assert not folder.exists()
    claim(training(folder)).settle()  # and fails in its first step: nothing is there to lose
    claim(training(folder, learning_rate=0.1)).settle()
    assert json.loads((folder / SETTINGS_FILE).read_text())["learning_rate"] == 0.1


def test_an_unfinished_run_is_gone_on_with_or_left_alone(tmp_path, claim, caplog):
    claim(training(tmp_path)).settle()
    newest = checkpoint(tmp_path, 20)
    with pytest.raises(BlobError, match=f"{newest} is of a run .* add --resume_from_checkpoint true .* or choose"):
        claim(training(tmp_path))
    for resume in ("true", str(newest)):
        claim(training(tmp_path, resume_from_checkpoint=resume))
    with pytest.raises(BlobError, match="nowhere, is not a folder"):
        claim(training(tmp_path, resume_from_checkpoint="nowhere"))
    finish(tmp_path)
    claim(training(tmp_path))
    assert "finished run of these settings, which is now trained anew" in caplog.text
    (newest / "weights").write_text("damaged")  # nothing to resume from is nothing to lose
    (tmp_path / "adapter_config.json").unlink()
    claim(training(tmp_path))


def test_two_runs_do_not_write_to_one_folder(tmp_path, claim):
    code = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / LOCK_FILE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    for args in (training(tmp_path), BlobTrainingArguments(str(tmp_path), use_cpu=True, do_eval=True)):
        with pytest.raises(BlobError, match="another run is writing to .* at this moment"):
            claim(args)
    other.kill()
    other.wait()
    assert (tmp_path / LOCK_FILE).exists()  # a stale one is none
    claim(training(tmp_path)).settle()


def test_ctrl_c_names_the_newest_checkpoint_and_how_to_go_on(tmp_path, claim, capsys):
    for make, said in ((None, "no checkpoint is complete yet"), (7, "checkpoint-7 is complete")):
        claim(training(tmp_path)).settle()
        if make:
            checkpoint(tmp_path, make)
        with pytest.raises(SystemExit) as exit_, cli.user_errors():
            raise KeyboardInterrupt
        (line,) = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 130 and line.startswith("error: interrupted; ") and said in line


def test_a_full_disk_is_one_line(capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/plots/kl.png")
    for error in (full, Exception("No space left on device (os error 28)")):  # tokenizers has the words alone
        with pytest.raises(SystemExit) as exit_, cli.user_errors():
            raise error
        (line,) = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2 and "No space left on device" in line and "make room" in line
    with pytest.raises(KeyError), cli.user_errors():
        raise KeyError("a bug stays one")


def test_how_a_fitted_adapter_predicts_does_not_make_it_another_run(tmp_path, claim):
    args = training(tmp_path)
    claim(args, cli.MethodArguments("laplace"), fresh=True).settle()
    finish(tmp_path)
    claim(args, cli.MethodArguments("laplace", laplace_predictive="sampled"), fresh=True)
    assert json.loads((tmp_path / SETTINGS_FILE).read_text())["beta"] == 0.2  # of a fresh adapter, settled
    with pytest.raises(BlobError, match="laplace_subset 'all' -> 'last_layer'"):
        claim(args, cli.MethodArguments("laplace", laplace_subset="last_layer"), fresh=True)


def test_a_folder_of_unknown_origin_is_not_overwritten(tmp_path, claim):
    finish(tmp_path)
    with pytest.raises(BlobError, match="settings are unknown"):
        claim(training(tmp_path))


def test_all_of_it_runs_by_default_and_folders_are_named_after_settings(tmp_path):
    def parsed(*argv):
        _, args = cli.parse_arguments((Data, TrainingArguments), DEMO, "test", argv)
        return args, cli.with_output_dir(args, ROUTES["blob"].folder_name("rte", args), None)

    given, args = parsed("--beta", "0.2")
    assert (args.do_train, args.do_eval, args.do_predict) == (True, True, True)
    assert args.output_dir == "runs/rte-blob-beta0.2-gamma8-seed42" and given.output_dir == "trainer_output"
    _, args = parsed("--do_eval", "--output_dir", "mine")
    assert (args.do_train, args.do_eval, args.output_dir) == (False, True, "mine")
    _, args = parsed("--do_train", "false")
    assert (args.do_train, args.do_eval, args.do_predict) == (False, True, False)
    _, args = parsed("--eval_strategy", "steps")  # transformers then sets do_eval, which nobody asked for
    assert (args.do_train, args.do_eval, args.do_predict) == (True, True, True)


@pytest.mark.parametrize(
    ("typed", "count"),
    [([], 200), (["--eval_samples", "5"], 5), (["--laplace_predictive", "sampled"], 10)],
)
def test_draws_of_logits_cost_nothing_so_there_are_many(tmp_path, typed, count):
    argv = ["--method", "laplace", "--output_dir", str(tmp_path), *typed]
    _, _, args = cli.parse_arguments((Data, cli.MethodArguments, TrainingArguments), DEMO, "test", argv)
    assert args.eval_samples == count


@pytest.mark.parametrize(
    ("typed", "there", "evaluated"),
    [
        ([], ("test", "train", "validation"), [("eval", "validation"), ("predict", "test")]),
        ([], ("train", "test"), [("predict", "test")]),
        (["--do_predict"], ("validation", "test"), [("predict", "test")]),
        (["--do_eval"], ("test",), []),
    ],
)
def test_splits_that_are_asked_for_and_there_are_evaluated(tmp_path, typed, there, evaluated):
    _, args = cli.parse_arguments((Data, TrainingArguments), DEMO, "test", ["--output_dir", str(tmp_path), *typed])
    assert cli.asked_splits(args, there) == evaluated
