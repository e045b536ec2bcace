"""`blob app` with what cannot be, without a server."""

import pytest
from helpers.running import run_blob

from blob_hf.app import command, require_gradio
from blob_hf.utils.errors import BlobError


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(BlobError, match=r"pip install 'blob_hf\[app\]'"):
        require_gradio()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "name an adapter, or give --run FOLDER or --demo"),
        (["somewhere", "--demo"], "--demo has its own adapters"),
        (["--space", "x"], "--space needs an adapter"),
        (["somewhere", "--space", "x", "--port", "7900"], "--space writes files and serves nothing"),
        (["--run", "x", "--prompt", "{dialogue}"], "--examples and --prompt are for the page of an adapter"),
        (["somewhere", "--text_columns", "a"], "--text_columns is of the file that --examples names"),
        (["--run", "/no/such/folder"], "there is no folder"),
        (["somewhere", "--port", "70000"], "--port must be between 1 and 65535"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(command, "require_gradio", lambda: None)  # all is refused before it is needed
    assert run_blob("app", *arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
