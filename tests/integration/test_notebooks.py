"""The notebooks of the docs run, and what they say of their results holds."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
pytestmark = pytest.mark.slow


def execute(name, folder, results):
    """Run a notebook in a kernel of its own.

    Args:
        results: What to take from it: expressions by name.

    Returns:
        Their values, plain JSON, and the HTML that its cells displayed.
    """
    nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the notebooks extra is not installed")
    pytest.importorskip("ipykernel", reason="the notebooks extra is not installed")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    values = ", ".join(f"{key!r}: {expression}" for key, expression in results.items())
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"import json\njson.dump({{{values}}}, open('results.json', 'w'), default=float)")
    )
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    return json.loads((folder / "results.json").read_text()), pages


def test_the_classifier_is_better_on_what_it_answers(tmp_path):
    found, pages = execute(
        "abstaining_classifier",
        tmp_path,
        {
            "all": "accuracy_of_all",
            "answered": "accuracy_of_answered",
            "share": "answered.mean()",
            "undecided": "list(shares)",
            "spread": "np.exp(sampled)[:, :, 1].std(1).mean()",
        },
    )
    assert found["all"] > 0.85  # always guessing the likelier label has 0.930
    assert found["answered"] > found["all"] + 0.02
    assert 0.7 < found["share"] < 0.95
    among_abstained, among_answered = found["undecided"]
    assert among_abstained > 0.8 > 0.2 > among_answered
    assert found["spread"] > 0.02  # the networks differ
    assert "Maybe" in pages[-1] or "It depends" in pages[-1] or "Let me check" in pages[-1]


def test_the_summaries_show_their_unsure_words(tmp_path):
    found, pages = execute(
        "unsure_summary",
        tmp_path,
        {
            "rouge": "scores['rougeL']",
            "different": "different",
            "entropy": "predictive.uncertainty.total.max()",
            "epistemic": "predictive.uncertainty.epistemic.max()",
            "three": "texts[most][:3]",
        },
    )
    assert found["rouge"] > 0.7  # 0.126 before training
    assert sum(found["different"]) > len(found["different"])  # samples differ
    assert found["entropy"] > 0.3 and found["epistemic"] > 0.05
    assert len(set(found["three"])) > 1
    assert len(pages) == 2 and all("rgba(220, 50, 30" in page for page in pages) and pages[0] != pages[1]
