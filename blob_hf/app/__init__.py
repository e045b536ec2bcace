"""A page to look at an adapter with: `blob app`.

What is shown is made by plain functions of predictions (`class_view`, `text_view`, `run_view`) and turned into HTML
(`markup`, `class_markup`, `text_markup`, `run_markup`); only `pages/` and `serving` import Gradio, through
`require_gradio`. No number is computed here: all come from `model.predict`, `blob_hf.metrics` and the files of a run.
"""

import os

from blob_hf.utils.errors import BlobError


def require_gradio() -> None:
    """Refuse to go on without Gradio; what it would tell its makers is switched off.

    Raises:
        BlobError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise BlobError("the page is made with Gradio, which is not installed: pip install 'blob_hf[app]'") from error
