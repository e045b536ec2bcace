import pandas as pd
import pytest
from helpers.hub_server import card_errors
from huggingface_hub import ModelCard, metadata_eval_result

from blob_hf.reporting.model_card import model_card, write_model_card
from blob_hf.reporting.report import write_report
from blob_hf.reporting.run_summary import DataSource, MethodCard, Results, RunSummary
from blob_hf.reporting.tables import markdown_table, results_markdown, results_table, to_text

METRICS = {"eval_nll": 0.5, "eval_mean_nll": 0.6, "eval_nll_sample_std": 0.01, "eval_rouge1": 0.4, "other": 1.0}


def test_table_has_the_mean_the_samples_and_their_spread():
    table = results_table(METRICS, "eval", ["nll", "rouge1"], 10)
    assert table.loc["nll"].tolist() == [0.6, 0.5, 0.01]
    assert pd.isna(table.loc["rouge1"].iloc[0]) and table.loc["rouge1"].iloc[1] == 0.4
    assert list(results_table(METRICS, "eval", ["nll"], 0).columns) == ["N=0 (posterior mean)"]
    text = to_text(table, "title")
    assert "title" in text and "0.5000" in text and "N=10 (samples)" in text
    assert results_markdown(table).splitlines()[2] == "| nll | 0.6000 | 0.5000 | 0.0100 |"


def test_a_table_in_markdown_is_aligned_as_asked():
    rows = [("a", 1), ("b", "x")]
    assert markdown_table(("name", "value"), rows) == "| name | value |\n| --- | --- |\n| a | 1 |\n| b | x |"
    assert markdown_table(("name", "value"), [], "lr") == "| name | value |\n| --- | ---: |"


CARDS = {
    "blob": MethodCard("BLoB adapter", "About.", "Limits.", "@misc{blob}", ("blob", "bayesian"), sampled=True),
    "lora": MethodCard("LoRA adapter", "About.", "Limits.", "@misc{lora}"),
}


def summary(method="blob", **changes):
    table = results_table(METRICS, "eval", ["nll", "rouge1"], 10)
    defaults = {
        "base_model": "facebook/bart-base",
        "data": DataSource("dialogsum", "knkarthick/dialogsum"),
        "settings": {"gamma": 8},
        "arguments": {"warmup_steps": 0.06},
        "results": [
            Results("before training: dialogsum, test", "test", table * 2, in_index=False),
            Results("dialogsum, test (500 dialogues)", "test", table),
        ],
        "kl_notes": ["KL schedule geometric: cycle M = 253"],
        "license": "cc-by-nc-sa-4.0",
        "repo": "alice/summaries",
        "task": "summarization",
        "auto_class": "AutoPeftModelForSeq2SeqLM",
    }
    return RunSummary(**{**defaults, "method": method, "card": CARDS[method], **changes})


@pytest.mark.parametrize("method", ["blob", "lora"])
def test_model_card_says_everything(tmp_path, method):
    write_model_card(tmp_path, summary(method))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "facebook/bart-base")
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.datasets == ["knkarthick/dialogsum"]
    assert ("bayesian" in card.data.tags) is (method == "blob")
    assert ("posterior_samples" in card.text) is (method == "blob")
    for part in (
        'AutoPeftModelForSeq2SeqLM.from_pretrained("alice/summaries")', "| gamma | 8 |", "| warmup_steps | 0.06 |",
        "cycle M = 253", "| nll | 0.6000 | 0.5000 | 0.0100 |", "## Intended use and limits", "## Citation",
    ):  # fmt: skip
        assert part in card.text
    assert card_errors(str(card)) == []


def test_model_index_holds_the_saved_adapter_with_n_0_and_n_s(tmp_path):
    """Read back by the Hub client's own parser; missing values are left out, they would be refused."""
    write_model_card(tmp_path, summary())
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    found = {(one.metric_type, one.metric_name): one.metric_value for one in results}
    assert found == {
        ("nll", "nll, N=0 (posterior mean)"): 0.6,
        ("nll", "nll, N=10 (samples)"): 0.5,
        ("rouge1", "rouge1, N=10 (samples)"): 0.4,
    }
    expected = metadata_eval_result(
        model_pretty_name="summaries", task_pretty_name="summarization", task_id="summarization",
        metrics_pretty_name="nll, N=10 (samples)", metrics_id="nll", metrics_value=0.5, dataset_split="test",
        dataset_pretty_name="dialogsum", dataset_id="knkarthick/dialogsum",
    )["model-index"][0]["results"][0]  # fmt: skip
    ours = next(one for one in results if one.metric_name == "nll, N=10 (samples)")
    assert expected["dataset"] == {"name": ours.dataset_name, "type": ours.dataset_type, "split": ours.dataset_split}
    assert expected["metrics"][0]["value"] == ours.metric_value and expected["task"]["type"] == ours.task_type


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value: 0.5", "value: .nan"),
        ("type: knkarthick/dialogsum", "type: ''"),
        ("tags:\n", "tags: lora\nothers:\n"),
        ("---\n", ""),
    ],
)
def test_the_check_of_cards_finds_what_the_hub_refuses(old, new):
    good = str(model_card(summary()))
    assert old in good and card_errors(good.replace(old, new))


def test_a_local_base_model_is_not_named_as_a_hub_repo(tmp_path):
    write_model_card(tmp_path, summary(base_model=str(tmp_path), data=DataSource("own files"), task=None))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None and data.datasets is None and data.eval_results[0].dataset_type == "own files"


def test_a_card_without_a_run_says_what_the_adapter_knows(tmp_path):
    write_model_card(tmp_path, summary(data=None, results=[], kl_notes=[], arguments={}))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "## Results" not in card.text and "| gamma | 8 |" in card.text
    assert card_errors(str(card)) == []


EVERYTHING = """
# BLoB adapter of bart-base on dialogsum

About.

## Results

**dialogsum, test (500 dialogues)**

|  | N=0 (posterior mean) | N=10 (samples) | std over samples |
| --- | ---: | ---: | ---: |
| nll | 0.6000 | 0.5000 | 0.0100 |
| rouge1 | - | 0.4000 | - |

## Intended use and limits

Summarizing texts like those it was trained on, where it matters how far to trust a summary. Limits. Use it as the \
base model's own card allows.

## How to use

With its uncertainty (`pip install blob_hf`), inputs repeated once per sample:

```python
from blob_hf import BlobModel
from transformers import AutoTokenizer

model = BlobModel.from_pretrained("alice/summaries")
tokenizer = AutoTokenizer.from_pretrained("alice/summaries")
inputs = tokenizer(["..."], return_tensors="pt", padding=True)
with model.posterior_samples(10, seed=0):
    tokens = model.generate(**{name: x.repeat(10, 1) for name, x in inputs.items()}, max_new_tokens=128)
summaries = tokenizer.batch_decode(tokens, skip_special_tokens=True)  # 10 per input, sample by sample
```

As plain LoRA (N=0), with PEFT alone:

```python
from peft import AutoPeftModelForSeq2SeqLM

model = AutoPeftModelForSeq2SeqLM.from_pretrained("alice/summaries")
```

## Training

| setting | value |
| --- | --- |
| gamma | 8 |

- first <note> & {{ no tag }}
- second

<details><summary>All training arguments that define the run</summary>

| setting | value |
| --- | --- |
| warmup_steps | 0.06 |

</details>

## Citation

```bibtex
@misc{blob}
```

Made with blob_hf """


def test_the_card_with_all_its_parts_word_for_word():
    run = summary(base_model="bart-base", kl_notes=["first <note> & {{ no tag }}", "second"])
    run.results = run.results[1:]
    text = model_card(run).text
    assert text.startswith(EVERYTHING) and text.endswith(".\n") and text.count("\n") == EVERYTHING.count("\n") + 1


def test_the_card_without_the_parts_that_are_optional():
    run = summary("lora", data=None, results=[], kl_notes=[], arguments={}, task="text-classification")
    text = model_card(run).text
    for part in ("## Results", "posterior_samples", "With its uncertainty", "<details>", " on dialogsum", "\n- "):
        assert part not in text, part
    assert "\n\n\n" not in text and "Classifying texts" in text
    sampled = model_card(summary(task="text-classification")).text
    assert "\nprobs = logits.softmax(-1).unflatten(0, (10, -1)).mean(0)\n```\n" in sampled


def test_report_shows_tables_notes_and_plots(tmp_path):
    write_report(tmp_path, summary(plots=["plots/kl.png"]))
    text = (tmp_path / "report.md").read_text()
    for part in ("## dialogsum, test", "| nll | 0.6000", "cycle M = 253", "![kl](plots/kl.png)", "| gamma | 8 |"):
        assert part in text


def test_report_and_card_begin_with_a_plain_sentence_and_have_the_figures_in_a_table(tmp_path):
    run = summary(sentence="Ten samples change nothing.", kl_figures={"KL per weight": "4.2 -> 0.5 nats"})
    write_report(tmp_path, run, "evaluation_report.md")
    text = (tmp_path / "evaluation_report.md").read_text()
    assert text.splitlines()[2] == run.sentence and "| KL per weight | 4.2 -> 0.5 nats |" in text
    card = model_card(run).text
    assert f"## Results\n\n{run.sentence}\n\n**" in card and "| KL per weight | 4.2 -> 0.5 nats |" in card
