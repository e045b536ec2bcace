"""The server as a user starts it: two visitors at once, what it logs, where it listens; and a Space."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from helpers.models import words
from helpers.pages import NAMES, PROMPT, save_summarizer, served
from helpers.running import run_blob

from blob_hf import BlobModel, Sampling
from blob_hf.app import demo, space
from blob_hf.app.engine import Engine
from blob_hf.app.serving import Part, blocks, serve
from blob_hf.inference.choices import ChoiceScoring
from blob_hf.utils.errors import BlobError

pytestmark = pytest.mark.slow
SECRET = "w17 w23 w42 w17 w51 w9"  # fmt: skip


@pytest.fixture(autouse=True)
def _gradio():
    pytest.importorskip("gradio", reason="the page needs gradio")


def own_address():
    """This machine's address in its network, None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def test_two_visitors_at_once_and_nothing_of_them_in_the_log(classifier_run, tmp_path):
    from gradio_client import Client

    model = BlobModel.from_pretrained(classifier_run).eval()
    texts = [SECRET, *words(3, seed=5)]
    log, kept = tmp_path / "log", tmp_path / "kept"
    with served(classifier_run, log=log, GRADIO_TEMP_DIR=str(kept)) as address:
        clients = [Client(address, verbose=False, analytics_enabled=False) for _ in range(2)]
        with ThreadPoolExecutor(8) as pool:
            asked = [(text, seed) for text in texts for seed in (0, 1)]
            calls = [
                pool.submit(clients[i % 2].predict, text=text, num_samples=6, seed=seed, api_name="/predict")
                for i, (text, seed) in enumerate(asked)
            ]
            found = [call.result(120) for call in calls]
        for one, (text, seed) in zip(found, asked, strict=True):
            (expected,) = model.predict([text], sampling=Sampling(6, seed=seed)).records()
            assert one["label"] == expected["label"]
            own, expected = ({**record, **record["probabilities"]} for record in (one, expected))
            for name in ("entropy", "aleatoric", "epistemic", *NAMES.values()):
                assert own[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
        for text, said in ((f"{SECRET}\0", "does not look like text"), ("", "is empty")):
            assert said in clients[0].predict(text=text, api_name="/predict")["error"]
        bad = clients[0].predict(text=SECRET, num_samples=1000, api_name="/predict")
        assert bad["error"] == "Samples N must be between 0 and 64, not 1000."
        page = urllib.request.urlopen(address)
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'self'" in policy and "ws:" not in policy
        host, port = re.search(r"//(.*):(\d+)", address).groups()
        assert host == "127.0.0.1"
        if (own := own_address()) is not None and not own.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((own, int(port)), timeout=5)
    assert SECRET not in log.read_text() and "Traceback" not in log.read_text()
    assert not any(SECRET.encode() in path.read_bytes() for path in kept.rglob("*") if path.is_file())


def test_a_space_starts_as_it_is(tmp_path):
    adapter = save_summarizer(tmp_path)
    assert run_blob("app", adapter, "--space", tmp_path / "space") == 0
    space = tmp_path / "space"
    facts = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    lines = (space / "requirements.txt").read_text().splitlines()
    assert facts["sdk"] == "gradio" and facts["app_file"] == "app.py" and f"gradio=={facts['sdk_version']}" in lines
    assert any(line.startswith("torch==") and "+" not in line for line in lines)
    elsewhere = tmp_path / "elsewhere"
    space.rename(elsewhere)
    adapter.rename(tmp_path / "gone")  # it has its own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"PYTHONPATH": "", "GRADIO_SERVER_PORT": port}
    with served(program=("app.py",), log=tmp_path / "log", folder=elsewhere, **own) as address:
        assert "gradio" in urllib.request.urlopen(address).read().decode()
        from gradio_client import Client

        client = Client(address, verbose=False, analytics_enabled=False)
        found = client.predict(text="#Person1#: Hi.", num_samples=3, max_new_tokens=6, api_name="/predict")
    model = BlobModel.from_pretrained(tmp_path / "gone").eval()
    expected = model.predict(["#Person1#: Hi."], sampling=Sampling(3), prompt=PROMPT, max_new_tokens=6)
    assert found["generated_text"] == expected.texts[0] and found["samples"] == expected.samples[0]


def test_a_space_that_could_not_start_is_refused(classifier_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    config = json.loads((classifier_run / "adapter_config.json").read_text())
    summarizer = save_summarizer(tmp_path)

    def changed(name, **facts):
        shutil.copytree(classifier_run, tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, **facts}))
        return tmp_path / name

    odd = changed("odd", base_model_name_or_path="/no/such/base")
    words_of = changed("words", task_type="TOKEN_CLS", auto_mapping=None)
    choices = changed("choices")
    ChoiceScoring(tokens=(5, 6)).save(None, choices)
    for adapter, prompt, folder, said in (
        (classifier_run, None, "full", "is not empty"),
        (odd, None, "new", "is neither a folder here nor a name on the Hub"),
        (words_of, None, "new", "a page is for classifiers and models that write"),
        (choices, "Say {dialogue}", "new", "a prompt is for summarizers; "),
        (classifier_run, "Say {dialogue}", "new", "a prompt is for summarizers"),
        (summarizer, "Say it", "new", "must contain {dialogue} exactly once"),
    ):
        more = () if prompt is None else ("--prompt", prompt)
        assert run_blob("app", adapter, "--space", tmp_path / folder, *more) == 2
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_nothing_is_written_where_the_package_is_not_installed(classifier_run, tmp_path, monkeypatch):
    def missing(name):
        raise space.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(space.metadata, "requires", missing)
    with pytest.raises(BlobError, match="because it is not installed"):
        space.write_space(str(classifier_run), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_many_who_wait_leave_the_server_room(classifier_run):
    from gradio_client import Client

    from blob_hf.app.pages.classifier import ClassifierPage

    part = ClassifierPage(Engine(classifier_run), None, [])
    page = blocks([Part("Classifier", "", part.build)], "Page")
    try:
        address = serve(page, wait=False)
        client = Client(address, verbose=False, analytics_enabled=False)
        with part.engine._turn:
            jobs = [client.submit(text="w5", num_samples=2, api_name="/predict") for _ in range(45)]
            time.sleep(3)
            assert urllib.request.urlopen(address, timeout=20).status == 200
        assert len({job.result(120)["label"] for job in jobs}) == 1
    finally:
        page.close()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BlobError, match="cannot write to .*; set XDG_CACHE_HOME"):
        demo.demo_run("classifier", tmp_path / "file")


@pytest.mark.thorough
def test_the_demo_is_trained_once(tmp_path, monkeypatch):
    quick = ("classify", "--compare_lora", "false", "--max_steps", "2", "--max_eval_samples", "8")
    monkeypatch.setitem(demo._COMMANDS, "classifier", quick)
    folder = demo.demo_run("classifier", tmp_path)
    assert (folder / "validation_predictions.jsonl").is_file() and folder == tmp_path / "classifier"
    monkeypatch.setattr(subprocess, "run", None)  # not again
    assert demo.demo_run("classifier", tmp_path) == folder
    monkeypatch.undo()
    monkeypatch.setitem(demo._COMMANDS, "summarizer", ("summarize", "--no_such_flag"))
    with pytest.raises(BlobError, match=r"the demo's summarizer could not be trained; .*\.log says why"):
        demo.demo_run("summarizer", tmp_path)
