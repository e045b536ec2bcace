"""What all methods share: the flag, the files, the warnings; and MAP, which is a weight decay."""

import json

import pytest
import torch
from helpers.hub_server import card_errors
from helpers.models import TARGETS, randomize_b, tiny_bert
from helpers.running import GLUE, SUMMARIZATION, run_script
from helpers.training import arguments, fit, rows
from peft import LoraConfig, get_peft_model

from blob_hf import BlobError, BlobModel, BlobTrainingArguments
from blob_hf.baselines import MapState, MethodState, attach_mc_dropout, find_method, method_names
from blob_hf.baselines.base import METHOD_FILE
from blob_hf.baselines.laplace import library_is_there
from blob_hf.baselines.map import prior_weight_decay
from blob_hf.cli.adapters import AdapterArguments
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.methods import ignored_flags
from blob_hf.cli.route import FittedRoute
from blob_hf.cli.routes import ROUTES, find_route
from blob_hf.tuner.build import as_blob_model, get_lora_model
from blob_hf.tuner.posterior import sampled_layers

NAMES = ("blob", "lora", "map", "mc_dropout", "ensemble", "laplace", "tfb", "scalabl", "ivon")
QUICK = [
    "--demo", "--eval_samples", "3", "--disable_tqdm", "true", "--use_cpu", "true", "--max_eval_samples", "30",
    "--compare_base", "false",
]  # fmt: skip


def test_the_methods_of_the_paper_are_there():
    assert tuple(ROUTES) == NAMES and all(ROUTES[name].name == name for name in NAMES)
    assert set(method_names()) == {*NAMES, "distilled"}  # which is made by a command of its own
    choices = MethodArguments.__dataclass_fields__["method"].metadata["choices"]
    assert tuple(choices) == NAMES
    with pytest.raises(BlobError, match="method must be one of blob, lora, map, .*, got 'bayes'"):
        find_route("bayes")
    with pytest.raises(BlobError, match="method must be one of blob, lora, .*, got 'bayes'"):
        find_method("bayes")
    # a flag that only some methods read is one of the arguments there are
    known = set(BlobTrainingArguments.__dataclass_fields__) | set(AdapterArguments.__dataclass_fields__)
    known |= set(MethodArguments.__dataclass_fields__)
    for route in ROUTES.values():
        assert route.flags <= known, route.name


def test_flags_that_a_method_does_not_read_are_named(tmp_path):
    args = arguments(tmp_path, beta=0.1, gamma=12.0, eval_samples=10, kl_cycle_steps=None)
    own = MethodArguments("lora", num_anchors=5)
    adapter = AdapterArguments(init_eps=0.1, lora_r=4)
    assert sorted(ignored_flags(ROUTES["lora"], own, args, adapter)) == ["beta", "gamma", "init_eps", "num_anchors"]
    assert ignored_flags(ROUTES["map"], own, args) == ["gamma", "num_anchors"]
    assert ignored_flags(ROUTES["blob"], own, args, adapter) == ["num_anchors"]
    assert sorted(ignored_flags(ROUTES["tfb"], own, args, adapter)) == ["beta", "gamma", "init_eps", "lora_r"]
    decayed = arguments(tmp_path, beta=0.1, weight_decay=0.1, eval_samples=10, kl_cycle_steps=None)
    assert ignored_flags(ROUTES["map"], MethodArguments("map"), decayed) == ["beta"]


def test_the_decay_of_map_is_the_gradient_of_its_prior():
    weight = torch.randn(5, requires_grad=True)
    log_prior = torch.distributions.Normal(0.0, 0.3).log_prob(weight).sum()
    (gradient,) = torch.autograd.grad(-log_prior / 700, weight)
    torch.testing.assert_close(gradient, prior_weight_decay(700, 0.3) * weight)


def lora_bert():
    torch.manual_seed(0)
    model = get_lora_model(tiny_bert(), LoraConfig(target_modules=TARGETS["bert"], r=4))
    randomize_b(model)
    return model


def trained(folder, method, **changes):
    trainer, _ = fit(folder, method, lora_bert, rows(24), **changes)
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_map_is_lora_with_that_decay_unless_it_is_given_one(tmp_path):
    of_map = trained(tmp_path, method="map", beta=0.5)
    with_decay = trained(tmp_path, method="lora", weight_decay=1 / (24 * 0.25))
    without = trained(tmp_path, method="lora")
    own = trained(tmp_path, method="map", beta=0.5, weight_decay=0.01)
    as_given = trained(tmp_path, method="lora", weight_decay=0.01)
    for name, value in of_map.items():
        assert torch.equal(value, with_decay[name]) and torch.equal(own[name], as_given[name])
    assert any(not torch.equal(value, without[name]) for name, value in of_map.items())


def test_a_damaged_method_file_is_one_line(tmp_path):
    assert MethodState.load(tmp_path) is None
    for content in ("{", "[]", "{}", "3"):
        (tmp_path / METHOD_FILE).write_text(content)
        with pytest.raises(BlobError, match="does not name a method"):
            MethodState.load(tmp_path)
    for content, message in (
        ('{"method": "zzz"}', "got 'zzz'"),
        ('{"method": "ensemble"}', "members of method ensemble is None"),
        ('{"method": "laplace", "prior_precision": "x"}', "prior_precision of method laplace is 'x'"),
    ):
        (tmp_path / METHOD_FILE).write_text(content)
        with pytest.raises(BlobError, match=message):
            MethodState.load(tmp_path)


def test_a_plain_peft_model_is_taken_over(tmp_path):
    torch.manual_seed(0)
    for method, dropout in (("lora", 0.0), ("mc_dropout", 0.2), ("tfb", 0.0)):
        config = LoraConfig(target_modules=["query", "value"], r=4, lora_dropout=dropout)
        model = as_blob_model(get_peft_model(tiny_bert(), config))
        if method == "mc_dropout":
            attach_mc_dropout(model)
        if method == "tfb":  # is for what is trained
            randomize_b(model)
        trainer, _ = fit(tmp_path / method, method, lambda model=model: model, num_anchors=8)
        trainer.create_model_card()
        trainer.save_model()
        if method != "lora":
            assert trainer.eval_sampling.num_samples == 3
            loaded = BlobModel.from_pretrained(tmp_path / method, model=tiny_bert())
            assert loaded.method == method and sampled_layers(loaded)


def test_an_adapter_saved_over_another_leaves_nothing_of_it(tmp_path):
    def save(method, dropout):
        model = get_lora_model(tiny_bert(), LoraConfig(target_modules=["query"], r=4, lora_dropout=dropout))
        if method == "mc_dropout":
            attach_mc_dropout(model)
        model.save_pretrained(tmp_path)
        return {file.name for file in tmp_path.iterdir()}

    assert METHOD_FILE in save("mc_dropout", 0.1)
    assert METHOD_FILE not in save("lora", 0.0)


def test_the_prior_of_map_follows_beta_from_training_to_training(tmp_path):
    args, route = arguments(tmp_path, beta=0.5), ROUTES["map"]
    assert route.arguments(args, rows(24)).weight_decay == 1 / (24 * 0.25) and args.weight_decay == 0
    args.beta = 0.1
    assert route.arguments(args, rows(24)).weight_decay == pytest.approx(1 / (24 * 0.01)) and args.weight_decay == 0
    trainer, _ = fit(tmp_path, "map", lora_bert, rows(24), beta=0.5)
    assert trainer.model.companion("method") == MapState(1 / (24 * 0.25))


# ----- the scripts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain LoRA adapter as run_glue_blob.py leaves it."""
    folder = tmp_path_factory.mktemp("plain") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        own = ["--method", "lora", "--max_steps", 20, "--train_head", "false", "--output_dir", folder]
        assert run_script(patch, GLUE, *QUICK, *own) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_saves_and_gives_its_numbers_again(monkeypatch, tmp_path, capsys, plain, name):
    if name == "laplace" and not library_is_there():
        pytest.skip("laplace-torch is not installed")
    folder = tmp_path / "run"
    flags = [*QUICK, "--method", name, "--output_dir", folder, "--temperature_scaling", "--do_train", "--do_eval"]
    flags += ["--adapter_name_or_path", plain] if isinstance(ROUTES[name], FittedRoute) else ["--max_steps", 5]
    flags += {"ensemble": ["--ensemble_size", 2], "tfb": ["--num_anchors", 20], "blob": ["--kl_cycle_steps", 3]}.get(
        name, []
    )
    assert run_script(monkeypatch, GLUE, *flags) == 0
    printed = capsys.readouterr().out
    count = {"lora": 0, "map": 0, "ensemble": 2}.get(name, 3)
    assert (f"N={count} (samples)" in printed) is bool(count) and "temperature-scaled" in printed
    results = json.loads((folder / "eval_results.json").read_text())
    scaled = json.loads((folder / "eval_temperature_results.json").read_text())
    assert results["eval_num_samples"] == scaled["eval_num_samples"] == count
    assert scaled["eval_accuracy"] == results["eval_accuracy"] and scaled["eval_temperature"] > 0
    costs = json.loads((folder / "costs.json").read_text())
    assert (costs["trained_parameters"] > 0) is not isinstance(ROUTES[name], FittedRoute) and costs["eval_rows"] == 30
    card = (folder / "README.md").read_text()
    assert ROUTES[name].card.title in card and card_errors(card) == []
    assert ("kl_history.csv" in {path.name for path in folder.iterdir()}) is (name == "blob")
    # evaluated again from its files: --method is theirs
    again = [*QUICK, "--do_eval", "--temperature_scaling", "--adapter_name_or_path", folder, "--output_dir"]
    assert run_script(monkeypatch, GLUE, *again, tmp_path / "again") == 0
    for file, before in (("eval_results.json", results), ("eval_temperature_results.json", scaled)):
        found = json.loads((tmp_path / "again" / file).read_text())
        for key, value in before.items():
            if not key.endswith(("runtime", "per_second", "preparation_time")):
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert BlobModel.from_pretrained(folder).method == name


def test_held_out_rows_are_not_trained_on(monkeypatch, tmp_path):
    flags = [*QUICK, "--method", "lora", "--max_steps", 2, "--max_train_samples", 50, "--do_train"]
    flags += ["--temperature_scaling", "--calibration_samples", 20, "--per_device_train_batch_size", 30]
    assert run_script(monkeypatch, GLUE, *flags, "--output_dir", tmp_path) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["epoch"] == 2.0  # 30 of the 50 rows are one batch


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (GLUE, ["--method", "tfb"], "--method tfb is fitted to a trained adapter: train one with --method lora"),
        (GLUE, ["--method", "ensemble", "--ensemble_members", "a", "b", "--do_eval"], "are put together by --do_train"),
        (
            GLUE,
            ["--method", "tfb", "--hp_search", "optuna", "--hp_space", "seed=1,2"],
            "is fitted to a trained adapter",
        ),
        (GLUE, ["--method", "ensemble", "--hp_search", "optuna", "--hp_space", "seed=1,2"], "method ensemble has not"),
        (GLUE, ["--method", "ensemble", "--ensemble_size", "1"], "ensemble_size must be >= 2, got 1"),
        (GLUE, ["--method", "tfb", "--num_anchors", "0"], "num_anchors must be >= 1, got 0"),
        (GLUE, ["--method", "ivon", "--ivon_ess", "0"], "ivon_ess must be > 0, got 0"),
        (GLUE, ["--method", "mc_dropout", "--lora_dropout", "0"], "needs an adapter with lora_dropout > 0"),
        (GLUE, ["--temperature_scaling", "--calibration_samples", "100000"], "cannot hold out 100000 of"),
        (SUMMARIZATION, ["--temperature_scaling"], "temperature_scaling calibrates class probabilities"),
        (SUMMARIZATION, ["--method", "laplace"], "method laplace predicts classes"),
        (SUMMARIZATION, ["--method", "lora", "--decoding", "mbr"], "needs posterior samples, but method is 'lora'"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, tmp_path, capfd, script, flags, message):
    assert run_script(monkeypatch, script, "--demo", *flags, "--output_dir", tmp_path / "run") == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_the_wrong_adapter_and_missing_temperatures_are_refused(monkeypatch, tmp_path, capfd, plain):
    folder = tmp_path / "dropout"
    own = ["--method", "mc_dropout", "--max_steps", 2, "--do_train", "--output_dir", folder]
    assert run_script(monkeypatch, GLUE, *QUICK, *own) == 0
    for method in ("tfb", "lora"):
        flags = [*QUICK, "--method", method, "--adapter_name_or_path", folder, "--output_dir", tmp_path / method]
        assert run_script(monkeypatch, GLUE, *flags) == 2
        error = f"is of method mc_dropout, with samples already; --method {method} needs plain LoRA"
        assert error in capfd.readouterr().err
    for method in ("tfb", "laplace", "ensemble", "ivon"):
        flags = [
            *QUICK,
            "--method",
            method,
            "--do_eval",
            "--adapter_name_or_path",
            plain,
            "--output_dir",
            tmp_path / "e",
        ]
        assert run_script(monkeypatch, GLUE, *flags) == 2
        assert f"is not of method {method}: fit it with --do_train" in capfd.readouterr().err
    flags = [*QUICK, "--do_eval", "--temperature_scaling", "--adapter_name_or_path", plain]
    assert run_script(monkeypatch, GLUE, *flags, "--method", "lora", "--output_dir", tmp_path / "eval") == 2
    assert "was saved without temperatures" in capfd.readouterr().err


@pytest.mark.slow
def test_blob_goes_on_from_other_methods_but_not_from_stds_of_zero(monkeypatch, tmp_path, capfd, plain):
    own = ["--method", "mc_dropout", "--max_steps", 2, "--do_train", "--output_dir", tmp_path / "dropout"]
    fit = ["--method", "tfb", "--num_anchors", 10, "--do_train", "--adapter_name_or_path", plain]
    for flags in (own, [*fit, "--output_dir", tmp_path / "tfb"]):
        assert run_script(monkeypatch, GLUE, *QUICK, *flags) == 0
    go_on = [*QUICK, "--max_steps", 2, "--kl_cycle_steps", 2, "--do_train", "--adapter_name_or_path"]
    assert run_script(monkeypatch, GLUE, *go_on, tmp_path / "dropout", "--output_dir", tmp_path / "blob") == 0
    assert not (tmp_path / "blob" / METHOD_FILE).exists()
    capfd.readouterr()
    assert run_script(monkeypatch, GLUE, *go_on, tmp_path / "tfb", "--output_dir", tmp_path / "more") == 2
    assert "has stds of 0" in capfd.readouterr().err
    again = [*QUICK, "--method", "tfb", "--do_train", "--adapter_name_or_path", tmp_path / "blob"]
    assert run_script(monkeypatch, GLUE, *again, "--output_dir", tmp_path / "twice") == 2
    assert "is of method blob, with samples already; --method tfb needs plain LoRA" in capfd.readouterr().err


def test_a_warning_names_what_is_ignored(monkeypatch, tmp_path, caplog):
    flags = [*QUICK, "--method", "map", "--gamma", "3", "--noise", "local", "--calibration_samples", "9"]
    assert run_script(monkeypatch, GLUE, *flags, "--max_steps", 1, "--do_train", "--output_dir", tmp_path) == 0
    assert "--method map ignores --gamma, --eval_samples, --noise, --calibration_samples" in caplog.text


@pytest.mark.slow
def test_a_calibrated_lora_goes_on_as_blob_and_the_mean_of_blob_as_lora(monkeypatch, tmp_path, plain):
    short = [*QUICK, "--max_steps", 2, "--kl_cycle_steps", 2, "--do_train"]
    scaled = [*short, "--method", "lora", "--temperature_scaling", "--output_dir", tmp_path / "lora"]
    assert run_script(monkeypatch, GLUE, *scaled) == 0
    go_on = [*short, "--adapter_name_or_path", tmp_path / "lora", "--output_dir", tmp_path / "blob"]
    assert run_script(monkeypatch, GLUE, *go_on) == 0
    assert BlobModel.from_pretrained(tmp_path / "blob").has_posterior
    for method in ("lora", "mc_dropout"):
        back = [
            "--method",
            method,
            "--adapter_name_or_path",
            tmp_path / "blob",
            "--output_dir",
            tmp_path / method / "2",
        ]
        code = run_script(monkeypatch, GLUE, *short, *back)
        assert code == (0 if method == "lora" else 2)  # its LoRA was trained without dropout
    again = [*QUICK, "--do_eval", "--method", "lora", "--temperature_scaling", "--adapter_name_or_path"]
    assert run_script(monkeypatch, GLUE, *again, tmp_path / "lora", "--output_dir", tmp_path / "again") == 0
    scaled = [json.loads((tmp_path / name / "eval_temperature_results.json").read_text()) for name in ("again",)]
    assert scaled[0]["eval_temperature"] > 0


@pytest.mark.slow
def test_the_report_of_an_ensemble_tells_how_its_members_were_trained(monkeypatch, tmp_path):
    own = ["--method", "ensemble", "--ensemble_size", 2, "--max_steps", 3, "--learning_rate", 0.004, "--do_train"]
    for _ in range(2):  # trained, and put together again from what is there
        assert run_script(monkeypatch, GLUE, *QUICK, *own, "--output_dir", tmp_path) == 0
        report = (tmp_path / "report.md").read_text()
        assert "| learning rate | 0.004 |" in report and "| steps | 3 |" in report
        assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3
