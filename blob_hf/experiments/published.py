"""What was published for the experiments, to stand beside ours.

[W] Wang et al. (NeurIPS 2024); [K] the KTH re-implementation (2025); [C] the comparison of arXiv 2607.02182, table 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blob_hf.data import multiple_choice, tasks
from blob_hf.experiments.statistics import Spread

Table = dict[str, dict[str, Spread]]  # by task and metric
METRICS = ("accuracy", "ece", "nll")


@dataclass(frozen=True)
class Experiment:
    """A grid of tasks x methods x seeds of one script.

    Attributes:
        script: That runs it, without `.py`.
        tasks: That the script knows.
        default: Those of the publication.
        published: Its tables by what they are called in ours.
        ours: Which of them are of BLoB, to measure our distance from.
        setting: Of the publication, in a sentence.
    """

    name: str
    title: str
    script: str
    tasks: Sequence[str]
    default: Sequence[str]
    published: Mapping[str, Table]
    ours: Sequence[str]
    setting: str


def _table(names: Sequence[str], *rows: str) -> Table:
    """Rows of `mean std` by metric, cells of tasks; accuracy and ECE in percent."""
    table: Table = {task: {} for task in names}
    for metric, values in zip(METRICS, rows, strict=True):
        scale = 1 if metric == "nll" else 100
        for task, cell in zip(names, values.split("|"), strict=True):
            mean, std = (float(part) / scale for part in cell.split())
            table[task][metric] = Spread(mean, std, 3)
    return table


_ROBERTA = ("rte", "mrpc", "wic", "cola", "boolq")
_KTH, _WANG = "published blob, N=10 [K]", "published blob, N=10 [W]"
GLUE = Experiment(
    "glue",
    "Experiment I: classifiers",
    "run_glue_blob",
    tuple(tasks.TASKS),
    tasks.PUBLISHED,
    {
        _KTH: _table(
            _ROBERTA,
            "75.81 1.81|87.66 1.44|67.19 2.10|83.32 0.72|78.92 0.29",
            "10.97 2.45|5.03 1.67|13.02 1.21|3.68 1.14|2.67 0.66",
            "0.56 0.05|0.32 0.02|0.69 0.01|0.37 0.01|0.46 0.01",
        ),
        _WANG: _table(
            _ROBERTA,
            "75.45 0.51|88.73 0.35|64.26 1.00|80.89 0.24|75.49 1.60",
            "8.97 0.98|3.30 0.19|13.03 0.85|7.83 0.27|2.90 0.12",
            "0.48 0.01|0.26 0.00|0.67 0.01|0.46 0.01|0.51 0.01",
        ),
    },
    (_KTH, _WANG),
    "The published setting is RoBERTa-base, 5,000 steps of batch 32.",
)

_LLAMA_2 = ("winogrande_s", "arc_challenge", "arc_easy", "winogrande_m", "openbookqa", "boolq")


def _llama(cells: str) -> Table:
    """`ACC/ECE/NLL` of the six tasks; stds were not given."""
    table: Table = {}
    for task, cell in zip(_LLAMA_2, cells.split(), strict=True):
        values = [float(value) for value in cell.split("/")]
        scaled = (values[0] / 100, values[1] / 100, values[2])
        table[task] = {metric: Spread(value, float("nan"), 3) for metric, value in zip(METRICS, scaled, strict=True)}
    return table


MULTIPLE_CHOICE = Experiment(
    "multiple_choice",
    "Experiment V: multiple choice",
    "run_multiple_choice_blob",
    tuple(multiple_choice.TASKS),
    _LLAMA_2,
    {
        f"published {name}, Llama-2-7B [C]": _llama(cells)
        for name, cells in (
            ("MAP", "69.4/29.8/2.86 67.7/30.6/3.07 85.2/13.5/1.13 74.6/23.0/1.26 81.6/15.3/1.04 87.7/5.9/.34"),
            ("MC dropout", "69.1/28.5/2.50 66.7/29.6/2.81 85.5/12.7/1.13 75.9/20.7/1.16 81.5/14.3/1.01 87.7/5.1/.32"),
            ("ensemble", "69.0/28.7/2.44 68.6/27.8/2.20 86.2/11.9/.91 77.4/18.7/1.04 82.2/14.0/.87 88.1/5.2/.32"),
            ("BLoB", "66.6/11.2/.66 66.7/10.8/.88 84.6/4.3/.44 73.4/4.5/.54 81.4/3.8/.51 86.6/1.5/.31"),
            ("TFB", "66.8/9.4/.62 67.6/7.4/.86 84.5/3.0/.42 73.1/4.1/.56 81.1/5.9/.50 86.4/5.4/.34"),
            ("C-LoRA", "66.2/7.9/.63 67.8/8.8/.88 84.4/4.3/.48 70.5/3.7/.57 78.3/4.0/.59 84.6/1.6/.35"),
        )
    },
    (),
    "The published setting is Llama-2-7B in 8 bits, 5,000 steps of batch 4; no stds were given with it.",
)
