"""Small adapters for the page, and a server of it in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import torch

from blob_hf import BlobConfig, BlobModel, get_blob_model
from blob_hf.baselines.conformal import ClassThresholds, PredictionSets
from blob_hf.baselines.fitted_rules import fitted_to
from blob_hf.data.demo import BACKBONE_DIR
from blob_hf.inference.choices import ChoiceScoring
from helpers.models import TARGETS, randomize_b, save_word_llama, tiny_bert, tiny_tokenizer
from helpers.sft import llama, tokenizer

PROMPT = "{dialogue}"
NAMES = {0: "no", 1: "perhaps", 2: "yes"}


def save_classifier(folder):
    """A classifier of three classes whose networks disagree, with its base and tokenizer."""
    torch.manual_seed(0)
    base = tiny_bert()
    base.config.id2label = NAMES
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    model = get_blob_model(base, BlobConfig(target_modules=TARGETS["bert"], init_eps=0.9, task_type="SEQ_CLS"))
    randomize_b(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def save_summarizer(folder):
    """The demo's backbone with an adapter whose networks disagree, of a run with the prompt `PROMPT`."""
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_pretrained(BACKBONE_DIR, dtype=torch.float32)
    model = get_blob_model(
        base, BlobConfig(target_modules=["q_proj", "v_proj"], init_eps=0.9, task_type="SEQ_2_SEQ_LM")
    )
    randomize_b(model, 0.05)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "run_settings.json").write_text(json.dumps({"prompt": PROMPT}))
    return folder / "adapter"


def save_chat(folder):
    """A causal model with a chat template whose networks disagree, with its base and tokenizer."""
    torch.manual_seed(0)
    base = llama()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    config = BlobConfig(target_modules=["q_proj", "v_proj"], init_eps=0.9, task_type="CAUSAL_LM")
    model = get_blob_model(type(base).from_pretrained(folder / "base"), config)
    randomize_b(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@contextmanager
def served(*arguments, program=("-m", "blob_hf", "app"), log, folder=None, **environment):
    """The address of a server that runs meanwhile; what it prints goes into the file `log`."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
    try:
        for _ in range(1200):
            found = re.search(r"The page is at (http\S+)", log.read_text(encoding="utf-8"))
            if found or process.poll() is not None:
                break
            time.sleep(0.25)
        assert found, log.read_text(encoding="utf-8")
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)


def fit_sets(folder, sampling, quantile=0.665, confidence=0.37):
    """Prediction sets beside a saved adapter, as if they were fitted to 50 rows with these samples."""
    model = BlobModel.from_pretrained(folder)
    own = ClassThresholds(quantile, confidence) if sampling.num_samples else None
    rule = PredictionSets(0.1, 0.1, "lac", 50, ClassThresholds(0.66, None), own, fitted_to(model, sampling))
    rule.save(model, folder)


LETTERS = ["A", "B", "C"]


def save_choices(folder):
    """A causal model that answers questions of up to three choices by their letters, and whose networks disagree."""
    save_word_llama(folder, ["[PAD]", "[UNK]", "[END]", *LETTERS, *(f"w{i}" for i in range(20))], 0.9)
    model = BlobModel.from_pretrained(folder / "adapter")
    model.set_companion(ChoiceScoring("letter", (3, 4, 5)))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def some_questions(count):
    """Of words that `save_choices` knows, with two or three choices."""
    rng = np.random.default_rng(0)
    return [
        {"id": f"q{n}", "question": " ".join(f"w{i}" for i in rng.integers(0, 20, 4)),
         "choices": [f"w{i}" for i in rng.integers(0, 20, 2 + n % 2)]}
        for n in range(count)
    ]  # fmt: skip
