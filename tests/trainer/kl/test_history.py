import pandas as pd
import torch

from blob_hf.trainer.kl.history import COLUMNS, KLHistory


def test_micro_batches_add_up_to_one_row_per_step(tmp_path):
    history = KLHistory()
    one = torch.tensor
    for step in (1, 2):
        for nll in (0.25, 0.5):
            history.add(step, one(nll), one(10.0 * step), 0.1, one(0.01))
    rows = history.drain(lambda values: values * 2)  # stands in for the mean over processes
    assert [row["step"] for row in rows] == [1, 2] and history.drain(lambda values: values) == []
    assert [row["nll"] for row in rows] == [1.5, 1.5]
    assert [row["kl_loss"] for row in rows] == [1.0, 2.0] and rows[1]["elbo"] == 21.5
    history.save(tmp_path / "kl.csv")
    assert tuple(pd.read_csv(tmp_path / "kl.csv").columns) == COLUMNS
    again = KLHistory()
    again.load(tmp_path / "kl.csv")
    assert again.rows == rows
