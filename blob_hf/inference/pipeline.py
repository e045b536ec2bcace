"""transformers' `pipeline("text-classification", ...)` with a `BlobModel`: its posterior mean, or its predictive.

`pipeline("text-classification", model=model, tokenizer=tokenizer)` calls the model as any other and so answers with the
posterior mean; with `pipeline_class=PredictivePipeline` it answers with the posterior predictive, as `model.predict`
does.
"""

from typing import Any

import numpy as np
import torch
from transformers import TextClassificationPipeline
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from blob_hf.tuner.build import task_class_names
from blob_hf.tuner.model import BlobModel
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError

# A pipeline names a class that it does not know in an error of two pages, and then works. PEFT's classes it knows.
for _names in SUPPORTED_PEFT_TASKS.values():
    _names += [own for peft, own in task_class_names().items() if peft in _names and own not in _names]
for _task in ("text-classification", "sentiment-analysis"):
    SUPPORTED_PEFT_TASKS[_task] += ["BlobModel"]  # a classifier whose head LoRA is attached to


class PredictivePipeline(TextClassificationPipeline):
    """A text classification pipeline whose scores are the posterior predictive's, those of `model.predict_proba`.

    `pipeline("text-classification", model=BlobModel.from_pretrained("user/repo"), tokenizer=tokenizer,
    pipeline_class=PredictivePipeline)`; `sampling=Sampling(20)` or a number there or in a call, default 10 samples.

    Raises:
        BlobError: The model is not a `BlobModel` (of a folder's name transformers loads the posterior mean alone).
    """

    def __init__(self, **kwargs: Any) -> None:
        if not isinstance(kwargs.get("model"), BlobModel):
            raise BlobError(
                "PredictivePipeline needs a BlobModel, and transformers made a plain model of this name: pass "
                "model=BlobModel.from_pretrained(name)"
            )
        super().__init__(**kwargs)

    def _sanitize_parameters(
        self,
        function_to_apply: Any = None,
        top_k: Any = "",
        sampling: Sampling | int | str | None = None,
        **tokenizer: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before, _, after = super()._sanitize_parameters(function_to_apply, top_k, **tokenizer)
        return before, {} if sampling is None else {"sampling": sampling}, after

    def _forward(self, model_inputs: Any, sampling: Sampling | int | str = Sampling()) -> Any:  # type: ignore[override]  # noqa: B008
        model: Any = self.model
        probabilities = model.predict_proba(model_inputs, self.tokenizer, sampling)
        # a softmax makes of log-probabilities the probabilities
        logits: torch.Tensor = torch.from_numpy(np.log(probabilities))
        return SequenceClassifierOutput(logits=logits)  # type: ignore[arg-type]
