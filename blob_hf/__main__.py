"""The `blob` command; `COMMANDS` has what comes after it."""

import sys
from collections.abc import Callable, Sequence

from blob_hf.utils.errors import BlobError


def _classify(argv: Sequence[str]) -> None:
    _script("run_glue_blob", argv)


def _summarize(argv: Sequence[str]) -> None:
    _script("run_summarization_blob", argv)


def _choose(argv: Sequence[str]) -> None:
    _script("run_multiple_choice_blob", argv)


def _sft(argv: Sequence[str]) -> None:
    _script("run_sft_blob", argv)


def _script(name: str, argv: Sequence[str]) -> None:
    """One of the scripts, as `python NAME.py` runs it."""
    import runpy

    sys.argv = [f"{name}.py", *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)  # Trainer pickles arguments by the name of their module


def _predict(argv: Sequence[str]) -> None:
    from blob_hf.cli.predict import main

    main(argv)


def _acquire(argv: Sequence[str]) -> None:
    from blob_hf.cli.acquire import main

    main(argv)


def _distil(argv: Sequence[str]) -> None:
    from blob_hf.cli.distil import main

    main(argv)


def _convert(argv: Sequence[str]) -> None:
    from blob_hf.cli.convert import main

    main(argv)


def _tfb(argv: Sequence[str]) -> None:
    from blob_hf.cli.tfb import main

    main(argv)


def _lm_eval(argv: Sequence[str]) -> None:
    from blob_hf.lm_eval.__main__ import main

    main(argv)


def _app(argv: Sequence[str]) -> None:
    from blob_hf.app.command import main

    main(argv)


def _experiments(argv: Sequence[str]) -> None:
    from blob_hf.experiments.__main__ import main

    main(list(argv))


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "classify": ("fine-tune and evaluate a classifier (run_glue_blob.py)", _classify),
    "summarize": ("fine-tune and evaluate a summarizer (run_summarization_blob.py)", _summarize),
    "choose": ("fine-tune and evaluate a language model on multiple choice (run_multiple_choice_blob.py)", _choose),
    "sft": ("fine-tune and evaluate a causal model on texts or conversations (run_sft_blob.py)", _sft),
    "predict": ("labels or summaries for new texts, with their uncertainty", _predict),
    "acquire": ("which rows of a pool to label next", _acquire),
    "distil": ("one plain LoRA adapter that answers as a posterior does, at one forward", _distil),
    "convert": ("turn a checkpoint of the BLoB authors' code into an adapter", _convert),
    "tfb": ("give a trained LoRA adapter a posterior without training", _tfb),
    "lm-eval": ("lm-evaluation-harness, with the model blob", _lm_eval),
    "app": ("a page to look at an adapter or a run in the browser", _app),
    "experiments": ("run an experiment: study, active, glue, sensitivity, mean, sampling", _experiments),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command."""
    from blob_hf.cli.terminal import user_errors

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {about}" for name, (about, _) in COMMANDS.items()]
        print("\n".join(["usage: blob COMMAND ...", "", *lines, "", "blob COMMAND --help has a command's arguments."]))
        return
    with user_errors():
        if argv[0] not in COMMANDS:
            raise BlobError(f"name a command, one of {', '.join(COMMANDS)}; got {argv[0]}")
        COMMANDS[argv[0]][1](argv[1:])


if __name__ == "__main__":
    main()
