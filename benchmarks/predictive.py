"""What a cheaper predictive costs and loses: the frontier of docs/predictive_cost.md.

    python benchmarks/predictive.py --case NAME ADAPTER TEST [OUT_OF_SCOPE] --case ... --cache FOLDER --plot FILE

A case is an adapter with rows (jsonl): of a classifier texts and a label's id, and perhaps rows that belong to no
class; of multiple choice question, choices and label; of a summarizer dialogue and summary, whose every token is scored
after those before it. Cases of one name are seeds of one setting. `--student STUDENT ...` are what `blob distil` has
made of the adapters, in the order of the cases: one forward each. What a case's networks predict is kept in FOLDER: a
run that was stopped goes on, and the tables are made again without a model. The costs are counted in plain forwards,
and measured in processor time, which other processes on the machine change less than the clock.

Every way of predicting is scored on as many disjoint or random sets of samples as there are, so that its row is its
expectation. The reference is the average of all networks that were drawn, 100 or more.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.data.summarization import DEFAULT_PROMPT
from blob_hf.inference.choices import ChoiceRows, ChoiceScoring, choice_rows
from blob_hf.inference.inputs import Rows, find_tokenizer, rows_of
from blob_hf.inference.predict import IGNORED_LABEL, sample_log_probs, sample_outputs, token_log_probs
from blob_hf.inference.settling import settle
from blob_hf.metrics.calibration import ece, nll
from blob_hf.metrics.detection import detection_metrics
from blob_hf.metrics.uncertainty import predictive_entropy
from blob_hf.tuner.in_flight import Frozen, fixed
from blob_hf.tuner.posterior import gaussian_layers, posterior_mean
from blob_hf.tuner.stacks import layer_stacks

DRAWN = {"iid": 36, "antithetic": 32, "qmc": 32}  # together the reference
TRUNK_SAMPLES, BATCH = 10, 25
TOLERANCES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
Scores = NDArray[np.float64]


# ----- what the networks of a case predict ------------------------------------------------------------------------


@dataclass
class Case:
    """An adapter on its rows.

    Attributes:
        kept: Log-probabilities `(rows, samples, classes)` by way of drawing; labels; `seconds/...` of processor time.
    """

    name: str
    file: Path
    kept: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.is_file():
            with np.load(self.file) as found:
                self.kept = dict(found)

    def keep(self, name: str, make: Callable[[], NDArray[Any]]) -> None:
        """What `make` gives, and the processor time it took, unless it is there already."""
        if name not in self.kept:
            start = time.process_time()
            self.kept[name] = make()
            self.kept[f"seconds/{name}"] = np.array(time.process_time() - start)
            np.savez_compressed(self.file, **self.kept)  # type: ignore[arg-type]

    @property
    def layers(self) -> int:
        return int(self.kept["layers"])

    @property
    def writes(self) -> bool:
        """Whether what is scored are the tokens of texts."""
        return bool(self.kept.get("writes", False))


def collect(
    case: Case, model: BlobModel, rows: Rows | ChoiceRows, labels: NDArray[np.int64], drawn: dict[str, int],
    closed_form: bool = False,
) -> None:  # fmt: skip
    """Have the networks of every way predict the rows, the labelled ones first.

    Args:
        drawn: How many samples, by the way they are drawn.
        closed_form: Also the linearised network.
    """
    batches = in_order(model, rows)

    def predicted(sampling: Sampling) -> NDArray[np.float32]:
        return predictions(model, batches, sampling)

    layers, writes = sum(map(len, layer_stacks(model))), isinstance(rows, Rows) and "labels" in rows.columns
    case.kept |= {"labels": labels, "layers": np.array(layers), "writes": np.array(writes)}
    predicted(Sampling(0))  # the first one is slower
    for repeat in range(3):
        case.keep("mean" if not repeat else f"mean again {repeat}", lambda: predicted(Sampling(0)))
    for draw, count in drawn.items():
        case.keep(draw, lambda draw=draw, count=count: predicted(Sampling(count, 7, draw)))
    if closed_form:
        case.keep("linearized", lambda: linearized(model, batches, len(rows)))
    for k in range(1, case.layers):
        wanted = Sampling(TRUNK_SAMPLES, 7, "antithetic", layers=k)
        case.keep(f"trunk {k}", lambda wanted=wanted: predicted(wanted))


Batches = list[tuple[list[int], dict[str, Any]]]  # indices of rows, and these rows


def in_order(model: BlobModel, rows: Rows | ChoiceRows) -> Batches:
    return [(indices, rows.batch(indices, model.device)) for indices in rows.batches(BATCH)]


def predictions(model: BlobModel, batches: Batches, sampling: Sampling) -> NDArray[np.float32]:
    """Log-probabilities `(rows, samples, classes)`, in the order of the rows; of texts a token is a row."""
    found: dict[int, NDArray[np.float32]] = {}
    for indices, batch in batches:
        if "labels" in batch:
            found |= zip(indices, of_tokens(model, batch, sampling), strict=True)
        else:
            found |= zip(indices, sample_log_probs(model, batch, sampling).numpy()[:, None], strict=True)
    return np.concatenate([found[index] for index in range(len(found))])


@torch.no_grad()
def of_tokens(model: BlobModel, batch: dict[str, Any], sampling: Sampling) -> list[NDArray[np.float32]]:
    """Of each text log p and log(1 - p) of its tokens, `(tokens, samples, 2)`."""
    labels = batch["labels"]
    with posterior_mean(model) if not sampling.num_samples else nullcontext():
        outputs = sample_outputs(model, batch, sampling) if sampling.num_samples else [model(**batch)]
        each = [token_log_probs(one, labels) for output in outputs for one in output.logits.split(len(labels))]
    right = torch.stack(each, dim=2)
    both = torch.stack([right, torch.log1p(-right.exp().clamp(max=1 - 1e-6))], dim=3).numpy()
    return [both[row][labels[row] != IGNORED_LABEL] for row in range(len(labels))]


def linearized(model: BlobModel, batches: Batches, count: int) -> NDArray[np.float32]:
    """Mean and covariance of the logits under the network linearised at the mean, `(rows, classes, 1 + classes)`.

    Cov = sum_j (d logit / d A_j)(d logit / d A_j)' Omega_j^2 (MacKay, 1992; Immer et al., 2021): one forward, and one
    backward pass for each class, in which every row has a copy of A.
    """
    found: dict[int, NDArray[np.float32]] = {}
    layers = list(gaussian_layers(model).values())
    for indices, batch in batches:
        copies = [layer.weight.detach().expand(len(indices), -1, -1).clone().requires_grad_() for layer in layers]
        with torch.enable_grad(), posterior_mean(model), fixed(dict(zip(layers, map(Frozen, copies), strict=True))):
            logits = model(**batch).logits.float()
            jacobians = [
                torch.autograd.grad(logits[:, c].sum(), copies, retain_graph=True) for c in range(logits.shape[1])
            ]
        covariance = torch.zeros(len(indices), logits.shape[1], logits.shape[1])
        for layer, gradients in zip(layers, zip(*jacobians, strict=True), strict=True):
            scaled = torch.stack([gradient * layer.std.detach() for gradient in gradients], 1).flatten(2)
            covariance += scaled @ scaled.transpose(1, 2)
        both = torch.cat([logits.detach().unsqueeze(2), covariance], dim=2)
        found |= zip(indices, both.numpy(), strict=True)
    return np.stack([found[index] for index in range(count)])


# ----- ways to predict --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to predict: its cost in plain forwards, and log-probabilities `(rows, classes)` of independent trials."""

    name: str
    cost: float
    trials: list[Scores]


def averaged(samples: NDArray[Any]) -> Scores:
    """log mean_s p_s."""
    return logsumexp(samples.astype(np.float64), axis=1) - np.log(samples.shape[1])


def windows(samples: NDArray[Any], count: int) -> Iterator[NDArray[Any]]:
    for start in range(0, samples.shape[1] - count + 1, count):
        yield samples[:, start : start + count]


def ways(case: Case) -> Iterator[Way]:
    """All of a case, the reference last."""
    kept, total = case.kept, case.layers
    rng = np.random.default_rng(0)
    yield Way("N=0", 1, [averaged(kept["mean"])])
    for count in range(1, 11):
        chosen = [rng.choice(kept["iid"].shape[1], count, replace=False) for _ in range(40)]
        yield Way(f"iid N={count}", count, [averaged(kept["iid"][:, own]) for own in chosen])
    for draw in ("antithetic", "qmc"):
        for count in (2, 4, 6, 8, 10):
            yield Way(f"{draw} N={count}", count, [averaged(one) for one in windows(kept[draw], count)])
    for k in range(1, total):
        samples, share = kept[f"trunk {k}"], k / total
        for count in (4, 6, 10):
            trials = [averaged(one) for one in windows(samples, count)]
            yield Way(f"trunk k={k} N={count}", 1 + (count - 1) * share, trials)
    enough = kept["antithetic"].shape[1] >= Sampling.auto().num_samples
    for tolerance in TOLERANCES if enough and not case.writes else ():  # a text has no one probability that settles
        yield automatic(f"auto {tolerance:g}", kept["antithetic"], tolerance)
    if "student" in kept:
        yield Way("distilled", 1, [averaged(kept["student"])])
    if "linearized" in kept:
        yield from closed_forms(kept["linearized"], rng)
    every = np.concatenate([kept[draw] for draw in DRAWN], axis=1)
    yield Way("reference", every.shape[1], [averaged(every)])


def automatic(name: str, samples: NDArray[Any], tolerance: float) -> Way:
    """As many samples as needed, of those that were drawn."""
    sampling = Sampling.auto(tolerance)
    trials, costs = [], []
    for pool in windows(samples, sampling.num_samples):
        found = settle(
            len(pool), sampling, lambda rows, part, pool=pool: pool[list(rows)][:, part.first : part.indices.stop]
        )
        trials.append(averaged(found.log_probs))
        costs.append(found.networks.mean())
    return Way(name, float(np.mean(costs)), trials)


def closed_forms(moments: NDArray[Any], rng: np.random.Generator) -> Iterator[Way]:
    mean, covariance = moments[..., 0].astype(np.float64), moments[..., 1:].astype(np.float64)
    classes = mean.shape[1]
    # a backward pass through frozen weights costs about what a forward does
    cost = 1 + classes
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    yield Way("closed form, probit", cost, [log_softmax(mean / np.sqrt(1 + np.pi / 8 * variance), axis=1)])
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0))[:, None]
    draws = mean[:, None] + rng.normal(size=(500, classes)) @ root.transpose(0, 2, 1)
    yield Way("closed form, integrated", cost, [averaged(log_softmax(draws, axis=2))])


# ----- what they lose ---------------------------------------------------------------------------------------------

METRICS = ("nll", "ece", "auroc")


def scored(log_probs: Scores, labels: NDArray[np.int64], writes: bool) -> dict[str, float]:
    count = len(labels)
    scores = log_softmax(log_probs, axis=1)
    found = {"nll": nll(scores[:count], labels)}
    if not writes:  # what else a token could have been was not kept
        found["ece"] = ece(scores[:count], labels)
    if len(scores) > count:
        entropy = predictive_entropy(scores[:, None])
        found["auroc"] = detection_metrics(entropy[:count], entropy[count:])["auroc"]
    return found


Table = dict[str, dict[str, float]]


def table_of(cases: list[Case]) -> Table:
    """By way: its cost, and the means of its metrics over the cases of a setting."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        for way in ways(case):
            values[way.name]["cost"].append(way.cost)
            each = [scored(trial, case.kept["labels"], case.writes) for trial in way.trials]
            for metric in each[0]:
                values[way.name][metric].append(float(np.mean([one[metric] for one in each])))
    whole = {name: found for name, found in values.items() if len(found["cost"]) == len(cases)}  # else not comparable
    return {name: {key: float(np.mean(one)) for key, one in found.items()} for name, found in whole.items()}


def kept_gain(table: Table, name: str, metric: str) -> float:
    """Of what iid N=10 gains over N=0 the share that a way keeps; NaN where it gains nothing."""
    none, ten = table["N=0"][metric], table["iid N=10"][metric]
    better = ten > none if metric == "auroc" else ten < none
    return (table[name][metric] - none) / (ten - none) if better and abs(ten - none) > 0.002 else float("nan")


def markdown(table: Table) -> str:
    lines = ["| way | forwards | NLL | of N=10's gain | ECE | of N=10's gain | AUROC | of N=10's gain |"]
    lines.append("| --- " + "| ---: " * 7 + "|")
    for name, found in table.items():
        cells = [name, f"{found['cost']:.1f}"]
        for metric in METRICS:
            gain = kept_gain(table, name, metric) if metric in found else float("nan")
            cells += [f"{found[metric]:.3f}" if metric in found else "", f"{gain:.0%}" if np.isfinite(gain) else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(cases: list[Case]) -> str:
    """Processor time in plain forwards over the count of forwards, medians over cases."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        plain = statistics.median(float(case.kept[key]) for key in case.kept if key.startswith("seconds/mean"))
        for name in case.kept:
            if f"seconds/{name}" in case.kept and "mean" not in name:
                samples = case.kept[name].shape[1]
                share = int(name.split()[1]) / case.layers if name.startswith("trunk") else 1
                counted = 1 + samples if name == "linearized" else 1 + (samples - 1) * share
                ratios[name].append(float(case.kept[f"seconds/{name}"]) / plain / counted)
    lines = ["| way | processor time over count |", "| --- | ---: |"]
    return "\n".join(lines + [f"| {name} | {statistics.median(values):.2f} |" for name, values in ratios.items()])


def plot(tables: dict[str, Table], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.6), squeeze=False)
    kinds = {
        "iid": ("iid", "o-"), "antithetic": ("antithetic", "s-"), "qmc": ("evenly spread (qmc)", "^:"),
        "trunk": ("shared trunk, N=6, k=1..L-1", "D-"), "auto": ("as many as needed", "v-"),
        "closed": ("closed form", "x"), "distilled": ("distilled", "P"),
    }  # fmt: skip
    for axis, (setting, table) in zip(axes[0], tables.items(), strict=True):
        for kind, (label, style) in kinds.items():
            names = [one for one in table if one.startswith(kind) and (kind != "trunk" or one.endswith("N=6"))]
            points = sorted((table[one]["cost"], table[one]["nll"]) for one in names)
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
        axis.plot(1, table["N=0"]["nll"], "k*", label="posterior mean, N=0")
        axis.axhline(table["reference"]["nll"], color="grey", linewidth=0.8, label="all networks that were drawn")
        axis.set(title=setting, xlabel="cost, plain forwards", xlim=(0.5, 11), ylabel="NLL, nats")
        top = max(table["N=0"]["nll"], table["iid N=2"]["nll"])
        axis.set_ylim(table["reference"]["nll"] * 0.97, top * 1.05)
    named = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    axes[0][-1].legend(named.values(), named.keys(), fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


# ----- the command ------------------------------------------------------------------------------------------------


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def texts_of(rows: list[dict[str, Any]]) -> list[Any]:
    names = [name for name in rows[0] if isinstance(rows[0][name], str) and name != "label"]
    return [row[names[0]] if len(names) == 1 else tuple(row[name] for name in names) for row in rows]


def load(adapter: str, test: str, outside: str | None = None) -> tuple[BlobModel, Rows | ChoiceRows, NDArray[np.int64]]:
    """An adapter, all rows, and the labels of the first of them."""
    rows = read(test)
    model = BlobModel.from_pretrained(adapter).eval().requires_grad_(False)
    if "summary" in rows[0]:
        return model, *summaries_of(model, rows)
    labels = np.array([row["label"] for row in rows])
    if "choices" in rows[0]:
        kept = model.companions[str(model.active_adapter)].values()
        scoring = next(one for one in kept if isinstance(one, ChoiceScoring))
        return model, choice_rows(rows, scoring, find_tokenizer(model)), labels
    texts = texts_of(rows) + (texts_of(read(outside)) if outside else [])
    return model, rows_of(model, texts, max_length=64), labels


def summaries_of(model: BlobModel, rows: list[dict[str, Any]]) -> tuple[Rows, NDArray[np.int64]]:
    """Dialogues with their summaries; the label of a token is 0: its own."""
    tokenizer = find_tokenizer(model)
    texts = rows_of(model, [row["dialogue"] for row in rows], prompt=DEFAULT_PROMPT, max_length=256)
    targets = tokenizer(text_target=[row["summary"] for row in rows], max_length=64, truncation=True).input_ids
    columns = texts.columns | {"labels": list(map(torch.tensor, targets))}
    found = Rows(columns, texts.padding | {"labels": IGNORED_LABEL})
    return found, np.zeros(sum(map(len, targets)), dtype=np.int64)


def ask(case: Case, student: str, files: list[str]) -> None:
    """Have a student of the case's adapter predict its rows."""
    model, rows, _ = load(student, *files)
    case.keep("student", lambda: predictions(model, in_order(model, rows), Sampling(0)))


def tiny(case: Case) -> None:
    """Nothing worth measuring: to see that this runs."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
    model = get_blob_model(base, BlobConfig(target_modules=["query", "value", "classifier"], init_eps=0.9)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=1.0)
    rows = Rows({"input_ids": list(torch.randint(1, 50, (20, 6)))}, {"input_ids": 0})
    collect(case, model.requires_grad_(False), rows, np.arange(12) % 3, DRAWN, closed_form=True)
    case.keep("student", lambda: predictions(model, in_order(model, rows), Sampling(0)))  # the mean in its place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", action="append", default=[], help="NAME ADAPTER TEST [OUT_OF_SCOPE]")
    parser.add_argument("--student", nargs="+", default=[], help="what was distilled of each case's adapter")
    parser.add_argument("--cache", default="predictive_cost", help="folder for what the networks predict")
    parser.add_argument(
        "--closed_form", action="store_true", help="also the linearised network: a backward pass a class"
    )
    parser.add_argument("--networks", type=int, default=100, help="drawn together by all ways, at least")
    parser.add_argument("--collect_only", action="store_true", help="no tables")
    parser.add_argument("--plot", help="file for the picture")
    parser.add_argument("--tiny", action="store_true", help="a model not worth measuring: to see that this runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = Path(tempfile.mkdtemp() if args.tiny else args.cache)
    cache.mkdir(parents=True, exist_ok=True)
    settings: dict[str, list[Case]] = defaultdict(list)
    students = args.student
    if students and len(students) != len(args.case):
        parser.error(f"{len(args.case)} cases have {len(students)} students; name one for each, in their order")
    for name, *files in [["tiny"]] if args.tiny else args.case:
        case = Case(name, Path(cache, f"{name}-{len(settings[name]) + 1}.npz"))
        settings[name].append(case)
        if f"trunk {int(case.kept.get('layers', 9)) - 1}" not in case.kept:
            drawn = {draw: max(10, count * args.networks // 100) for draw, count in DRAWN.items()}
            tiny(case) if args.tiny else collect(case, *load(*files), drawn, args.closed_form)
        if students and "student" not in case.kept:
            ask(case, students[sum(map(len, settings.values())) - 1], files[1:])
    if args.collect_only:
        return
    tables = {name: table_of(cases) for name, cases in settings.items()}
    for name, table in tables.items():
        print(f"\n{name}, {len(settings[name])} adapter(s)\n\n{markdown(table)}")
    print(f"\nMeasured\n\n{measured([case for cases in settings.values() for case in cases])}")
    if args.plot:
        plot(tables, Path(args.plot))


if __name__ == "__main__":
    main()
