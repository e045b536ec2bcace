"""Commands as a user runs them, in this process."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from blob_hf.__main__ import main as blob
from blob_hf.experiments.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
GLUE, SUMMARIZATION = "run_glue_blob.py", "run_summarization_blob.py"


def run_script(monkeypatch, script, *arguments):
    """Exit code of a script."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code
    return 0


def run_experiment(*arguments):
    """Exit code of `python -m blob_hf.experiments`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code
    return 0


def run_blob(command, *arguments):
    """Exit code of `blob COMMAND`."""
    try:
        blob([command, *map(str, arguments)])
    except SystemExit as exit_:
        return exit_.code
    return 0


def predict(*arguments):
    """Exit code of `blob predict`."""
    return run_blob("predict", *arguments)


def lines(path):
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_code(card):
    """The names that the first Python example of a model card leaves, run as it stands."""
    found = {}
    exec(card.read_text().split("```python\n")[1].split("```")[0], found)
    return found


def thorough(value):
    """A value of a parametrized test that differs little from the others: CI leaves it out."""
    return pytest.param(value, marks=pytest.mark.thorough)
