"""Real processes on this machine: gloo DDP, ZeRO-2 and ZeRO-3 against one process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.running import thorough
from safetensors.torch import load_file

from blob_hf.trainer.checkpoints import find_corruption, newest_complete

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# The noise is shared, by the rows of a batch and by all processes: training must not depend on how many there are.
RUN = """
import json, os, signal, sys, torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from blob_hf import BlobConfig, BlobTrainer, BlobTrainingArguments, get_blob_model
from blob_hf import cli
from blob_hf.inference.choices import ChoiceCollator, ChoiceScoring
from blob_hf.trainer.engines import shutdown
from blob_hf.tuner.posterior import gaussian_layers
out, per_device, engine, checkpoint, changes = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
changes = json.loads(changes)
fault, quiet, causal = changes.pop("fault", None), changes.pop("quiet", False), changes.pop("causal", False)
if engine == "fsdp2":
    # accelerate offers FSDP for GPUs alone, but torch's FSDP2 itself runs on CPUs with gloo
    import accelerate.state as state
    torch.distributed.init_process_group("gloo")
    prepare = state.PartialState._prepare_backend
    def as_gpu(self, cpu=False, *a, **k):
        backend, kind = prepare(self, cpu, *a, **k)
        multi = state.DistributedType
        return backend, multi.MULTI_GPU if kind == multi.MULTI_CPU else kind
    state.PartialState._prepare_backend = as_gpu
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    extra = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer" if causal else "BertLayer"],
        "state_dict_type": "SHARDED_STATE_DICT"}}
else:
    extra = {"deepspeed": engine or None}
args = BlobTrainingArguments(**{**dict(
    output_dir=out, per_device_train_batch_size=per_device, per_device_eval_batch_size=3, max_steps=6, seed=7,
    learning_rate=1e-2, logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=3,
    use_cpu=True, kl_cycle_steps=3, eval_samples=3, dataloader_pin_memory=False), **extra, **changes})
torch.manual_seed(0)
sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=40)
if causal:  # multiple choice by letters
    model, targets, task = LlamaForCausalLM(LlamaConfig(**sizes)), ["q_proj", "v_proj", "lm_head"], "CAUSAL_LM"
else:
    model, targets = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)), ["query", "value", "classifier"]
    task = "SEQ_CLS"
model = get_blob_model(model, BlobConfig(target_modules=targets, task_type=task, init_eps=0.3, noise="shared"))
for layer in gaussian_layers(model).values():
    layer.mean_only = quiet
for name, parameter in model.named_parameters():
    if ".lora_B." in name:
        torch.nn.init.normal_(parameter, std=0.5)
ids = torch.randint(4, 60, (24, 8), generator=torch.Generator().manual_seed(1))
rows = {"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()}
if causal:
    scoring = ChoiceScoring("letter", (11, 7, 40))
    model.set_companion(scoring), scoring.attach(model, None)
    rows = {"input_ids": [row[: 4 + i % 5] for i, row in enumerate(rows["input_ids"])], "num_choices": [3] * len(ids),
        "labels": rows["labels"]}
data = Dataset.from_dict(rows)
trainer = BlobTrainer(model=model, args=args, train_dataset=data, eval_dataset=data.select(range(13)),
    data_collator=ChoiceCollator(0, "letter") if causal else None)
if fault and trainer.accelerator.process_index == 1:
    inner = trainer.compute_loss
    nll = trainer._nll
    def not_a_number(*args):
        value, outputs = nll(*args)
        return value * float("nan"), outputs
    def faulty(model, inputs, *args, **kwargs):
        if model.training and trainer.state.global_step == 4:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            trainer._nll = not_a_number
        return inner(model, inputs, *args, **kwargs)
    trainer.compute_loss = faulty
with cli.user_errors():
    trainer.train(resume_from_checkpoint=checkpoint)
if engine == "fsdp2":
    assert trainer.is_fsdp_enabled and type(next(trainer.model.parameters())).__name__ == "DTensor"
metrics = trainer.evaluate()
metrics["verdict"], metrics["share_moved"] = trainer.kl_verdict.name, trainer.kl.verdict.figures.share_moved
metrics["looked"] = trainer.kl.verdict.figures.sample_gap is not None
trainer.save_model()
if args.should_save:
    json.dump(metrics, open(f"{out}/metrics.json", "w"))
shutdown(trainer.accelerator)
"""


SUMMARIES = """
import json, sys, torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from blob_hf import BlobConfig, BlobSeq2SeqTrainer, BlobSeq2SeqTrainingArguments, get_blob_model
from blob_hf.trainer.engines import shutdown
out, engine = sys.argv[1], sys.argv[2]
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}, unk_token="<unk>"))
words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
torch.manual_seed(0)
model = BartForConditionalGeneration(BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    max_position_embeddings=64, forced_eos_token_id=None, init_std=0.8))
model = get_blob_model(model, BlobConfig(target_modules=["q_proj", "lm_head"], task_type="SEQ_2_SEQ_LM", init_eps=0.9))
for name, parameter in model.named_parameters():
    if ".lora_B." in name:
        torch.nn.init.normal_(parameter, std=0.5)
args = BlobSeq2SeqTrainingArguments(out, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True,
    use_cpu=True, eval_samples=2, dataloader_pin_memory=False, deepspeed=engine or None)
generator = torch.Generator().manual_seed(1)
ids = [torch.randint(4, 60, (4 + i % 3,), generator=generator).tolist() for i in range(7)]
rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
trainer = BlobSeq2SeqTrainer(model=model, args=args, processing_class=words,
    data_collator=DataCollatorForSeq2Seq(words, model=model.get_base_model()))
model.generation_config.eos_token_id = model.config.eos_token_id = int(sys.argv[3])
scores = trainer.predict(Dataset.from_dict({**rows, "labels": [row[:3] for row in ids]})).metrics
mean, samples = trainer.predict(Dataset.from_dict(rows), max_new_tokens=5).predictions
if args.should_save:
    result = {"nll": scores["test_nll"], "mean": mean.tolist(), "samples": samples.tolist()}
    json.dump(result, open(f"{out}/metrics.json", "w"))
shutdown(trainer.accelerator)
"""


def launch(tmp_path, code, name, processes, *arguments):
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if processes == 1:
        command = [sys.executable]
    return subprocess.run(
        [*command, str(script), str(tmp_path / name), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def execute(tmp_path, code, name, processes, *arguments):
    result = launch(tmp_path, code, name, processes, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return tmp_path / name, json.loads((tmp_path / name / "metrics.json").read_text())


def train(tmp_path, name, processes, per_device, engine="", checkpoint="", **changes):
    out, metrics = execute(tmp_path, RUN, name, processes, per_device, engine, checkpoint, json.dumps(changes))
    files = ("adapter_model", "posterior_std")
    weights = {f"{file}:{k}": v for file in files for k, v in load_file(out / f"{file}.safetensors").items()}
    return weights, pd.read_csv(out / "kl_history.csv"), metrics


def test_two_processes_score_and_generate_as_one(tmp_path):
    """7 rows in batches of 2 x 2: the row that pads the last batch is dropped; samples are the same networks.

    Under ZeRO-3 every rank takes part in every step of the others' decoding, although their texts end at other lengths.
    """
    _, free = execute(tmp_path, SUMMARIES, "free", 1, "", 2)
    # an end token that some of the texts have and others have not
    end = next(token for text in free["mean"] for token in text[1:] if 0 < sum(token in t for t in free["mean"]) < 7)
    _, one = execute(tmp_path, SUMMARIES, "one", 1, "", end)
    assert len(one["mean"]) == 7 and one["mean"] != free["mean"]
    engines = [""]
    if importlib.util.find_spec("deepspeed"):
        engines.append(str(ROOT / "ds_configs" / "zero3.json"))
    for number, engine in enumerate(engines):
        _, two = execute(tmp_path, SUMMARIES, f"two{number}", 2, engine, end)
        assert two["nll"] == pytest.approx(one["nll"], rel=1e-5)
        assert two["mean"] == one["mean"] and two["samples"] == one["samples"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("single"), "out", 1, 8)


def assert_the_same_training(found, expected):
    weights, history, metrics = found
    expected_weights, expected_history, expected_metrics = expected
    assert set(weights) == set(expected_weights)
    for name, value in expected_weights.items():
        assert weights[name].shape == value.shape
        # Adam divides by the root of tiny second moments, which magnifies float32 rounding; 6 steps of 1e-2
        assert (weights[name] - value).abs().max() < 2e-3, name
    for column in ("step", "kl_weight", "kl", "nll", "posterior_std", "lr_scale"):
        assert history[column].tolist() == pytest.approx(expected_history[column].tolist(), rel=2e-3), column
    # 13 rows in batches of 3 over 2 processes: padded rows must not count twice
    for name in ("eval_nll", "eval_mean_nll", "eval_loss"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=2e-3)
    if metrics["looked"]:  # under FSDP the verdict goes by the weights alone
        assert metrics["verdict"] == expected_metrics["verdict"]
    assert metrics["share_moved"] == pytest.approx(expected_metrics["share_moved"], abs=0.02)


@pytest.mark.parametrize(
    "engine",
    ["ddp", "zero2", "zero3", "fsdp2", *map(thorough, ["zero1", "zero2_offload", "zero3_offload"])],
)
def test_two_processes_train_as_one(tmp_path, single, engine):
    config = engine
    if "zero" in engine:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        config = str(ROOT / "ds_configs" / f"{engine}.json")
    config = "" if engine == "ddp" else config
    found = train(tmp_path, engine, 2, 4, config)
    assert_the_same_training(found, single)
    weights, history, _ = found
    assert history["kl"].iloc[-1] < 0.95 * history["kl"].iloc[0]  # the KL step reached the parameters
    # a checkpoint of two processes is complete, and a run resumed from it ends at the same bits
    checkpoint = newest_complete(tmp_path / engine)
    assert checkpoint.endswith("checkpoint-6") and find_corruption(tmp_path / engine / "checkpoint-3") is None
    again, history_again, _ = train(tmp_path, "again", 2, 4, config, tmp_path / engine / "checkpoint-3")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert history_again.equals(history)


@pytest.fixture(scope="module")
def single_causal(tmp_path_factory):
    return train(tmp_path_factory.mktemp("causal"), "out", 1, 8, **CAUSAL)


CAUSAL = {"causal": True, "remove_unused_columns": False, "max_steps": 3}


@pytest.mark.parametrize("engine", ["zero3", thorough("fsdp2")])
def test_two_processes_train_a_causal_model_as_one(tmp_path, single_causal, engine):
    """Multiple choice by letters, with LoRA on lm_head, and under ZeRO-3 with gradient checkpointing."""
    config, changes = engine, CAUSAL
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        config, changes = str(ROOT / "ds_configs" / "zero3.json"), {**CAUSAL, "gradient_checkpointing": True}
    assert_the_same_training(train(tmp_path, engine, 2, 4, config, **changes), single_causal)


@pytest.mark.parametrize("class_weights", [thorough(None), "balanced"])
def test_accumulation_processes_and_batch_commute(tmp_path, class_weights):
    """24 rows a step: 1 x 24 and 2 processes x 3 x 4; without noise, which accumulated batches draw anew."""
    quiet = {"quiet": True, "max_steps": 4, "class_weights": class_weights}
    expected = train(tmp_path, "one", 1, 24, **quiet)
    assert_the_same_training(train(tmp_path, "two", 2, 4, gradient_accumulation_steps=3, **quiet), expected)


@pytest.mark.parametrize("fault", ["kill", thorough("nan")])
def test_a_fault_of_one_process_ends_all_and_the_run_resumes(tmp_path, single, fault):
    failed = launch(tmp_path, RUN, "run", 2, 4, "", "", json.dumps({"fault": fault}))
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "error: " in line and "blob" not in line]
    if fault == "kill":
        assert any("another process" in line and "--resume_from_checkpoint true" in line for line in lines), (
            failed.stderr
        )
    else:  # both processes say so, and neither waits for the other
        assert failed.stderr.count("the loss became nan at step 5") == 2, failed.stderr
    assert newest_complete(tmp_path / "run").endswith("checkpoint-3")
    found = train(tmp_path, "run", 2, 4, "", tmp_path / "run" / "checkpoint-3")
    assert_the_same_training(found, single)


@pytest.mark.parametrize("stage", [thorough(2), 3])
def test_deepspeed_evaluates_before_training_and_a_saved_adapter(tmp_path, stage):
    """As one process does, that knows no DeepSpeed."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    arguments = [
        "--demo",
        "--use_cpu",
        "true",
        "--max_steps",
        "2",
        "--eval_samples",
        "2",
        "--max_eval_samples",
        "20",
        "--compare_lora",
        "false",
        "--compare_base",
        "true",
        "--disable_tqdm",
        "true",
    ]
    code = "import runpy, sys\nsys.argv.insert(1, '--output_dir')\n"
    code += f"runpy.run_path({str(ROOT / 'run_glue_blob.py')!r}, run_name='__main__')"
    engine = ["--deepspeed", ROOT / "ds_configs" / f"zero{stage}.json"]

    def results(name):
        return json.loads((tmp_path / "run" / f"{name}_results.json").read_text())

    if stage == 3:
        found = launch(tmp_path, code, "refused", 2, *arguments, *engine)
        assert found.returncode != 0 and "error: ZeRO-3 cannot train a model in the process" in found.stderr
        arguments[arguments.index("--compare_base") + 1] = "false"
    found = launch(tmp_path, code, "run", 2, *arguments, *engine)
    assert found.returncode == 0, found.stderr[-3000:]
    trained = results("eval")
    assert stage == 3 or results("base")["base_nll"] > 0
    for processes, more in ((2, engine), (1, [])):
        found = launch(tmp_path, code, "run", processes, *arguments, "--do_eval", *more)
        assert found.returncode == 0, found.stderr[-3000:]
        for metric in ("eval_nll", "eval_mean_nll", "eval_accuracy"):
            assert results("eval")[metric] == pytest.approx(trained[metric], rel=1e-4)


def test_a_search_on_two_processes(tmp_path):
    """One process leads the search, both train its trials, and both end well."""
    pytest.importorskip("optuna", reason="optuna is not installed")
    arguments = "--demo --max_steps 2 --eval_samples 2 --max_eval_samples 20 --use_cpu true --save_strategy no"
    space = "--hp_search optuna --hp_trials 2 --hp_space beta=0.05:0.5:log"
    code = "import runpy, sys\nsys.argv.insert(1, '--output_dir')\n"
    code += f"runpy.run_path({str(ROOT / 'run_glue_blob.py')!r}, run_name='__main__')"
    found = launch(tmp_path, code, "search", 2, *arguments.split(), *space.split())
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("lowest validation NLL") == 1
    assert "beta" in json.loads((tmp_path / "search" / "best_run.json").read_text())["hyperparameters"]


def test_the_target_schedule_is_the_same_on_two_processes(tmp_path):
    """Its weight comes from the posterior, of which each process has a shard under ZeRO-3."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    changes = {"kl_schedule": "target", "kl_target_nats_per_weight": 0.5, "kl_cycle_steps": 2}
    expected = train(tmp_path, "one", 1, 8, **changes)
    assert expected[1]["kl_weight"].iloc[0] > 0
    assert_the_same_training(train(tmp_path, "two", 2, 4, str(ROOT / "ds_configs" / "zero3.json"), **changes), expected)


def test_the_adaptive_schedule_is_the_same_on_two_processes(tmp_path):
    """It follows the NLL of the whole batch, of which each process has seen a part."""
    changes = {"kl_schedule": "adaptive", "kl_pull": 2.0, "kl_cycle_steps": None}
    expected = train(tmp_path, "one", 1, 8, **changes)
    assert expected[1]["kl_weight"].iloc[1] > 0
    assert_the_same_training(train(tmp_path, "two", 2, 4, **changes), expected)
