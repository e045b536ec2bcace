"""lm-evaluation-harness with a posterior: a model `blob`, and a task for own questions of multiple choice.

`python -m blob_hf.lm_eval` is the harness's own command, which knows both. Importing this needs no harness.
"""

from importlib.util import find_spec
from pathlib import Path

from blob_hf.utils.errors import BlobError

MODEL = "blob"
TASKS = Path(__file__).parent  # for the harness's include_path


def register() -> None:
    """Make `blob` one of the harness's models, for `lm_eval.simple_evaluate(model="blob", ...)`.

    Raises:
        BlobError: The harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise BlobError("lm-evaluation-harness is not installed; pip install 'blob_hf[lm-eval]'")
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="blob_hf.lm_eval.model:BlobLM")
