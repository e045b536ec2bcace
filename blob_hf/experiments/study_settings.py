"""The settings of the study: a task, so many training rows, and how long LoRA trains on them.

In the first group LoRA overfits: 20 passes or more over at most 1,000 rows. In the second it does not. Every seed draws
training and held-out rows of its own; the test rows are the same for all. Only short texts are taken (`max_words`),
so that most runs take a minute or two on one core; those of MRPC and RTE take several.
"""

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

TEST_ROWS, OOD_ROWS = 250, 100


@dataclass(frozen=True)
class Setting:
    """A task at a size.

    Attributes:
        overfits: Whether LoRA is expected to overfit (the report shows whether it does).
        train, test: Files of the data folder, jsonl or jsonl.gz.
        rows, held_out: Training rows, and rows held out for what is fitted or stopped by them.
        steps, batch_size, learning_rate: Of the training.
        max_words: Only rows whose texts have so many words, together, are taken.
        columns: Text columns.
        task: Of the paper, where it says how the texts are put together.
        classes: Names of the classes that are taken, each with equally many training rows; none: all rows as they come.
        ood: File of inputs that belong to none of the classes.
        targets: Target modules; none: the model's preset.
        noise: Share of the rows, of training, held-out and test rows alike, that have another class's label.
    """

    name: str
    overfits: bool
    train: str
    test: str
    rows: int
    held_out: int
    steps: int
    learning_rate: float
    max_words: int
    columns: tuple[str, ...]
    batch_size: int = 16
    task: str | None = None
    classes: tuple[str, ...] = ()
    ood: str | None = None
    targets: tuple[str, ...] = ()
    noise: float = 0.0

    @property
    def passes(self) -> float:
        """How often the training sees each row."""
        return self.steps * self.batch_size / self.rows


def _names(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_TRANSFERS = _names(
    "transfer_fee_charged transfer_into_account transfer_not_received_by_recipient transfer_timing pending_transfer "
    "failed_transfer declined_transfer cancel_transfer beneficiary_not_allowed balance_not_updated_after_bank_transfer"
)
_PAYMENTS = _names(
    "cash_withdrawal_charge cash_withdrawal_not_recognised declined_cash_withdrawal pending_cash_withdrawal "
    "wrong_amount_of_cash_received wrong_exchange_rate_for_cash_withdrawal card_payment_fee_charged "
    "card_payment_not_recognised card_payment_wrong_exchange_rate declined_card_payment pending_card_payment "
    "reverted_card_payment?"
)
_TOP_UPS = _names(
    "automatic_top_up pending_top_up top_up_failed top_up_limits top_up_reverted verify_top_up topping_up_by_card "
    "top_up_by_bank_transfer_charge top_up_by_card_charge top_up_by_cash_or_cheque verify_my_identity "
    "why_verify_identity"
)
_ACCOUNT = _names(
    "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate min_payment bill_balance "
    "transfer order_checks balance spending_history transactions report_fraud"
)
_BANKING: dict[str, Any] = {
    "train": "intent/banking77/train.jsonl", "test": "intent/banking77/test.jsonl", "columns": ("text",),
    "classes": _TRANSFERS, "ood": "intent/clinc150/oos_test.jsonl", "max_words": 12, "targets": ("query", "value"),
}  # fmt: skip
_PAYMENT = {**_BANKING, "classes": _PAYMENTS}
_TOP_UP = {**_BANKING, "classes": _TOP_UPS}
_CLINC: dict[str, Any] = {
    "train": "intent/clinc150/train.jsonl", "test": "intent/clinc150/test.jsonl", "columns": ("text",),
    "classes": _ACCOUNT, "ood": "intent/clinc150/oos_test.jsonl", "max_words": 10, "targets": ("query", "value"),
}  # fmt: skip
_COLA: dict[str, Any] = {
    "train": "glue/cola/train.jsonl", "test": "glue/cola/validation.jsonl", "columns": ("sentence",), "task": "cola",
    "max_words": 10,
}  # fmt: skip
_PAIR: dict[str, Any] = {"columns": ("sentence1", "sentence2")}
_WIC = {**_PAIR, "train": "super_glue/wic/train.jsonl", "test": "super_glue/wic/validation.jsonl", "task": "wic"}
_MRPC = {**_PAIR, "train": "glue/mrpc/train.jsonl", "test": "glue/mrpc/validation.jsonl", "max_words": 48}
_RTE = {**_PAIR, "train": "glue/rte/train.jsonl", "test": "glue/rte/validation.jsonl", "max_words": 48}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("wic-128", True, rows=128, held_out=32, steps=160, learning_rate=2e-3, max_words=16, **_WIC),
        Setting("cola-128", True, rows=128, held_out=32, steps=160, learning_rate=2e-3, **_COLA),
        Setting("banking-60", True, rows=60, held_out=30, steps=160, learning_rate=5e-3, **_BANKING),
        Setting("payments-120", True, rows=120, held_out=36, steps=400, learning_rate=5e-3, noise=0.2, **_PAYMENT),
        Setting("top-ups-120", True, rows=120, held_out=36, steps=400, learning_rate=5e-3, noise=0.2, **_TOP_UP),
        Setting("mrpc-256", True, rows=256, held_out=64, steps=500, learning_rate=2e-3, **_MRPC),
        Setting("rte-256", True, rows=256, held_out=64, steps=500, learning_rate=2e-3, **_RTE),
        Setting("mrpc-1000", True, rows=1000, held_out=100, steps=1250, learning_rate=2e-3, **_MRPC),
        Setting("banking-200", False, rows=200, held_out=50, steps=150, learning_rate=2e-3, **_BANKING),
        Setting("clinc-150", False, rows=150, held_out=45, steps=150, learning_rate=2e-3, **_CLINC),
        Setting("cola-800", False, rows=800, held_out=80, steps=100, learning_rate=1e-3, **_COLA),
    )
}


# ----- its rows ---------------------------------------------------------------------------------------------------


def write_rows(setting: Setting, seeds: Sequence[int], data_dir: Path, folder: Path) -> None:
    """Draw the rows of a setting into `folder`: test.jsonl, ood.jsonl, seed{n}/train.jsonl and seed{n}/held_out.jsonl.

    What is there already is left as it is.

    Raises:
        BlobError: A file is missing, or has too few rows.
    """
    pool = shuffled(fitting(setting, data_dir / setting.train), f"{setting.name}/pool")
    test = shuffled(fitting(setting, data_dir / setting.test), f"{setting.name}/test")[:TEST_ROWS]
    spare = TEST_ROWS - len(test)  # filled up with training rows, which are then never trained on
    if not setting.classes:
        test, pool = test + pool[:spare], pool[spare:]
    write_once(folder / "test.jsonl", sorted(test, key=lambda row: count_words(row, setting)))  # like lengths together
    if setting.ood:
        rows = read_rows(data_dir / setting.ood)
        short = [{"text": row["text"]} for row in rows if count_words(row, setting) <= setting.max_words]
        drawn = shuffled(short, f"{setting.name}/ood")[:OOD_ROWS]
        write_once(folder / "ood.jsonl", sorted(drawn, key=lambda row: count_words(row, setting)))
    for seed in seeds:
        drawn = _balanced(setting, shuffled(pool, f"{setting.name}/{seed}"))
        if len(drawn) < setting.rows + setting.held_out:
            raise BlobError(f"{setting.train} has too few short rows for {setting.name}: {len(drawn)}")
        write_once(folder / f"seed{seed}" / "train.jsonl", drawn[: setting.rows])
        write_once(folder / f"seed{seed}" / "held_out.jsonl", drawn[setting.rows : setting.rows + setting.held_out])


def fitting(setting: Setting, path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a setting takes, by class and length."""
    rows = (row for row in read_rows(path) if not setting.classes or row["label"] in setting.classes)
    return [_mislabelled(row, setting) for row in rows if count_words(row, setting) <= setting.max_words]


def _mislabelled(row: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The row with its label, or with a share `noise` of them that of another class: always the same for one text."""
    drawn = random.Random("/".join((setting.name, *(row[column] for column in setting.columns))))
    if drawn.random() >= setting.noise:
        return row
    return {**row, "label": drawn.choice([name for name in setting.classes if name != row["label"]])}


def count_words(row: dict[str, Any], setting: Setting) -> int:
    """Of all texts of a row."""
    return sum(len(row[column].split()) for column in setting.columns)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of a jsonl file, or of one that is packed (.gz).

    Raises:
        BlobError: There is neither.
    """
    if not path.is_file():
        path = path.with_name(path.name + ".gz")
    if not path.is_file():
        raise BlobError(f"{path.with_suffix('')} does not exist; --data_dir is the folder of the tasks' files")
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def shuffled(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """In an order that the key names."""
    return random.Random(key).sample(rows, len(rows))


def _balanced(setting: Setting, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each class equally many among the training rows; the others come as they are."""
    if not setting.classes:
        return rows
    share, seen = setting.rows // len(setting.classes), Counter[str]()
    first: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for row in rows:
        seen[row["label"]] += 1
        (first if seen[row["label"]] <= share else rest).append(row)
    return first + rest


def write_once(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A jsonl file, if it is not there yet."""
    if not path.is_file():
        files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
