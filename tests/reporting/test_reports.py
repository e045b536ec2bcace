import pandas as pd
import pytest
from huggingface_hub import ModelCard

from blob_hf.reporting.model_card import RunSummary, write_model_card, write_report
from blob_hf.reporting.tables import results_table, to_markdown, to_text

METRICS = {"eval_nll": 0.5, "eval_mean_nll": 0.6, "eval_nll_sample_std": 0.01, "eval_rouge1": 0.4, "other": 1.0}


def test_table_has_the_mean_the_samples_and_their_spread():
    table = results_table(METRICS, "eval", ["nll", "rouge1"], 10)
    assert table.loc["nll"].tolist() == [0.6, 0.5, 0.01]
    assert pd.isna(table.loc["rouge1"].iloc[0]) and table.loc["rouge1"].iloc[1] == 0.4
    assert list(results_table(METRICS, "eval", ["nll"], 0).columns) == ["N=0 (posterior mean)"]
    text = to_text(table, "title")
    assert "title" in text and "0.5000" in text and "N=10 (samples)" in text
    assert to_markdown(table).splitlines()[2] == "| nll | 0.6000 | 0.5000 | 0.0100 |"


@pytest.mark.parametrize("method", ["blob", "lora"])
def test_model_card_is_read_by_the_hub_client(tmp_path, method):
    run = RunSummary("facebook/bart-base", "knkarthick/dialogsum", method, {"gamma": 8}, license="cc-by-nc-sa-4.0")
    run.tables["test"] = results_table(METRICS, "eval", ["nll"], 10)
    run.kl_notes = ["KL schedule geometric: cycle M = 253"]
    write_model_card(tmp_path, run, "AutoPeftModelForSeq2SeqLM")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "facebook/bart-base")
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.datasets == ["knkarthick/dialogsum"]
    assert ("bayesian" in card.data.tags) is (method == "blob")
    assert ("posterior_samples" in card.text) is (method == "blob")
    assert "AutoPeftModelForSeq2SeqLM.from_pretrained" in card.text and "| gamma | 8 |" in card.text


def test_a_local_base_model_is_not_named_as_a_hub_repo(tmp_path):
    write_model_card(tmp_path, RunSummary(str(tmp_path), "own files", "blob", {}), "AutoPeftModel")
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_report_shows_tables_notes_and_plots(tmp_path):
    run = RunSummary("m", "d", "blob", {"beta": 0.2}, kl_notes=["M = 5"], plots=["plots/kl.png"])
    run.tables["validation"] = results_table(METRICS, "eval", ["nll"], 10)
    write_report(tmp_path, run)
    text = (tmp_path / "report.md").read_text()
    for part in ("## validation", "| nll | 0.6000", "- M = 5", "![kl](plots/kl.png)", "| beta | 0.2 |"):
        assert part in text
