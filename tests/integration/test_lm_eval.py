"""lm-evaluation-harness with a posterior, against the harness's own `hf`, loops over merged networks and our script."""

import json
import random

import numpy as np
import pytest
import torch
from helpers.models import save_word_llama
from helpers.running import run_script
from scipy.special import logsumexp
from transformers import LlamaForCausalLM

from blob_hf import BlobConfig, BlobError, BlobModel, get_lora_model
from blob_hf.lm_eval import TASKS, register
from blob_hf.lm_eval.__main__ import main
from blob_hf.lm_eval.tasks import calibration_error, load, score

COLOURS = ["red", "green", "blue", "black", "dark", "light"]
WORDS = ["[PAD]", "[UNK]", "[END]", "Question:", "Answer:", "which", "is", *COLOURS]
S = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model whose tokenizer has its vocabulary, a BLoB adapter on it, and questions of two to four choices."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm-eval)")
    folder = tmp_path_factory.mktemp("harness")
    save_word_llama(folder, WORDS, init_eps=0.8)
    draw = random.Random(0)
    rows = []
    for _ in range(12):
        choices = [" ".join(draw.sample(COLOURS, draw.choice((1, 2)))) for _ in range(draw.choice((2, 3, 4)))]
        label = draw.randrange(len(choices))
        rows.append({"question": f"which is {choices[label]}", "choices": choices, "label": label})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def harness(world):
    """A model of the harness by name, on the CPU in float32, and requests as the harness makes them."""
    register()
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    def model(name="blob", **settings):
        given = {"pretrained": str(world / "base"), "device": "cpu", "dtype": "float32", "batch_size": 4}
        if name == "blob":
            given["adapter"] = str(world / "adapter")
        return get_model(name)(**{**given, **settings})

    def request(kind, *args, place=0, question=0):
        return Instance(kind, {}, args, place, metadata=("own", question, 1))

    return model, request


def merged(world) -> list:
    """The S networks as ordinary models."""
    return [
        BlobModel.from_pretrained(world / "adapter").merge_posterior_sample(seed=5, index=index).eval()
        for index in range(S)
    ]


def log_likelihood(network, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """One sequence, without padding, a token at a time."""
    ids, total, greedy = tokenizer(context).input_ids, 0.0, True
    for token in tokenizer(continuation).input_ids:
        log_probs = network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total, greedy = total + log_probs[token].item(), greedy and log_probs.argmax().item() == token
        ids = [*ids, token]
    return total, greedy


def questions(world) -> list[dict]:
    return [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]


def choice_requests(world, request) -> list:
    return [
        request("loglikelihood", f"Question: {row['question']} Answer:", f" {choice}", place=place, question=number)
        for number, row in enumerate(questions(world)) for place, choice in enumerate(row["choices"])
    ]  # fmt: skip


def test_the_mean_is_hf_with_the_adapter_of_plain_peft(world, harness):
    model, request = harness
    ours, plain = model(num_posterior_samples=0), model("hf", peft=str(world / "adapter"))
    asked = choice_requests(world, request)
    found, expected = ours.loglikelihood(asked), plain.loglikelihood(asked)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [
        request("loglikelihood_rolling", "which is red which is blue " * 20),
        request("loglikelihood_rolling", "red"),
    ]
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), plain.loglikelihood_rolling(texts), atol=1e-4)
    prompts = [request("generate_until", "Question: which is", {"until": ["blue"], "max_gen_toks": 8})]
    assert ours.generate_until(prompts) == plain.generate_until(prompts)


@torch.no_grad()
def test_samples_are_averaged_as_whole_continuations(world, harness):
    model, request = harness
    ours, networks = model(num_posterior_samples=S, posterior_seed=5), merged(world)
    asked = choice_requests(world, request)
    each = [[log_likelihood(one, ours.tokenizer, *r.args) for r in asked] for one in networks]
    values = np.array([[value for value, _ in row] for row in each])
    assert values.std(0).min() > 1e-3  # the networks differ
    found = ours.loglikelihood(asked)
    np.testing.assert_allclose([v for v, _ in found], logsumexp(values, axis=0) - np.log(S), atol=1e-5)
    most = np.array([[greedy for _, greedy in row] for row in each]).mean(0) > 0.5
    assert [greedy for _, greedy in found] == most.tolist()

    alone = model(num_posterior_samples=S, posterior_seed=5, max_length=5)  # three windows of the text
    text = "which is red blue green is which red black is which"
    ids = [2, *alone.tokenizer(text).input_ids]
    total = np.zeros(S)
    for start in range(1, len(ids), 5):
        end = min(start + 5, len(ids))
        left = max(0, end - 1 - 5) if end == len(ids) else start - 1
        for s, network in enumerate(networks):
            log_probs = network(torch.tensor([ids[left : end - 1]])).logits[0].log_softmax(-1)
            total[s] += sum(log_probs[place - 1 - left, ids[place]].item() for place in range(start, end))
    rolling = alone.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    np.testing.assert_allclose(rolling, [logsumexp(total) - np.log(S)], atol=1e-4)


@torch.no_grad()
def test_the_predictive_of_choices(world, harness):
    model, request = harness
    ours = model(num_posterior_samples=S, posterior_seed=5, predictive="choices")
    asked = choice_requests(world, request)
    asked += asked[:2]  # as the harness pads the last batch of processes
    found, place = [value for value, _ in ours.loglikelihood(asked)], 0
    assert found[-2:] == found[:2]
    networks, sequence = merged(world), model(num_posterior_samples=S, posterior_seed=5).loglikelihood(asked)
    for row in questions(world):
        context, count = f"Question: {row['question']} Answer:", len(row["choices"])
        scores = np.array(
            [[log_likelihood(one, ours.tokenizer, context, c)[0] for c in row["choices"]] for one in networks]
        )
        probabilities = np.exp(scores - logsumexp(scores, axis=1, keepdims=True)).mean(0)
        here = np.array(found[place : place + count])
        np.testing.assert_allclose(np.exp(here - logsumexp(here)), probabilities, atol=1e-5)
        np.testing.assert_allclose(
            logsumexp(here), logsumexp([v for v, _ in sequence[place : place + count]]), atol=1e-5
        )
        place += count


@torch.no_grad()
def test_texts_are_decoded_from_the_predictive(world, harness):
    model, request = harness
    ours, networks, expected = model(num_posterior_samples=S, posterior_seed=5), merged(world), []
    prompts = ["Question: which is red Answer:", "Answer:"]
    for prompt in prompts:
        ids = ours.tokenizer(prompt).input_ids
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != 2:
            probabilities = sum(one(torch.tensor([ids])).logits[0, -1].softmax(-1) for one in networks)
            ids = [*ids, probabilities.argmax().item()]
        expected.append(ours.tokenizer.decode(ids[start:], skip_special_tokens=True))
    settings = {"until": ["no such words"], "max_gen_toks": 6}
    assert ours.generate_until([request("generate_until", one, dict(settings)) for one in prompts]) == expected
    with pytest.raises(BlobError, match="num_posterior_samples=0"):
        ours.generate_until([request("generate_until", "Answer:", {**settings, "do_sample": True, "temperature": 0.5})])


def run_harness(folder, *more) -> dict:
    main([
        "--model", "blob", "--device", "cpu", "--batch_size", "8", "--tasks", "blob_choices", "--output_path",
        str(folder / "out.json"), *map(str, more),
    ])  # fmt: skip
    written = max(folder.glob("out*.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(written.read_text())


@pytest.mark.slow
def test_the_command_gives_the_figures_of_our_script(world, monkeypatch, tmp_path, capsys):
    data = world / "questions.jsonl"
    code = run_script(
        monkeypatch, "run_multiple_choice_blob.py", "--model_name_or_path", world / "base", "--train_file", data,
        "--validation_file", data, "--scoring", "text", "--use_cpu", "true", "--disable_tqdm", "true", "--report_to",
        "none", "--save_strategy", "no", "--max_steps", "4", "--learning_rate", "5e-2", "--max_length", "64",
        "--eval_samples", "4", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0
    script = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    for samples, prefix in ((0, "eval_mean_"), (4, "eval_")):
        args = f"adapter={tmp_path / 'run'},num_posterior_samples={samples},predictive=choices"
        written = run_harness(tmp_path, "--model_args", args, "--metadata", f"data_file={data}")
        found = written["results"]["blob_choices"]
        assert written["config"]["num_posterior_samples"] == samples
        for ours, theirs in (("acc", "accuracy"), ("nll", "nll"), ("ece", "ece"), ("brier", "brier")):
            assert found[f"{ours},none"] == pytest.approx(script[prefix + theirs], abs=1e-4), (samples, ours)
    assert "acc_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"adapter": None}, "the model blob needs adapter="),
        ({"num_posterior_samples": -1}, "num_posterior_samples must be >= 0, got -1"),
        ({"num_posterior_samples": "many"}, "num_posterior_samples must be a whole number, got 'many'"),
        ({"predictive": "letters"}, "predictive must be one of sequence, choices"),
        ({"adapter": "nowhere"}, "'nowhere' is not a local folder"),
        ({"peft": "nowhere"}, "by adapter=, not peft="),
        ({"adapter": "PLAIN"}, "has no posterior to sample from; set num_posterior_samples=0"),
    ],
)
def test_mistakes(world, harness, tmp_path, settings, line):
    if settings.get("adapter") == "PLAIN":
        config = BlobConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_lora()
        get_lora_model(LlamaForCausalLM.from_pretrained(world / "base"), config).save_pretrained(tmp_path)
        settings = {"adapter": str(tmp_path)}
    with pytest.raises(BlobError, match=line):
        harness[0](**settings)


def test_a_task_without_its_file_or_labels(tmp_path):
    with pytest.raises(BlobError, match="--metadata data_file=questions.jsonl"):
        load(pretrained="base")
    (tmp_path / "own.jsonl").write_text('{"question": "which", "choices": ["red", "blue"]}')
    with pytest.raises(BlobError, match="has no labels"):
        load(str(tmp_path / "own.jsonl"))
    with pytest.raises(BlobError, match="data_file nowhere.jsonl does not exist"):
        load("nowhere.jsonl")


def test_the_scores_of_a_question():
    found = score({"choices": ["red", "dark green"], "label": 1}, [(-3.0, False), (-4.0, True)])
    p = np.exp([-3.0, -4.0]) / np.exp([-3.0, -4.0]).sum()
    assert (found["acc"], found["acc_norm"]) == (0, 1)
    assert found["nll"] == pytest.approx(-np.log(p[1])) and found["brier"] == pytest.approx(2 * p[0] ** 2)
    three = score({"choices": ["a", "b", "c"], "label": 0}, [(-1.0, False)] * 3)
    expected = (abs(0 - p[0]) + abs(1 - 1 / 3)) / 2  # each in a bin of its own
    assert calibration_error([found["ece"], three["ece"]]) == pytest.approx(expected)


@pytest.mark.slow
def test_a_mistake_is_one_line(world, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        run_harness(tmp_path, "--model_args", f"adapter={world / 'adapter'},num_posterior_samples=-1")
    errors = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
    assert ended.value.code == 2
    assert errors == ["error: num_posterior_samples must be >= 0, got -1; 0 is the posterior mean"]


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setattr("blob_hf.lm_eval.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["--model", "blob"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: lm-evaluation-harness is not installed; pip install 'blob_hf[lm-eval]'\n"
    )


def test_the_task_file_is_where_the_package_says():
    assert (TASKS / "blob_choices.yaml").is_file()
