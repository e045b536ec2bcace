"""docs/serving.md is run as it stands there; the server is plain PEFT behind the completions protocol, not vLLM."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.models import save_word_llama
from helpers.running import ROOT
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from blob_hf import BlobModel, Sampling

SAMPLES = 10
PROMPT, ANSWERS = "which colour is it", [" red", " dark green", " blue"]
WORDS = ["[PAD]", "[UNK]", "[END]", "which", "colour", "is", "it", "red", "dark", "green", "blue", "light", "not"]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)


def run(code, folder):
    """A block of the page with its paths in a folder; its names."""
    code = code.replace("runs/arc", f"{folder}/adapter").replace("meta-llama/Llama-2-7b-hf", f"{folder}/base")
    code = code.replace('"samples', f'"{folder}/samples')
    names = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model and an adapter; the page's first block has exported it."""
    folder = tmp_path_factory.mktemp("serving")
    save_word_llama(folder, WORDS, init_eps=0.6, initializer_range=0.4)
    run(BLOCKS[0], folder)
    return folder


class Completions(BaseHTTPRequestHandler):
    """POST /v1/completions of a model of plain PEFT with several adapters, one request at a time."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock, torch.no_grad():
            self.server.model.set_adapter(asked["model"])
            choices = [self.answer(place, prompt, asked) for place, prompt in enumerate(asked["prompt"])]
        body = json.dumps({"object": "text_completion", "model": asked["model"], "choices": choices[::-1]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def answer(self, place, prompt, asked):
        tokenizer, ids = self.server.tokenizer, self.server.tokenizer(prompt, return_tensors="pt").input_ids
        if not asked.get("echo"):
            written = self.server.model.generate(input_ids=ids, max_new_tokens=asked["max_tokens"], do_sample=False)
            text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
            return {"index": place, "text": " " + text, "logprobs": None}
        assert asked["max_tokens"] == 0 and asked["logprobs"] == 1
        scored = self.server.model(input_ids=ids).logits[0].log_softmax(-1)
        of_tokens = [scored[i, token].item() for i, token in enumerate(ids[0, 1:].tolist())]
        tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        return {"index": place, "text": prompt, "logprobs": {"tokens": tokens, "token_logprobs": [None, *of_tokens]}}

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def client(world):
    names = {"mean": world / "adapter"} | {f"sample-{s}": world / "samples" / f"sample-{s}" for s in range(SAMPLES)}
    base = LlamaForCausalLM.from_pretrained(world / "base")
    model = PeftModel.from_pretrained(base, names["mean"], adapter_name="mean").eval()
    for name in list(names)[1:]:
        model.load_adapter(names[name], adapter_name=name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.model, server.tokenizer, server.lock = model, AutoTokenizer.from_pretrained(world / "base"), threading.Lock()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found = run(BLOCKS[1], world)
    found["SERVER"] = f"http://127.0.0.1:{server.server_port}/v1"
    yield found
    server.shutdown(), thread.join(), server.server_close()


def by_a_loop(model, tokenizer):
    """Log-likelihoods of the answers (answers,), whatever the network is in this context."""
    start, found = len(tokenizer(PROMPT).input_ids), []
    for answer in ANSWERS:
        ids = tokenizer(PROMPT + answer, return_tensors="pt").input_ids
        scored = model(input_ids=ids).logits[0].log_softmax(-1)
        found.append(sum(scored[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))
    return torch.stack(found)


@pytest.fixture(scope="module")
def ours(world):
    return BlobModel.from_pretrained(world / "adapter"), AutoTokenizer.from_pretrained(world / "base")


@torch.no_grad()
def test_the_client_has_the_posterior_predictive(client, ours):
    networks = []
    for s in range(SAMPLES):
        with ours[0].posterior_samples(Sampling(1, seed=0, first=s)):
            networks.append(by_a_loop(*ours).softmax(0))
    expected = torch.stack(networks)
    mean, each = client["predictive"](PROMPT, ANSWERS)
    torch.testing.assert_close(torch.tensor(each), expected)
    torch.testing.assert_close(torch.tensor(mean), expected.mean(0))
    assert expected.std(0).max() > 1e-2
    client["MODULES"], modules = ["mean"], client["MODULES"]
    torch.testing.assert_close(torch.tensor(client["predictive"](PROMPT, ANSWERS)[0]), by_a_loop(*ours).softmax(0))
    client["MODULES"] = modules


def test_the_client_has_the_samples_texts_and_their_agreement(client, ours):
    model, tokenizer = ours
    ids = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**ids, sampling=Sampling(SAMPLES), max_new_tokens=4, do_sample=False)
    expected = [tokenizer.decode(row[len(ids["input_ids"][0]) :], skip_special_tokens=True).strip() for row in written]
    best, share, texts = client["write"](PROMPT, max_tokens=4)
    assert texts == expected and len(set(texts)) > 1
    assert best == max(set(texts), key=texts.count) and share == texts.count(best) / SAMPLES


@torch.no_grad()
def test_a_mixed_batch_of_peft_has_the_posterior_predictive(world, ours):
    model, tokenizer = ours
    prompts = [PROMPT, "not it"]
    found = run(BLOCKS[2], world)["next_token"](prompts)
    for row, prompt in zip(found, prompts, strict=True):
        with model.posterior_samples(SAMPLES, seed=0, repeat=True):
            logits = model(input_ids=tokenizer(prompt, return_tensors="pt").input_ids).logits[:, -1]
        torch.testing.assert_close(row, logits.softmax(-1).mean(0))
