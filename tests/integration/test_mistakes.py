"""Wrong command lines as users write them: each ends with exit code 2 and one line that names what was wrong."""

import pytest
from helpers.running import GLUE, SUMMARIZATION, run_script

from blob_hf.__main__ import main as blob
from blob_hf.data import demo

TOKENIZER = ["--tokenizer_name", str(demo.BACKBONE_DIR)]
FILES = {name: str(path) for name, path in demo.CLASSIFICATION_FILES.items()}


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def assert_one_line(code, text, message):
    found = errors(text)
    assert code == 2 and len(found) == 1 and "Traceback" not in text, text[-2000:]
    assert message in found[0], found[0]


# ----- numbers, choices and names: refused before any data is read -----------------------------------------------

BOTH = [
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be >= 1, got 0"),
    (["--per_device_train_batch_size", "-4"], "per_device_train_batch_size must be >= 1, got -4"),
    (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size must be >= 1, got 0"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be >= 1, got 0"),
    (["--max_steps", "0"], "max_steps must be >= 1 or -1, got 0"),
    (["--max_steps", "-5"], "max_steps must be >= 1 or -1, got -5"),
    (["--max_steps", "ten"], "invalid int value: 'ten'"),
    (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs must be > 0, got 0"),
    (["--num_train_epochs", "-1"], "num_train_epochs must be > 0, got -1"),
    (["--learning_rate", "-1"], "learning_rate must be > 0, got -1"),
    (["--learning_rate", "0"], "learning_rate must be > 0, got 0"),
    (["--learning_rate", "nan"], "learning_rate must be a number, got nan"),
    (["--lora_r", "0"], "lora_r must be >= 1, got 0"),
    (["--lora_r", "-8"], "lora_r must be >= 1, got -8"),
    (["--lora_alpha", "0"], "lora_alpha must be >= 1, got 0"),
    (["--lora_dropout", "1"], "lora_dropout must be >= 0 and < 1, got 1"),
    (["--logging_steps", "0"], "logging_steps"),
    (["--logging_steps", "-3"], "logging_steps must be > 0, got -3"),
    (["--warmup_steps", "-1"], "warmup_steps"),
    (["--weight_decay", "-0.1"], "weight_decay must be >= 0, got -0.1"),
    (["--max_train_samples", "0"], "max_train_samples must be >= 1, got 0"),
    (["--max_eval_samples", "-1"], "max_eval_samples must be >= 1, got -1"),
    (["--init_eps", "0"], "init_eps must be > 0, got 0"),
    (["--beta", "0"], "beta must be > 0, got 0"),
    (["--gamma", "-2"], "gamma must be > 0, got -2"),
    (["--eval_samples", "-1"], "eval_samples must be >= 0"),
    (["--train_samples", "0"], "train_samples must be >= 1, got 0"),
    (["--posterior_batch_size", "0"], "posterior_batch_size must be >= 1, got 0"),
    (["--kl_cycle_steps", "0"], "kl_cycle_steps must be >= 1, got 0"),
    (["--kl_pull", "-1"], "kl_pull must be >= 0, got -1"),
    (["--kl_learning_rate", "fast"], "kl_learning_rate must be a number or auto, got 'fast'"),
    (["--kl_schedule", "cyclic"], "invalid choice: 'cyclic'"),
    (["--kl_schedule", "target"], "need each other"),
    (["--noise", "gauss"], "invalid choice: 'gauss'"),
    (["--method", "vogn"], "invalid choice: 'vogn'"),
    (["--dtype", "float8"], "invalid choice: 'float8'"),
    (["--no_such_flag", "1"], "no_such_flag"),
    (["--posterior_scale", "0"], "posterior_scale must be > 0, got 0"),
    (["--early_stopping_patience", "0"], "early_stopping_patience must be >= 1, got 0"),
    (["--method", "ensemble", "--ensemble_size", "1"], "ensemble_size must be >= 2, got 1"),
    (["--method", "tfb"], "--method tfb is fitted to a trained adapter"),
    (["--deepspeed", "nowhere.json"], "cannot read the DeepSpeed config nowhere.json"),
    (["--do_eval"], "nothing to evaluate"),
    (["--adapter_name_or_path", "nowhere"], "'nowhere' is not a local folder"),
    (["--resume_from_checkpoint", "nowhere"], "the checkpoint to resume from, nowhere, is not a folder"),
    (["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--model_name_or_path", "no/such-model"], "'no/such-model'"),
]
CLASSIFIER = [
    (["--demo", "--max_length", "0"], "max_length must be >= 1, got 0"),
    (["--task_name", "snli"], "task_name must be one of rte, mrpc, cola, wic, boolq"),
    (["--task_name", "rte"], "cannot get the dataset 'nyu-mll/glue'"),
    (["--demo", "--text_columns", "premise"], "no column 'premise'"),
    (["--demo", "--label_column", "answer"], "no column 'answer'"),
    (["--demo", "--target_modules", "query"], "match no layer of BartForSequenceClassification"),
    (["--validation_file", FILES["validation"], "--model_name_or_path", str(demo.BACKBONE_DIR)], "no train split"),
]
SUMMARIZER = [
    ([], "cannot get the dataset 'knkarthick/dialogsum'"),
    (["--demo", "--max_source_length", "0"], "max_source_length must be >= 1, got 0"),
    (["--demo", "--max_target_length", "0"], "max_target_length must be >= 1, got 0"),
    (["--demo", "--max_new_tokens", "0"], "max_new_tokens must be >= 1, got 0"),
    (["--demo", "--num_beams", "0"], "num_beams must be >= 1, got 0"),
    (["--demo", "--summary_column", "tldr"], "no column 'tldr'"),
    (["--demo", "--prompt", "Sum up:"], "must contain {dialogue}"),
    (["--demo", "--decoding", "beam"], "invalid choice: 'beam'"),
    (["--demo", "--decoding", "mbr", "--method", "lora"], "decoding='mbr' needs posterior samples"),
    (["--demo", "--decoding", "predictive", "--eval_samples", "0"], "needs posterior samples"),
    (["--demo", "--temperature_scaling"], "temperature_scaling calibrates class probabilities"),
    (["--demo", "--config_name", "bart"], "--tokenizer_name"),
    (["--demo", "--config_name", "bert", *TOKENIZER], "not an encoder-decoder"),
    (["--demo", "--config_name", "bart", *TOKENIZER, "--config_overrides", "d_modell=3"], "d_modell"),
]
CASES = [
    *((script, ["--demo", *arguments], message) for script in (GLUE, SUMMARIZATION) for arguments, message in BOTH),
    *((GLUE, *case) for case in CLASSIFIER),
    *((SUMMARIZATION, *case) for case in SUMMARIZER),
]


@pytest.mark.parametrize(("script", "arguments", "message"), CASES)
def test_a_script_says_what_is_wrong(monkeypatch, tmp_path, capfd, script, arguments, message):
    out = tmp_path / "out"
    code = run_script(monkeypatch, script, *arguments, "--output_dir", out, "--use_cpu", "true")
    assert_one_line(code, capfd.readouterr().err, message)
    assert not out.exists()  # a start that failed has not claimed the folder


# ----- the blob command -------------------------------------------------------------------------------------------


def run_blob(*arguments):
    try:
        blob([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predictt"], "name a command, one of classify"),
        (["predict", "nowhere", "--input", FILES["validation"], "--output", "OUT"], "'nowhere' is not a local folder"),
        (["predict", "ADAPTER", "--input", "nowhere.csv", "--output", "OUT"], "nowhere.csv"),
        (["predict", "ADAPTER", "--input", FILES["validation"], "--output", "OUT", "--text_columns", "body"],
         "no column 'body'"),
        (["predict", "ADAPTER", "--input", FILES["validation"], "--output", "OUT", "--batch_size", "0"],
         "batch_size must be >= 1, got 0"),
        (["predict", "ADAPTER", "--input", FILES["validation"], "--output", "OUT", "--max_length", "-1"],
         "max_length must be >= 1, got -1"),
        (["predict", "ADAPTER", "--input", FILES["validation"], "--output", "OUT", "--num_samples", "-1"],
         "num_samples must be >= 0"),
        (["predict", "ADAPTER"], "the following arguments are required: --input, --output"),
        (["predict", "ADAPTER", "--input", FILES["validation"], "--output", "OUT", "--num_samples", "many"],
         "--num_samples: a whole number or auto, got 'many'"),
        (["convert", "nowhere", "OUT"], "'nowhere' is not a local folder"),
        (["convert", "ADAPTER"], "the following arguments are required: destination"),
        (["convert", "ADAPTER", "OUT", "--std_parameterization", "cubic"], "invalid choice: 'cubic'"),
        (["convert", "ADAPTER", "ADAPTER"], "already holds an adapter"),
        (["convert", "ADAPTER", "OUT", "--prior_std", "0"], "prior_std must be > 0, got 0"),
    ],
)  # fmt: skip
def test_the_blob_command_says_what_is_wrong(tmp_path, capfd, arguments, message):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    places = {"ADAPTER": tmp_path / "adapter", "OUT": tmp_path / "out.jsonl"}
    code = run_blob(*(places.get(one, one) for one in arguments))
    assert_one_line(code, capfd.readouterr().err, message)
    assert not (tmp_path / "out.jsonl").exists()
