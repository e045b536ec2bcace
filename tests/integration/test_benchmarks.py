"""Every file of benchmarks/ runs, in a size not worth measuring, and prints figures that make sense."""

import importlib.util
import re
import runpy
import sys

import pytest
import torch
from helpers.running import ROOT

from blob_hf.baselines.laplace import library_is_there
from blob_hf.cli.route import FittedRoute
from blob_hf.cli.routes import ROUTES

ENGINE = "zero3" if importlib.util.find_spec("deepspeed") else "ddp"
SMOKE = {
    "evaluation": ["--model", "tiny", "--samples", 3, "--rounds", 1, "--threads", 1],
    "generation": [
        "--model", "tiny", "--samples", 2, "--source", 8, "--new_tokens", 4, "--rounds", 1, "--loop_samples", 1,
        "--summaries", 100,
    ],
    "posterior_samples": ["--tiny", "--samples", 2, "--length", 4, "--rounds", 1, "--threads", 1],
    "scoring": ["--tiny", "--samples", 2, "--rows", 2, "--length", 8, "--rounds", 1, "--threads", 1],
    "train_step": [
        "--model", "tiny", "--steps", 1, "--threads", 1, "--methods", "lora", "flipout", "--memory_processes", 1,
    ],
    "methods": [
        "--model", "tiny", "--rounds", 1, "--steps", 1, "--samples", 2, "--rows", 32, "--threads", 1,
        "--methods", "blob", "tfb", "--memory_processes", 1,
    ],
    "engines": ["--layers", 2, "--hidden", 256, "--steps", 4, "--engines", ENGINE],
    "predictive": ["--tiny"],
    "server": ["--minutes", 0.01, "--threads", 4],
}  # fmt: skip


def test_no_benchmark_is_left_out():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(SMOKE)


@pytest.fixture
def table(monkeypatch, capsys):
    """Run a benchmark; the text and the cells of its table by the first of each row."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of its own processes

    def run(name):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, SMOKE[name])])
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
        text = capsys.readouterr().out
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        header, rows = lines[0], [line for line in lines[1:] if not line[0].startswith("---")]
        return text, {row[0]: dict(zip(header, row, strict=False)) for row in rows}

    yield run
    torch.set_num_threads(threads)


def number(cell):
    return float(re.match(r"[-+0-9.]+", cell).group())


def test_evaluation(table):
    _, rows = table("evaluation")
    assert list(rows) == ["3 plain LoRA evaluations", "3 samples, one per forward", "3 samples, all in one forward"]
    ratios = [number(row["ratio"]) for row in rows.values()]
    assert ratios[0] == 1 and all(ratio > 0 for ratio in ratios)


def test_posterior_samples(table):
    _, rows = table("posterior_samples")
    assert len(rows) == 4 and all(number(row["drawing (ms)"]) > 0 for row in rows.values())
    first, second = (number(rows[f"tiny, q, v, r = {rank}"]["million numbers"]) for rank in (8, 16))
    assert first == pytest.approx(2 * 2 * 2 * 8 * 64 / 1e6, abs=0.005) and second == pytest.approx(2 * first, abs=0.01)


@pytest.mark.slow
def test_scoring(table):
    _, rows = table("scoring")
    ratios = {name: number(row["ratio"]) for name, row in rows.items()}
    assert len(ratios) == 12 and all(ratio > 0 for ratio in ratios.values())
    assert all(ratio == 1 for name, ratio in ratios.items() if "passes of plain" in name or "whole" in name)


def test_server(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["server.py", *map(str, SMOKE["server"])])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "server.py"), run_name="__main__")
    assert end.value.code == 0 and "0 wrong" in capsys.readouterr().out


@pytest.mark.slow
def test_generation(table):
    text, rows = table("generation")
    assert len(rows) == 2 * 3 + 1
    for name, row in rows.items():
        if not name.startswith("published"):
            ratio = number(row["ratio to plain LoRA"])
            assert ratio == 1 if "plain" in name else ratio > 0
    found = re.findall(r"ROUGE-1/2/L of 100 summaries x 3 references, (\d) processes: ([\d.]+) s", text)
    assert [count for count, _ in found] == ["1", "2"] and all(float(seconds) >= 0 for _, seconds in found)


@pytest.mark.slow
def test_predictive(table):
    text, rows = table("predictive")
    assert number(rows["N=0"]["forwards"]) == number(rows["iid N=1"]["forwards"]) == 1
    assert number(rows["trunk k=1 N=4"]["forwards"]) == 2 and number(rows["trunk k=2 N=10"]["forwards"]) == 7
    assert all(float(row["NLL"]) > 0 for row in rows.values() if "NLL" in row)
    forwards = [number(row["forwards"]) for name, row in rows.items() if name.startswith("auto")]
    assert forwards == sorted(forwards, reverse=True) and 2 <= forwards[-1] <= forwards[0] <= 24
    assert number(rows["iid N=10"]["of N=10's gain"]) == 100 or rows["iid N=10"]["of N=10's gain"] == ""
    student = [number(rows["distilled"][name]) for name in ("forwards", "NLL")]
    assert student == [1, number(rows["N=0"]["NLL"])]  # there the mean is in its place
    assert "processor time over count" in text


@pytest.mark.slow
def test_train_step(table):
    _, rows = table("train_step")
    assert list(rows) == ["lora", "flipout"] and number(rows["lora"]["ratio to lora"]) == 1
    assert all(number(row["ratio to lora"]) > 0 and number(row["peak MiB"]) > 50 for row in rows.values())
    assert number(rows["lora"]["KL share of step"]) == 0 < number(rows["flipout"]["KL share of step"]) < 100


@pytest.mark.slow
def test_methods(table):
    _, rows = table("methods")
    assert list(rows) == ["lora", "blob", "tfb"]
    assert number(rows["lora"]["train step"]) == number(rows["lora"]["peak memory"]) == 1
    assert number(rows["blob"]["trained parameters"]) > number(rows["lora"]["trained parameters"])
    assert number(rows["blob"]["train step"]) > 0 and number(rows["tfb"]["rows passed to fit"]) > 0
    assert all(number(row["evaluation"]) > 0 and number(row["peak memory"]) > 0 for row in rows.values())


@pytest.mark.slow
def test_costs_of_each_method(monkeypatch):
    """Every method that there is, in this process, without its memory."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    code = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))
    parser_defaults = {"model": "tiny", "steps": 1, "samples": 2, "rows": 32}
    args = type("Arguments", (), parser_defaults)
    for method, route in ROUTES.items():
        if method == "laplace" and not library_is_there():
            continue
        found = code["costs"](method, args)
        assert found["evaluation"] > 0 and found["networks"] >= 0, method
        assert (found["fit_rows"] > 0) is isinstance(route, FittedRoute), method


@pytest.mark.slow
def test_engines(table):
    text, rows = table("engines")
    assert list(rows) == ["one process", ENGINE] and rows["one process"]["processes"] == "1"
    assert all(number(row["speed against one"]) > 0 for row in rows.values())
    one, two = (number(row["parameters held (MiB)"]) for row in rows.values())
    assert 0 < two <= (0.75 * one if ENGINE == "zero3" else one)  # a process holds its shard
    assert "million parameters in float32" in text
