"""The scripts under ZeRO-3 on two processes: the saved adapters of every method give the numbers of one process."""

import json

import pytest
from helpers.running import GLUE, ROOT, run_script, thorough
from test_distributed import launch

from blob_hf.baselines.laplace import library_is_there

pytestmark = pytest.mark.slow
ZERO3 = ROOT / "ds_configs" / "zero3.json"
DEMO = [
    "--demo", "--eval_samples", "3", "--max_eval_samples", "30", "--use_cpu", "true", "--disable_tqdm", "true",
    "--compare_base", "false", "--max_train_samples", "1000",
]  # fmt: skip


@pytest.fixture(autouse=True)
def deepspeed():
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")


def run_sharded(tmp_path, name, *arguments):
    code = "import runpy, sys\nsys.argv.insert(1, '--output_dir')\n"
    code += f"runpy.run_path({str(ROOT / GLUE)!r}, run_name='__main__')"
    return launch(tmp_path, code, name, 2, *DEMO, "--deepspeed", ZERO3, *arguments)


@pytest.mark.parametrize("method", ["ensemble", "laplace", thorough("scalabl"), thorough("ivon")])
def test_a_saved_method_gives_the_numbers_of_one_process(monkeypatch, tmp_path, method):
    """A frozen head, members' biases and the curvature's mean are shards; the draws are those of one process."""
    if method == "laplace" and not library_is_there():
        pytest.skip("laplace-torch is not installed")
    one, plain = tmp_path / "one", tmp_path / "plain"
    flags = ["--ensemble_size", 2, "--max_steps", 15] if method == "ensemble" else ["--max_steps", 15]
    if method == "laplace":
        trained = run_script(monkeypatch, GLUE, *DEMO, "--method", "lora", "--max_steps", 15, "--output_dir", plain)
        assert trained == 0
        flags = ["--adapter_name_or_path", plain, "--laplace_predictive", "sampled"]
    assert run_script(monkeypatch, GLUE, *DEMO, "--method", method, *flags, "--output_dir", one) == 0
    own = ["--laplace_predictive", "sampled"] if method == "laplace" else []
    found = run_sharded(tmp_path, "two", "--do_eval", "--method", method, *own, "--adapter_name_or_path", one)
    assert found.returncode == 0, found.stderr[-3000:]
    expected, results = (json.loads((tmp_path / n / "eval_results.json").read_text()) for n in ("one", "two"))
    assert expected["eval_nll"] != pytest.approx(expected["eval_mean_nll"], rel=1e-3)  # the samples do something
    for key in ("eval_nll", "eval_mean_nll", "eval_sample_nll", "eval_brier", "eval_accuracy"):
        assert results[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize("method", ["ensemble", thorough("ivon")])
def test_fitting_under_zero3_is_refused(tmp_path, method):
    found = run_sharded(tmp_path, method, "--method", method, "--max_steps", 2)
    assert found.returncode and f"method {method} works with whole models, not under DeepSpeed" in found.stderr
