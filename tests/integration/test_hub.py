"""Pushing and pulling with the real Hub client against a Hub in this process; every user is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import Commit, Fault, Repo, card_errors, running
from huggingface_hub import ModelCard

from blob_hf.tuner import adapter_files

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "posterior_std.safetensors", "README.md"}
SETUP = """
import logging, os, time, torch
from helpers.models import TARGETS, randomize_b, tiny_bart
from peft import LoraConfig, PeftModel, get_peft_model
from blob_hf import *
logging.basicConfig(format="%(message)s")
start, time.sleep = time.time(), lambda seconds: None  # the client waits between its attempts

def base():
    if not os.path.isdir("base"):
        tiny_bart().save_pretrained("base")
    return type(tiny_bart()).from_pretrained("base").eval()

def show(model, name):
    with torch.no_grad():
        logits = model(input_ids=torch.arange(4, 12)[None], decoder_input_ids=torch.arange(4, 9)[None]).logits
    print(f"{name}:{logits.double().sum().item()!r}")

def show_posterior(model, name="posterior"):
    show(model.eval(), "mean")
    with model.posterior_samples(1, seed=5):
        show(model, name)

def attempt(name, call):
    try:
        call()
    except BlobError as error:
        print(f"{name}:{error}")
    else:
        print(f"{name}:done")

def fresh(seed=0, **config):
    torch.manual_seed(seed)
    config = BlobConfig(target_modules=TARGETS["bart"], task_type="SEQ_2_SEQ_LM", r=4, init_eps=0.5, **config)
    model = get_blob_model(base(), config)
    randomize_b(model)
    return model
"""


class User:
    """Somebody with a token, a folder and a cache, whose scripts talk to the hub."""

    def __init__(self, hub, folder, token):
        self.hub, self.folder, self.token = hub, folder, token
        self.caches = 0
        folder.mkdir(exist_ok=True)

    def env(self, fresh_cache=True):
        self.caches += fresh_cache
        env = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")}
        env |= {
            "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / f"cache{self.caches}"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }  # fmt: skip
        return env | ({"HF_TOKEN": self.token} if self.token else {})

    def run(self, code, fresh_cache=True):
        """Printed `name:value` lines as a dict, with the whole stderr as "stderr"."""
        command = [sys.executable, "-c", SETUP + code]
        done = subprocess.run(command, cwd=self.folder, env=self.env(fresh_cache), capture_output=True, text=True)
        lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
        return {**lines, "stderr": done.stderr, "code": done.returncode}

    def script(self, *arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, env=self.env(), capture_output=True, text=True)


@pytest.fixture
def hub():
    with running({"hf_alice": "alice", "hf_bob": "bob"}) as server:
        yield server


@pytest.fixture
def alice(hub, tmp_path):
    return User(hub, tmp_path / "alice", "hf_alice")


def last_error(result):
    lines = [line for line in result["stderr"].splitlines() if line.startswith("blob_hf.utils.errors.BlobError: ")]
    assert result["code"] == 1 and lines, result["stderr"][-2000:]
    return lines[-1].removeprefix("blob_hf.utils.errors.BlobError: ")


def files_on(hub, folder, revision="main", name="alice/adapter"):
    """The repo as a folder, checked as a whole adapter."""
    commit = hub.repos[name].resolve(revision)
    for path, data in commit.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@pytest.mark.slow
def test_push_several_commits_and_pull_each_in_a_fresh_process(hub, alice, tmp_path):
    pushed = alice.run("""
first = fresh(0)
first.push_to_hub("alice/adapter", private=True, commit_message="first")
show_posterior(first, "first")
second = fresh(1)
second.push_to_hub("alice/adapter", commit_message="second")
show_posterior(second, "second")
third = fresh(2)
third.push_to_hub("alice/adapter", revision="trial", commit_message="third")
show_posterior(third, "third")
print(f"seconds:{time.time() - start:.2f}")
""")
    assert pushed["code"] == 0, pushed["stderr"]
    history = hub.history("alice/adapter")
    assert [commit.message for commit in history] == ["first", "second"]
    assert all(set(commit.files) == ADAPTER for commit in history)
    assert [commit.message for commit in hub.history("alice/adapter", "trial")][-1] == "third"
    card = history[-1].files["README.md"].decode()
    assert card_errors(card) == [] and "posterior_samples" in card
    pulled = alice.run(f"""
show_posterior(BlobModel.from_pretrained("alice/adapter"), "second")
show_posterior(BlobModel.from_pretrained("alice/adapter", revision="{history[0].sha}"), "first")
show_posterior(BlobModel.from_pretrained("alice/adapter", revision="trial"), "third")
show(PeftModel.from_pretrained(base(), "alice/adapter", revision="trial").eval(), "plain")
model = BlobModel.from_pretrained("alice/adapter")
model.load_adapter("alice/adapter", "other", revision="trial")
model.set_adapter("other")
show_posterior(model, "other")
""")
    assert pulled["code"] == 0, pulled["stderr"]
    for name in ("first", "second", "third"):
        assert pulled[name] == pushed[name]
    assert pulled["other"] == pushed["third"] and pulled["plain"] == pushed["mean"]  # of the third model


@pytest.mark.slow  # many processes
def test_private_unknown_and_foreign_repos_are_one_line(hub, alice, tmp_path):
    assert alice.run('fresh().push_to_hub("alice/adapter", private=True)')["code"] == 0
    stranger = User(hub, tmp_path / "alice", None)  # sees alice's base model, but has no token
    load = 'BlobModel.from_pretrained("alice/adapter"'
    found = stranger.run(f"""
attempt("no token", lambda: {load}))
attempt("token", lambda: {load}, token="hf_alice"))
attempt("revision", lambda: {load}, token="hf_alice", revision="nope"))
attempt("subfolder", lambda: {load}, token="hf_alice", subfolder="nope"))
attempt("push", lambda: fresh().push_to_hub("alice/new"))
""")
    assert found["code"] == 0 and found["token"] == "done", found["stderr"]
    assert "'alice/adapter' is not a local folder" in found["no token"] and "pass token=" in found["no token"]
    assert "at revision 'nope'" in found["revision"] and "no such revision" in found["revision"]
    assert "no adapter_config.json in alice/adapter/nope" in found["subfolder"]
    foreign = last_error(User(hub, tmp_path / "alice", "hf_bob").run('fresh().push_to_hub("alice/new")'))
    for message in (found["push"], foreign):
        assert "cannot push to 'alice/new'" in message and "token" in message
    assert len(hub.history("alice/adapter")) == 1 and "alice/new" not in hub.repos


@pytest.mark.slow  # many processes
def test_a_connection_that_drops_is_tried_again_or_told_and_never_leaves_half_an_adapter(hub, alice):
    hub.faults = [Fault("PUT", "/lfs/", 1), Fault("POST", "/commit/", 99)]
    push = 'm = fresh(); show_posterior(m); m.push_to_hub("alice/adapter")'
    message = last_error(alice.run(push))
    assert "cannot push to 'alice/adapter'" in message and "nothing was committed" in message
    assert hub.history("alice/adapter") == [] and {"PUT", "POST"} <= {one.split()[0] for one in hub.broken}
    hub.faults = [Fault("PUT", "/lfs/", 1)]
    hub.blobs.clear()
    pushed = alice.run(push)
    assert pushed["code"] == 0 and set(hub.history("alice/adapter")[-1].files) == ADAPTER, pushed["stderr"]
    pull = 'show_posterior(BlobModel.from_pretrained("alice/adapter"))'
    hub.faults, hub.broken = [Fault("GET", "posterior_std.safetensors", 99)], []
    message = last_error(alice.run(pull))
    assert "cannot be had from the Hugging Face Hub" in message and hub.broken
    offline = pull.replace("show", "import huggingface_hub; huggingface_hub.constants.HF_HUB_OFFLINE = True; show", 1)
    last_error(alice.run(offline, fresh_cache=False))  # what the cache holds is not taken for an adapter
    hub.faults = [Fault("GET", "adapter_model.safetensors", 2)]
    pulled = alice.run(pull, fresh_cache=False)
    assert pulled["posterior"] == pushed["posterior"], pulled["stderr"]


@pytest.mark.slow  # many processes
def test_a_plain_lora_repo_gets_its_std_from_the_config_and_says_so(hub, alice):
    pushed = alice.run("""
lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM", r=4)).eval()
randomize_b(lora)
show(lora, "lora")
lora.push_to_hub("alice/lora")
""")
    assert pushed["code"] == 0, pushed["stderr"]
    pulled = alice.run("""
model = BlobModel.from_pretrained("alice/lora", config=BlobConfig(prior_std=0.5, init_eps=0.3))
show(model, "lora")
print(f"prior:{model.blob_config.prior_std}")
print(f"std:{model.posterior_statistics().total.max_std}")
""")
    assert pulled["lora"] == pushed["lora"] and pulled["prior"] == "0.5"
    assert (
        0.045 < float(pulled["std"]) <= 0.09 and "plain LoRA adapter: its posterior std comes from" in pulled["stderr"]
    )


@pytest.mark.slow  # many processes
def test_a_card_of_the_repo_stays_and_names_that_lead_out_are_refused(hub, alice, tmp_path):
    repo = hub.repos["alice/adapter"] = Repo(private=False)
    repo.add("main", Commit({"README.md": b"mine"}, "initial commit", None))
    assert alice.run('fresh().push_to_hub("alice/adapter")')["code"] == 0
    files = repo.resolve("main").files
    assert files["README.md"] == b"mine" and set(files) == ADAPTER
    evil = {**files, "base_model/../../../../../../evil.json": b"{}"}
    repo.add("main", Commit(evil, "evil", repo.branches["main"]))
    result = alice.run('BlobModel.from_pretrained("alice/adapter")')
    assert "cannot be had from the Hugging Face Hub" in last_error(result)
    assert not list(tmp_path.rglob("evil.json"))


TRAIN = """
from helpers.training import blob_bert, trainer
model = blob_bert(init_eps=0.5)
model.get_base_model().save_pretrained("bert")
model.peft_config["default"].base_model_name_or_path = os.path.abspath("bert")
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    run = trainer(
        f"out-{strategy}", model, max_steps=3, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_model_id=f"alice/{strategy}", hub_strategy=strategy, hub_always_push=True, save_total_limit=None,
    )
    run.train()
    run.evaluate()
    run.push_to_hub(license="mit", dataset="alice/data", tasks="text-classification")
print(f"final:{run.model.posterior_statistics().total.mean_std!r}")
"""


@pytest.mark.slow  # many processes
def test_the_trainer_pushes_whole_adapters_with_every_strategy(hub, alice, tmp_path):
    trained = alice.run(TRAIN)
    assert trained["code"] == 0, trained["stderr"]
    for strategy, least in (("end", 1), ("every_save", 3), ("checkpoint", 4), ("all_checkpoints", 4)):
        history = hub.history(f"alice/{strategy}")
        assert len(history) >= least, strategy
        for i, commit in enumerate(history):
            if "adapter_model.safetensors" in commit.files:
                folder = files_on(hub, tmp_path / f"{strategy}{i}", commit.sha, f"alice/{strategy}")
                assert adapter_files.read(folder).std, (strategy, commit.message)
        last = history[-1].files
        assert set(last) >= ADAPTER and not any(path.startswith("_") for path in last)
        checkpoints = {path.split("/")[0] for path in last if "/" in path}
        wanted = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {f"checkpoint-{i}" for i in (1, 2, 3)}}
        assert checkpoints == wanted.get(strategy, set())
    card = ModelCard(hub.history("alice/end")[-1].files["README.md"].decode())
    assert card_errors(str(card)) == [] and (card.data.license, card.data.datasets) == ("mit", ["alice/data"])
    assert {one.metric_name for one in card.data.eval_results} == {"nll, N=0 (posterior mean)", "nll, N=3 (samples)"}
    assert "| KL cycle M (steps) | 2 |" in card.text and "| warmup_steps |" in card.text
    (tmp_path / "resume").mkdir()
    files_on(hub, tmp_path / "resume", name="alice/checkpoint")
    resumed = alice.run(f"""
from helpers.training import blob_bert, trainer
run = trainer("again", blob_bert(init_eps=0.5), max_steps=4)
print("step:", run.train(resume_from_checkpoint="{tmp_path / "resume" / "last-checkpoint"}").global_step)
""")
    assert resumed["step"].strip() == "4", resumed["stderr"]


@pytest.mark.slow  # many processes
def test_a_script_pushes_its_run_with_its_card(hub, alice):
    options = ["--demo", "--max_steps", "3", "--eval_samples", "2", "--max_eval_samples", "24", "--use_cpu", "true"]
    push = ["--push_to_hub", "--hub_model_id", "alice/demo", "--output_dir", "out"]
    done = alice.script(ROOT / "run_glue_blob.py", *options, *push)
    assert done.returncode == 0, done.stderr
    files = hub.history("alice/demo")[-1].files
    assert ADAPTER | {"report.md", "plots/kl.png", "eval_results.json"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert card_errors(str(card)) == [] and card.data.pipeline_tag == "text-classification"
    shown = {one.metric_name: one.metric_value for one in card.data.eval_results}
    measured = json.loads(files["eval_results.json"])
    assert shown["ece, N=2 (samples)"] == measured["eval_ece"]
    assert shown["ece, N=0 (posterior mean)"] == measured["eval_mean_ece"]
    assert 'from_pretrained("alice/demo")' in card.text
    pulled = alice.run('BlobModel.from_pretrained("alice/demo"); print("loaded:yes")')
    assert pulled.get("loaded") == "yes", pulled["stderr"]
    stranger = User(hub, alice.folder, None)
    done = stranger.script(ROOT / "run_glue_blob.py", *options, *push[:-1], "other")
    assert done.returncode == 2 and "error: cannot push to 'alice/demo'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_ensemble_goes_through_the_hub_and_a_later_adapter_leaves_nothing_of_it(alice):
    pushed = alice.run(
        """
from blob_hf.baselines.ensemble import join_members
from blob_hf.tuner.build import get_lora_model, load_lora

def member(seed):
    torch.manual_seed(seed)
    model = get_lora_model(base(), LoraConfig(target_modules=TARGETS["bart"], task_type="SEQ_2_SEQ_LM", r=4))
    randomize_b(model)
    return model

for seed in (1, 2):
    member(seed).save_pretrained(f"m{seed}")
model = load_lora(base(), "m1")
join_members(model, ["m2"])
model.push_to_hub("alice/ensemble")
with model.eval().posterior_samples(Sampling(1, first=1)):
    show(model, "second")
"""
    )
    assert pushed["code"] == 0, pushed["stderr"]
    load = """
model = BlobModel.from_pretrained("alice/ensemble", model=base()).eval()
print(f"method:{model.method}")
if model.method == "ensemble":
    with model.posterior_samples(Sampling(1, first=1)):
        show(model, "second")
"""
    found = alice.run(load)  # in a cache of its own
    assert (found["method"], found["second"]) == ("ensemble", pushed["second"]), found["stderr"]
    again = alice.run('fresh().push_to_hub("alice/ensemble")')
    assert again["code"] == 0, again["stderr"]
    assert alice.run(load)["method"] == "blob"


@pytest.mark.slow
def test_decisions_go_through_the_hub_with_the_adapter(hub, alice):
    rules = """
from blob_hf.baselines.conformal import ClassThresholds, PredictionSets
from blob_hf.baselines.conformal_texts import TextAbstention, TextThreshold
rules = [
    PredictionSets(0.1, 0.2, "aps", 40, ClassThresholds(0.3, None), ClassThresholds(0.4, 0.5), {"num_samples": 3}),
    TextAbstention(0.2, 0.7, "token_nll", 50, TextThreshold(1.25), TextThreshold(None), {"decoding": "mbr"}),
]
"""
    pushed = alice.run(
        rules
        + """
model = fresh()
for rule in rules:
    model.set_companion(rule)
model.push_to_hub("alice/decided")
"""
    )
    assert pushed["code"] == 0, pushed["stderr"]
    assert {"conformal.json", "conformal_texts.json"} <= set(hub.history("alice/decided")[-1].files)
    found = alice.run(
        rules
        + """
model = BlobModel.from_pretrained("alice/decided", model=base())
print("same:", [model.companion(rule.slot) == rule for rule in rules], sep="")
"""
    )
    assert found["same"] == "[True, True]", found["stderr"]
