"""What engines need of us, as far as one process shows it (tests/integration/test_distributed.py has real ones)."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.adapters import saved_base
from helpers.models import TARGETS, random_ids, randomize_b, tiny_bart, tiny_bert
from helpers.training import blob_bert, parameters
from helpers.training import trainer as make_trainer
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from blob_hf import BlobConfig, BlobTrainingArguments, get_blob_model
from blob_hf.trainer.engines import (
    check_deepspeed,
    check_fsdp_evaluation,
    check_fsdp_training,
    decorrelate_noise,
    engine_of,
    gathered_adapter,
    plain_evaluation,
    require_deepspeed,
    require_device,
)
from blob_hf.trainer.kl.schedule import kl_cycle_length
from blob_hf.tuner.noise import NOISE_ESTIMATORS
from blob_hf.tuner.posterior import gaussian_layers
from blob_hf.tuner.sampling import Sampling
from blob_hf.utils.errors import BlobError, NonFiniteLossError

# ----- DeepSpeed configs ------------------------------------------------------------------------------------------


def test_a_deepspeed_optimizer_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}))
    for config in (str(path), json.loads(path.read_text())):
        with pytest.raises(BlobError, match="'optimizer' section, whose steps would leave out the KL"):
            BlobTrainingArguments(str(tmp_path), deepspeed=config)


def test_a_missing_or_broken_config_is_one_line(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(BlobError, match=f"cannot read the DeepSpeed config .*{name}"):
            require_deepspeed(str(tmp_path / name))


def test_deepspeed_without_a_gpu_says_how_to_run_on_the_cpu(monkeypatch, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(BlobError, match="found no GPU on this machine; to run it on the CPU set use_cpu true"):
        BlobTrainingArguments(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})
    for use_cpu, variable in ((True, "0"), (False, "1")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
        require_device(SimpleNamespace(deepspeed="zero2.json", use_cpu=use_cpu))


def test_what_deepspeed_has_not_trained_is_evaluated_as_it_is(monkeypatch):
    """transformers asks `is_deepspeed_enabled` for an engine, which ZeRO-0 to -2 have in training alone."""
    for engine, zero3, inside in ((None, False, False), (None, True, True), ("an engine", False, True)):
        monkeypatch.setattr("blob_hf.trainer.engines.is_deepspeed_zero3_enabled", lambda zero3=zero3: zero3)
        trainer = SimpleNamespace(is_deepspeed_enabled=True, deepspeed=engine)
        with pytest.raises(KeyError), plain_evaluation(trainer):
            assert trainer.is_deepspeed_enabled is inside
            raise KeyError
        assert trainer.is_deepspeed_enabled


def test_without_deepspeed_the_extra_is_named(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name))
    with pytest.raises(BlobError, match=r"pip install 'blob_hf\[deepspeed\]'"):
        BlobTrainingArguments(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})


def test_a_batch_size_of_its_own_is_refused(tmp_path):
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")
    args = BlobTrainingArguments(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    for config, agrees in (({"train_micro_batch_size_per_gpu": 8}, True), ({"train_batch_size": 7}, False)):
        checked = deepspeed.HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 2}, **config})
        checked.trainer_config_process(args)
        holder = SimpleNamespace(hf_deepspeed_config=checked)
        if agrees:
            check_deepspeed(holder)
        else:
            with pytest.raises(BlobError, match="ds train_batch_size=7 vs hf .*=8"):
                check_deepspeed(holder)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_deepspeed_configs_follow_the_training_arguments(path, tmp_path):
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")
    require_deepspeed(str(path))
    args = BlobTrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7, use_cpu=True
    )
    config = deepspeed.HfTrainerDeepSpeedConfig(str(path))
    config.trainer_config_process(args)
    check_deepspeed(SimpleNamespace(hf_deepspeed_config=config))
    assert config.get_value("train_batch_size") == 15 and config.get_value("gradient_clipping") == 0.7
    assert config.get_value("zero_optimization.stage") == int(path.stem[4])
    # DeepSpeed would replace the Trainer's optimizer, with its KL step, by its own when it offloads
    assert not config.is_offload() or config.get_value("zero_force_ds_cpu_optimizer") is False


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_accelerate_configs_are_ones_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert str(config.distributed_type).endswith(expected)
    if expected == "DEEPSPEED":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


# ----- processes --------------------------------------------------------------------------------------------------


def accelerator(kind=DistributedType.NO, processes=1, index=0, stage=3):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(distributed_type=kind, num_processes=processes, process_index=index, state=state)


def test_engines_by_name(tmp_path):
    assert engine_of(accelerator()) == engine_of(accelerator(DistributedType.MULTI_GPU, 2)) == "torch"
    assert engine_of(accelerator(DistributedType.DEEPSPEED, 4)) == "zero-3 x 4"
    assert engine_of(accelerator(DistributedType.FSDP, 4)) == "fsdp"


def test_a_checkpoint_of_another_engine_is_refused_and_its_adapter_goes_on(tmp_path):
    run = make_trainer(tmp_path, blob_bert(), save_strategy="steps", save_steps=2)
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "log_state.json").read_text())
    assert state["engine"] == "torch"
    (checkpoint / "checkpoint_files.json").unlink()  # as a checkpoint of ZeRO would have its own seal
    (checkpoint / "log_state.json").write_text(json.dumps(state | {"engine": "zero-3 x 2"}))
    again = make_trainer(tmp_path / "again", blob_bert())
    with pytest.raises(BlobError, match=r"saved under zero-3 x 2, but this run is torch.*continue from its adapter"):
        again.train(resume_from_checkpoint=str(checkpoint))
    again.model.load_adapter(checkpoint, "default", is_trainable=True)
    again.train()


@pytest.mark.parametrize(("noise", "differs"), [("flipout", True), ("local", True), ("shared", False)])
def test_processes_draw_noise_of_their_own_unless_it_is_shared(noise, differs):
    model, draws = blob_bert(noise), []
    for index in range(2):
        torch.manual_seed(7)
        decorrelate_noise(7, accelerator(DistributedType.MULTI_CPU, 2, index), model)
        draws.append(next(iter(gaussian_layers(model).values()))(torch.ones(4, 16)))
    assert torch.equal(*draws) is not differs


def test_a_loss_that_another_process_finds_not_finite_stops_this_one(tmp_path, monkeypatch):
    run = make_trainer(tmp_path, blob_bert())
    monkeypatch.setattr(run.accelerator, "reduce", lambda value, reduction: value + 1)
    monkeypatch.setattr(type(run.accelerator), "num_processes", property(lambda self: 2))
    with pytest.raises(NonFiniteLossError, match="the loss became nan at step 1"):
        run.compute_loss(run.model.train(), {"input_ids": random_ids(4, 8), "labels": torch.tensor([0, 1, 2, 0])})


@pytest.mark.slow
def test_auto_find_batch_size_halves_the_batch_and_plans_the_kl_anew(tmp_path, monkeypatch):
    run = make_trainer(tmp_path, blob_bert(), auto_find_batch_size=True, kl_cycle_steps=None, gamma=6.0, max_steps=3)
    sizes, inner = [], run.compute_loss

    def too_large(model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise RuntimeError("CUDA out of memory.")
        return inner(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run, "compute_loss", too_large)
    run.train()
    assert sizes[0] == 8 and sizes[-3:] == [sizes[-1]] * 3 and sizes[-1] <= 3
    assert run.kl.schedule.cycle_steps == kl_cycle_length(24, 6.0, sizes[-1])
    assert [row["step"] for row in run.kl.history.rows] == [1, 2, 3]
    groups = run.kl.step.optimizer.param_groups
    assert [group.get("blob_role") for group in groups].count("mean") == 1


def test_the_limits_of_fsdp2_are_checked_before_it_meets_them():
    """A tied BART, and an evaluation before training: torch and accelerate refuse both, with messages of their own."""
    fsdp2, ddp = SimpleNamespace(is_fsdp2=True), SimpleNamespace(is_fsdp2=False)
    tied = get_blob_model(tiny_bart(), BlobConfig(target_modules=["q_proj"]))
    untied = get_blob_model(tiny_bart(tie_word_embeddings=False), BlobConfig(target_modules=["q_proj"]))
    with pytest.raises(BlobError, match="cannot shard the tied embeddings.*use DeepSpeed ZeRO-3"):
        check_fsdp_training(fsdp2, tied)
    with pytest.raises(BlobError, match="leave out an evaluation before training"):
        check_fsdp_evaluation(fsdp2, untrained=True)
    check_fsdp_training(ddp, tied)
    check_fsdp_training(fsdp2, untied)
    check_fsdp_evaluation(fsdp2, untrained=False)
    check_fsdp_evaluation(ddp, untrained=True)


# ----- torch.compile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISE_ESTIMATORS)
def test_a_layer_compiles_without_graph_break_or_recompilation(noise):
    layer = next(iter(gaussian_layers(blob_bert(noise)).values())).train()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)  # fullgraph: a graph break is an error
    for _ in range(3):
        compiled(torch.randn(5, 3, 16, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1 and torch.isfinite(layer.rho.grad).all()
    layer.eval()
    x = torch.randn(6, 3, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad(), layer.frozen_samples(Sampling(3, seed=0)):
        torch.testing.assert_close(compiled(x), layer(x))
    frames = counter.frame_count
    for seed in (1, 2):  # other samples are other values of the same graph
        with torch.no_grad(), layer.frozen_samples(Sampling(3, seed)):
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == frames
    torch.testing.assert_close(compiled(x), layer(x))  # and none in another context
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_uncompiled_one(tmp_path):
    finals = []
    for compiled in (False, True):
        model = blob_bert()
        torch._dynamo.reset()
        changes = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        run = make_trainer(tmp_path / str(compiled), model, **changes)
        run.train()
        finals.append((parameters(model), run.evaluate()["eval_nll"]))
    torch._dynamo.reset()
    for name, value in finals[0][0].items():
        torch.testing.assert_close(finals[1][0][name], value, msg=name)
    assert finals[1][1] == pytest.approx(finals[0][1], rel=1e-5)


# ----- bases of low precision -------------------------------------------------------------------------------------


def test_a_bfloat16_base_has_a_float32_posterior_that_trains(tmp_path):
    torch.manual_seed(0)
    model = get_blob_model(tiny_bert().bfloat16(), BlobConfig(target_modules=TARGETS["bert"]))
    assert next(model.get_base_model().bert.embeddings.parameters()).dtype == torch.bfloat16
    before = parameters(model)
    run = make_trainer(tmp_path, model, bf16=True)
    run.train()
    for layer in gaussian_layers(model).values():
        assert layer.weight.dtype == layer.rho.dtype == torch.float32
    assert any(not torch.equal(value, before[name]) for name, value in parameters(model).items())
    assert run.evaluate()["eval_nll"] < 3


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains_and_samples(tmp_path, bits):
    """bitsandbytes on the CPU; where it is not installed, the layers' own tests are what there is."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    config = BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    quantised = BitsAndBytesConfig(**options, llm_int8_skip_modules=["classifier"])
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map="cpu"
    )
    model = get_blob_model(base, BlobConfig(target_modules=["query", "value"], init_eps=0.9))
    assert "bit" in type(model.get_base_model().bert.encoder.layer[0].attention.self.query).__name__
    before = parameters(model)
    run = make_trainer(tmp_path / "run", model, max_steps=3)
    run.train()
    for name, value in parameters(model).items():
        assert value.dtype == torch.float32 and not torch.equal(value, before[name]), name
    randomize_b(model.eval())
    ids = random_ids(2, 8)
    with torch.no_grad(), model.posterior_samples(3, seed=0):
        together = model(input_ids=ids.repeat(3, 1)).logits
    for s in range(3):
        with torch.no_grad(), model.posterior_samples(Sampling(1, seed=0, first=s)):
            # int8 quantises activations by row, so rows do not influence each other
            torch.testing.assert_close(together[2 * s : 2 * s + 2], model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_gathered_for_saving_are_resized_embeddings_too(tmp_path):
    """FSDP's shards are gathered before saving: what is not among them would silently not be saved."""
    base = saved_base("gpt2", tmp_path / "base")
    base.resize_token_embeddings(65)
    model = get_blob_model(base, BlobConfig(target_modules=["c_attn"]))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered_adapter(model))
    whole, gathered = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "gathered"))
    name = "base_model.model.transformer.wte.weight"
    assert torch.equal(gathered[name], whole[name]) and gathered[name].shape[0] == 65
