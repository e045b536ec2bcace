"""Real processes on this machine: gloo DDP, ZeRO-2 and ZeRO-3 against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# Shared noise with one seed per process would differ between ranks, so the noise is switched off (init_eps is tiny):
# what is compared are the gradients, the KL and its step, which must not depend on the number of processes.
RUN = """
import json, sys, torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification
from blob_hf import BlobConfig, BlobTrainer, BlobTrainingArguments, get_blob_model
out, per_device, config = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
args = BlobTrainingArguments(
    out, per_device_train_batch_size=per_device, per_device_eval_batch_size=3, max_steps=6, learning_rate=1e-2,
    logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, kl_cycle_steps=3,
    eval_samples=3, deepspeed=config, dataloader_pin_memory=False, seed=7)
torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=32, max_position_embeddings=40, num_labels=3))
model = get_blob_model(model, BlobConfig(target_modules=["query", "value", "classifier"], task_type="SEQ_CLS",
    init_eps=1e-3, noise="shared"))
ids = torch.randint(4, 60, (24, 8), generator=torch.Generator().manual_seed(1))
data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})
trainer = BlobTrainer(model=model, args=args, train_dataset=data, eval_dataset=data.select(range(13)))
trainer.train()
metrics = trainer.evaluate()
trainer.save_model()
if args.should_save:
    json.dump(metrics, open(f"{out}/metrics.json", "w"))
"""


def launch(tmp_path, name, processes, per_device, config=""):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "29611",
    ]
    if processes == 1 and not config:
        command = [sys.executable]
    out = tmp_path / name
    result = subprocess.run(
        [*command, str(script), str(out), str(per_device), config],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    files = ("adapter_model", "posterior_std")
    weights = {f"{file}:{k}": v for file in files for k, v in load_file(out / f"{file}.safetensors").items()}
    return weights, pd.read_csv(out / "kl_history.csv"), json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("single"), "out", 1, 8)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_two_processes_train_as_one(tmp_path, single, engine):
    config = "" if engine == "ddp" else str(ROOT / "ds_configs" / f"{engine}.json")
    if config:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    weights, history, metrics = launch(tmp_path, engine, 2, 4, config)
    expected_weights, expected_history, expected_metrics = single
    assert set(weights) == set(expected_weights)
    for name, value in expected_weights.items():
        assert weights[name].shape == value.shape
        # Adam divides by the root of tiny second moments, which magnifies float32 rounding; 6 steps of 1e-2
        assert (weights[name] - value).abs().max() < 2e-3, name
    for column in ("step", "kl_weight", "kl", "nll", "posterior_std"):
        assert history[column].tolist() == pytest.approx(expected_history[column].tolist(), rel=2e-3), column
    assert history["kl"].iloc[-1] < 0.95 * history["kl"].iloc[0]  # the KL step reached the parameters
    # 13 rows in batches of 3 over 2 processes: padded rows must not count twice
    for name in ("eval_nll", "eval_mean_nll", "eval_loss"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=2e-3)
