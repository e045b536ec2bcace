import json
from dataclasses import dataclass, field

import pytest

from blob_hf import cli
from blob_hf.cli.adapters import PublishedDefaults
from blob_hf.cli.folders import SETTINGS_FILE
from blob_hf.cli.routes import ROUTES
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


def test_a_folder_of_different_settings_is_not_overwritten(tmp_path):
    def args(**changes):
        return BlobTrainingArguments(str(tmp_path), report_to="none", **{"beta": 0.2, **changes})

    cli.claim_output_dir(args(), False, Data("x"))
    before = (tmp_path / SETTINGS_FILE).read_text()
    cli.claim_output_dir(args(logging_steps=3), False, Data("x"))  # only shows more
    for training, data, name in (
        (args(beta=0.3), Data("x"), "beta 0.2 -> 0.3"),
        (args(), Data("y"), "file 'x' -> 'y'"),
    ):
        with pytest.raises(BlobError, match=f"{name}.*choose another --output_dir"):
            cli.claim_output_dir(training, False, data)
    assert (tmp_path / SETTINGS_FILE).read_text() == before


def test_how_a_fitted_adapter_predicts_does_not_make_it_another_run(tmp_path):
    args = BlobTrainingArguments(str(tmp_path), report_to="none")
    cli.claim_output_dir(args, True, cli.MethodArguments("laplace"))
    cli.claim_output_dir(args, True, cli.MethodArguments("laplace", laplace_predictive="sampled"))
    assert json.loads((tmp_path / SETTINGS_FILE).read_text())["beta"] == 0.2  # of a fresh adapter, settled
    with pytest.raises(BlobError, match="laplace_subset 'all' -> 'last_layer'"):
        cli.claim_output_dir(args, True, cli.MethodArguments("laplace", laplace_subset="last_layer"))


def test_a_folder_of_unknown_origin_is_not_overwritten(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BlobError, match="settings are unknown"):
        cli.claim_output_dir(BlobTrainingArguments(str(tmp_path), report_to="none"), False)


def test_all_of_it_runs_by_default_and_folders_are_named_after_settings(tmp_path):
    def parsed(*argv):
        _, args = cli.parse_arguments((Data, TrainingArguments), DEMO, "test", argv)
        return args, cli.with_output_dir(args, ROUTES["blob"].folder_name("rte", args), None)

    given, args = parsed("--beta", "0.2")
    assert (args.do_train, args.do_eval, args.do_predict) == (True, True, True)
    assert args.output_dir == "runs/rte-blob-beta0.2-gamma8-seed42" and given.output_dir == "trainer_output"
    _, args = parsed("--do_eval", "--output_dir", "mine")
    assert (args.do_train, args.do_eval, args.output_dir) == (False, True, "mine")
    _, args = parsed("--eval_strategy", "steps")  # transformers then sets do_eval, which nobody asked for
    assert (args.do_train, args.do_eval, args.do_predict) == (True, True, True)
