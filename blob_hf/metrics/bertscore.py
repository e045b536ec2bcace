"""BERTScore F1 (Zhang et al., ICLR 2020) with any encoder, each distinct pair once, cached on disk.

The scores are torchmetrics', which is maintained; bert-score 0.3.13 overflows on DeBERTa tokenizers with transformers
5 (bert_score issue 205) and stops at empty texts. The baselines of `rescale_with_baseline` come from the bert-score
package when it is installed (`pip install blob_hf[bertscore]`).
"""

import hashlib
import importlib.util
import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.text.bert import bert_score
from transformers import AutoModel, AutoTokenizer

from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

logger = logging.getLogger(__name__)

PUBLISHED_MODEL = "microsoft/deberta-xlarge-mnli"
_PUBLISHED_LAYERS = {PUBLISHED_MODEL: 40}  # the layer that bert-score uses; others: the last one
_LONGEST = 512


class BertScorer:
    """Scores candidates against references with one encoder.

    Args:
        model_name_or_path: Hub id or folder of an encoder.
        num_layers: Layer whose representations are compared; default bert-score's for the published model, else the
            last.
        cache: SQLite file that keeps scores between runs; None keeps them in this object alone.
        batch_size: Pairs per forward.
        device: Where the encoder runs.
    """

    def __init__(
        self,
        model_name_or_path: str = PUBLISHED_MODEL,
        num_layers: int | None = None,
        cache: Path | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.name, self.batch_size, self.device = model_name_or_path, batch_size, device
        with fetching("BERTScore model", model_name_or_path, "--bertscore_model"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_name_or_path)
            self.model: Any = AutoModel.from_pretrained(model_name_or_path, dtype=torch.float32)
        self.num_layers = num_layers or _PUBLISHED_LAYERS.get(model_name_or_path, self.model.config.num_hidden_layers)
        # some tokenizers have no limit (a number too large for the Rust tokenizer), and the model has one
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, _LONGEST)
        self.baseline = _baseline_file(model_name_or_path)
        if self.baseline is None:
            logger.warning("BERTScore with %s is not rescaled: there is no baseline for it", model_name_or_path)
        self._cache = _Cache(cache, f"{model_name_or_path}/{self.num_layers}/{self.baseline is not None}")

    @property
    def description(self) -> str:
        """Which scores these are, for reports."""
        return f"BERTScore F1, {self.name}, layer {self.num_layers}, {'' if self.baseline else 'not '}rescaled"

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """F1 of each candidate against its reference, `(pairs,)`. An empty text matches nothing (0 before rescaling).

        Raises:
            BlobError: Unequal lengths.
        """
        if len(candidates) != len(references):
            raise BlobError(f"got {len(candidates)} candidates but {len(references)} references")
        pairs = list(zip(candidates, references, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._cache]
        new.sort(key=lambda pair: max(map(len, pair)))  # batches of similar lengths
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            self._cache.add(batch, self._score(batch))
        return np.array([self._cache[pair] for pair in pairs])

    def _score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        # an empty text stands in as any text, and its score is set afterwards
        empty = [not (a.strip() and b.strip()) for a, b in pairs]
        texts = [(a.strip() or "-", b.strip() or "-") for a, b in pairs]
        longest = max(map(len, self.tokenizer([text for pair in texts for text in pair], truncation=True).input_ids))
        found = bert_score(
            [a for a, _ in texts],
            [b for _, b in texts],
            model=self.model,
            user_tokenizer=self.tokenizer,
            num_layers=self.num_layers,
            device=self.device,
            max_length=longest,
            batch_size=self.batch_size,
            truncation=True,
            rescale_with_baseline=self.baseline is not None,
            baseline_path=None if self.baseline is None else str(self.baseline),
        )
        scores = torch.as_tensor(found["f1"]).flatten().tolist()
        return [self._lowest if is_empty else score for is_empty, score in zip(empty, scores, strict=True)]

    @property
    def _lowest(self) -> float:
        """An F1 of 0, rescaled like the others."""
        if self.baseline is None:
            return 0.0
        offset = float(self.baseline.read_text(encoding="utf-8").splitlines()[1 + self.num_layers].split(",")[-1])
        return -offset / (1 - offset)


def _baseline_file(model: str) -> Path | None:
    package = importlib.util.find_spec("bert_score")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "rescale_baseline" / "en" / f"{model}.tsv"
    return file if file.is_file() else None


class _Cache:
    """Scores by pair of texts, in memory and in a SQLite file that several runs may share."""

    def __init__(self, path: Path | None, scorer: str) -> None:
        self._scorer, self._known = scorer, dict[tuple[str, str], float]()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path or ":memory:", timeout=60)
        with self._database:
            self._database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL)")

    def _key(self, pair: tuple[str, str]) -> str:
        return hashlib.sha256(json.dumps([self._scorer, *pair]).encode()).hexdigest()

    def __contains__(self, pair: tuple[str, str]) -> bool:
        if pair not in self._known:
            row = self._database.execute("SELECT score FROM scores WHERE key = ?", (self._key(pair),)).fetchone()
            if row is not None:
                self._known[pair] = row[0]
        return pair in self._known

    def __getitem__(self, pair: tuple[str, str]) -> float:
        return self._known[pair]

    def add(self, pairs: Iterable[tuple[str, str]], scores: Sequence[float]) -> None:
        new = dict(zip(pairs, scores, strict=True))
        self._known.update(new)
        with self._database:
            rows = [(self._key(pair), score) for pair, score in new.items()]
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
