"""A run of a classifier whose rows have words, for the tests of the page."""

import json

import numpy as np
import pytest
from helpers.models import words
from helpers.pages import NAMES, save_classifier

from blob_hf import BlobModel, Sampling

ROWS = 30


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory):
    """An adapter with the saved predictions of a run beside it."""
    folder = save_classifier(tmp_path_factory.mktemp("page"))
    texts = words(ROWS, seed=1)
    found = BlobModel.from_pretrained(folder).eval().predict(texts, sampling=Sampling(10))
    rows = [
        {
            "index": i, "text": text, "prediction": found.labels[i], "probability": float(found.confidence[i]),
            "label": i % 3, "label_name": NAMES[i % 3], "log_probs": np.log(found.probabilities[i]).tolist(),
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "validation_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval_results.json").write_text(json.dumps({"eval_num_samples": 10}))
    (folder / "report.md").write_text("# The report of a tiny run\n")
    return folder
