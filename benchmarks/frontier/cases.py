"""What the networks of an adapter predict for labelled rows, drawn in every way: kept in files."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.data.summarization import DEFAULT_PROMPT
from blob_hf.inference.choices import ChoiceRows, ChoiceScoring, choice_rows
from blob_hf.inference.inputs import Rows, find_tokenizer, rows_of
from blob_hf.inference.predict import IGNORED_LABEL, sample_log_probs, sample_outputs, token_log_probs
from blob_hf.tuner.in_flight import Frozen, fixed
from blob_hf.tuner.posterior import gaussian_layers, posterior_mean
from blob_hf.tuner.stacks import layer_stacks

DRAWN = {"iid": 36, "antithetic": 32, "qmc": 32}  # together the reference
TRUNK_SAMPLES, BATCH = 10, 25


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
    def trunks(self) -> list[int]:
        """In how many last layers the samples of each shared trunk differ."""
        return sorted(int(name.split()[1]) for name in self.kept if name.startswith("trunk"))

    @property
    def writes(self) -> bool:
        """Whether what is scored are the tokens of texts."""
        return bool(self.kept.get("writes", False))


def collect(
    case: Case, model: BlobModel, rows: Rows | ChoiceRows, labels: NDArray[np.int64], drawn: dict[str, int],
    closed_form: bool = False, trunks: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Have the networks of every way predict the rows, the labelled ones first.

    Args:
        drawn: How many samples, by the way they are drawn.
        closed_form: Also the linearised network.
        trunks: In how many last layers samples differ that share what is below; default: in 1, 2, ..., all but one.
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
    for k in trunks or range(1, case.layers):
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


# ----- adapters and rows ------------------------------------------------------------------------------------------


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
    names: dict[str, int] = getattr(model.get_base_model().config, "label2id", None) or {}
    labels = np.array([names.get(row["label"], row["label"]) for row in rows])
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


def tiny(case: Case, trunks: Sequence[int] | None = None) -> None:
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
    collect(case, model.requires_grad_(False), rows, np.arange(12) % 3, DRAWN, closed_form=True, trunks=trunks)
    case.keep("student", lambda: predictions(model, in_order(model, rows), Sampling(0)))  # the mean in its place
