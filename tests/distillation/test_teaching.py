"""What the teacher is asked, what is kept of it, and where the student begins: tiny models, and loops for the truth."""

import math

import numpy as np
import peft
import pytest
import torch
from helpers.adapters import one_line, saved_base, trained
from helpers.models import randomize_b, tiny_tokenizer, words
from helpers.running import thorough
from helpers.training import fit
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from blob_hf import (
    BlobConfig,
    BlobModel,
    DistilTrainer,
    Sampling,
    attach_mc_dropout,
    get_blob_model,
    get_lora_model,
    make_student,
)
from blob_hf.cli.distil import card_task
from blob_hf.cli.routes import find_route
from blob_hf.distillation import (
    ClassRows,
    Comparison,
    Context,
    Layout,
    TargetCache,
    TextRows,
    require_samples,
    score_texts,
)
from blob_hf.inference.choices import ChoiceScoring, choice_rows
from blob_hf.inference.inputs import rows_of
from blob_hf.tuner.base_model import peft_loading
from blob_hf.tuner.posterior import lora_layers, sampling_of
from blob_hf.utils.errors import BlobError

TEXTS = words(11, seed=3)


def saved(family, folder, **config):
    torch.manual_seed(0)
    model = trained(family, folder / "base", init_eps=0.9, **config)
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return saved("bert", tmp_path_factory.mktemp("bert"))


def class_rows(model, texts=TEXTS):
    return ClassRows(texts, rows_of(model, texts))


def arguments(folder, **changes):
    defaults = {
        "max_steps": 80, "per_device_train_batch_size": 11, "learning_rate": 2e-2, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 79,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **changes})


# ----- the cache --------------------------------------------------------------------------------------------------


def asked(model, cache, texts=TEXTS, sampling=3, block=4):
    rows = class_rows(model, texts)
    rows.ask(model, Sampling.of(sampling), cache, batch_size=2, block=block)
    return rows


def test_answers_are_those_of_predict_and_the_cache_changes_no_bit(bert, tmp_path):
    model = BlobModel.from_pretrained(bert)
    plain = asked(model, TargetCache(None, {}))
    expected = model.predict(TEXTS, sampling=Sampling(3))
    np.testing.assert_allclose(plain.log_probs.exp().numpy(), expected.probabilities, rtol=1e-4)
    np.testing.assert_allclose(plain.epistemic.numpy(), expected.epistemic, atol=1e-5)
    short = ClassRows(TEXTS, rows_of(model, TEXTS, max_length=4), 4)
    short.ask(model, Sampling(3), TargetCache(None, {}), batch_size=2, block=4)
    cut = model.predict(TEXTS, sampling=Sampling(3), max_length=4).probabilities
    np.testing.assert_allclose(short.log_probs.exp().numpy(), cut, rtol=1e-4)
    assert np.abs(cut - expected.probabilities).max() > 1e-3
    first, second = TargetCache(tmp_path, {"n": 3}), TargetCache(tmp_path, {"n": 3})
    written, read = asked(model, first), asked(model, second)
    assert (first.asked, second.asked) == (11, 0) and len(list(tmp_path.iterdir())) == 3
    for rows in (written, read):
        assert torch.equal(rows.log_probs, plain.log_probs) and torch.equal(rows.epistemic, plain.epistemic)


def test_a_killed_run_asks_for_what_is_missing_or_damaged_alone(bert, tmp_path):
    model = BlobModel.from_pretrained(bert)
    plain = asked(model, TargetCache(None, {}))

    class Killed(Exception):
        pass

    class Dying(TargetCache):
        def _asked(self, block, ask):
            if self.asked >= 4:
                raise Killed
            return super()._asked(block, ask)

    with pytest.raises(Killed):
        asked(model, Dying(tmp_path, {}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    again = TargetCache(tmp_path, {})
    found = asked(model, again)
    assert again.asked == 7 and torch.equal(found.log_probs, plain.log_probs)
    broken = sorted(tmp_path.glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:-3])
    mended = TargetCache(tmp_path, {})
    assert torch.equal(asked(model, mended).log_probs, plain.log_probs) and 3 <= mended.asked <= 4
    assert all(load_file(file) for file in tmp_path.glob("*.safetensors"))


def test_another_teacher_seed_or_row_is_another_shard(bert, tmp_path):
    model = BlobModel.from_pretrained(bert)
    asked(model, TargetCache(tmp_path, {"seed": 0}))
    for key, texts, expected in (
        ({"seed": 1}, TEXTS, 11), ({"seed": 0}, TEXTS, 0), ({"seed": 0}, [*TEXTS, "w4 w5"], 4),
        ({"seed": 0}, ["w9", *TEXTS[1:]], 4),
    ):  # fmt: skip
        cache = TargetCache(tmp_path, key)
        asked(model, cache, texts)
        assert cache.asked == expected
    (tmp_path / "file").write_text("")
    one_line("cannot write", lambda: asked(model, TargetCache(tmp_path / "file", {})))


# ----- texts ------------------------------------------------------------------------------------------------------

SLOW = pytest.mark.slow


def contexts(family, given):
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(4, 59, (n,), generator=generator).tolist()  # noqa: E731
    return [Context(draw(n), draw(m) if given else None) for n, m in ((5, 3), (2, 6), (7, 1))]


@pytest.mark.parametrize(
    ("family", "given", "layers"),
    [
        ("bart", True, None),
        ("gpt2", False, 1),
        pytest.param("bart", False, 1, marks=SLOW),
        pytest.param("gpt2", True, None, marks=SLOW),
    ],
)
def test_token_distributions_are_those_of_a_loop_over_rows_and_networks(family, given, layers, tmp_path):
    """With a posterior in the last layers alone, what all networks share is computed once."""
    model = BlobModel.from_pretrained(saved(family, tmp_path, posterior_layers=layers))
    layout = Layout.of(model, pad=0)
    rows = TextRows(contexts(family, given), layout, top_k=7, max_new_tokens=4)
    rows.ask(model, Sampling(3, batch_size=2), TargetCache(None, {}), batch_size=2, block=3)
    for number, one in enumerate(rows.contexts):
        target = rows.targets[number]
        assert target == one.target if given else 1 <= len(target) <= 4
        distributions = []
        for sample in range(3):
            with torch.no_grad(), model.posterior_samples(Sampling(1, first=sample)):
                if family == "bart":
                    start = [model.config.decoder_start_token_id]
                    decoder = torch.tensor([start + target[:-1]])
                    logits = model(input_ids=torch.tensor([one.tokens]), decoder_input_ids=decoder).logits[0]
                else:
                    logits = model(input_ids=torch.tensor([one.tokens + target])).logits[0]
                    logits = logits[len(one.tokens) - 1 : -1]
            distributions.append(logits.double().softmax(-1))
        each = torch.stack(distributions)
        mean = each.mean(0)
        top, ids = mean.topk(7, dim=-1)
        torch.testing.assert_close(rows.log_probs[number].exp().double(), top, rtol=1e-4, atol=1e-6)
        assert (rows.ids[number].long() == ids).float().mean() > 0.9  # but for ties in float32
        torch.testing.assert_close(rows.log_rest[number].exp().double(), 1 - top.sum(-1), rtol=1e-4, atol=1e-5)
        entropy = torch.special.entr
        mutual = entropy(mean).sum(-1) - entropy(each).sum(-1).mean(0)
        torch.testing.assert_close(rows.epistemic[number].double(), mutual, rtol=1e-3, atol=1e-5)
        if not given:  # greedy: each token is the likeliest after those before
            assert target == ids[:, 0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_a_student_of_texts_learns_them_and_the_cache_keeps_the_written_ones(family, tmp_path):
    folder = saved(family, tmp_path)
    model = BlobModel.from_pretrained(folder)
    layout = Layout.of(model, pad=0)
    found = []
    for _ in range(2):
        rows = TextRows(contexts(family, False), layout, top_k=60, max_new_tokens=4)
        rows.ask(model, Sampling(4), cache := TargetCache(tmp_path / "cache", {}), batch_size=2, block=2)
        found.append(rows)
    assert cache.asked == 0 and found[0].targets == found[1].targets
    assert all(torch.equal(a, b) for a, b in zip(found[0].log_probs, found[1].log_probs, strict=True))
    student = make_student(folder)
    batch = rows.collate([0, 1, 2])
    before = rows.loss(student.eval(), dict(batch)).item()
    DistilTrainer(student, arguments(tmp_path / "out", per_device_train_batch_size=3, max_steps=50), rows).train()
    after = rows.loss(student.eval(), dict(batch)).item()
    assert after < 0.35 * before
    # whole vocabulary: the KL is the cross-entropy less the entropy, by the student's own log-probabilities
    labelled = TextRows([Context(c.tokens, t) for c, t in zip(rows.contexts, rows.targets, strict=True)], layout)
    scores = [score_texts(one, labelled, Sampling(n), 2) for one, n in ((model, 4), (model, 0), (student, 0))]
    assert abs(scores[2]["nll"] - scores[0]["nll"]) < abs(scores[1]["nll"] - scores[0]["nll"])
    kept = Comparison(scores[0], scores[1], scores[2], 4, 3, {}).kept("nll")
    gain = scores[1]["nll"] - scores[0]["nll"]
    assert math.isnan(kept) if gain <= 0 else kept == pytest.approx((scores[1]["nll"] - scores[2]["nll"]) / gain)


# ----- the student ------------------------------------------------------------------------------------------------


def mean_probabilities(model):
    return model.predict(TEXTS, tiny_tokenizer(), sampling=0).probabilities


@pytest.mark.parametrize("head", ["trained", pytest.param("frozen under LoRA", marks=SLOW)])
def test_a_student_begins_as_the_mean_learns_the_predictive_and_plain_peft_loads_it(bert, tmp_path, head):
    bert = of_trained_head(tmp_path) if head == "trained" else bert
    teacher = BlobModel.from_pretrained(bert)
    student = make_student(bert)
    np.testing.assert_allclose(mean_probabilities(student), mean_probabilities(teacher), atol=1e-6)
    rows = asked(teacher, TargetCache(None, {}), sampling=Sampling(20))
    start = np.abs(mean_probabilities(student) - rows.log_probs.exp().numpy()).max()
    DistilTrainer(student, arguments(tmp_path / "t"), rows).train()
    found = mean_probabilities(student)
    assert np.abs(found - rows.log_probs.exp().numpy()).max() < 0.1 * start
    student.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s" / "posterior_std.safetensors").exists()
    kind = getattr(peft, peft_loading(student)[0])  # as the card says: PEFT trains a head, unless it is under LoRA
    plain = kind.from_pretrained(tmp_path / "s", num_labels=3).eval()
    tokens = tiny_tokenizer()(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        np.testing.assert_allclose(plain(**tokens).logits.softmax(-1).numpy(), found, atol=1e-5)


def of_trained_head(folder):
    base = saved_base("bert", folder / "base")
    config = BlobConfig(target_modules=["query", "value"], task_type="SEQ_CLS", r=4, init_eps=0.9)
    model = get_blob_model(base, config)
    randomize_b(model)
    dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"].data.normal_()
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("head", [pytest.param("trained", marks=SLOW), "frozen under LoRA"])
def test_a_student_of_another_rank_begins_at_the_best_approximation(tmp_path, head):
    folder = of_trained_head(tmp_path) if head == "trained" else saved("bert", tmp_path)
    teacher = BlobModel.from_pretrained(folder)
    larger = make_student(folder, r=6)
    assert larger.active_peft_config.r == 6
    np.testing.assert_allclose(mean_probabilities(larger), mean_probabilities(teacher), atol=1e-5)
    smaller, adapter = make_student(folder, r=2), "default"
    updates = {}
    for model in (teacher, smaller):
        for path, layer in lora_layers(model, adapter):
            product = layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            updates.setdefault(path, []).append(product.detach())
    for whole, part in updates.values():
        values = torch.linalg.svdvals(whole)
        assert torch.linalg.matrix_rank(part, rtol=1e-4) == 2
        torch.testing.assert_close((whole - part).norm(), values[2:].norm(), rtol=1e-3, atol=1e-6)
    # other layers: those of both begin as the mean; the head's update goes into the head, which PEFT then trains
    fewer = make_student(folder, target_modules=["query"])
    assert {path.rsplit(".", 1)[-1] for path, _ in lora_layers(fewer, adapter)} == {"query"}
    name = "base_model.model.classifier.modules_to_save.default.weight"
    if head == "trained":
        expected = dict(teacher.named_parameters())[name]
    else:
        (layer,) = [layer for path, layer in lora_layers(teacher, adapter) if path.endswith("classifier")]
        update = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
        expected = layer.get_base_layer().weight + layer.scaling[adapter] * update
    torch.testing.assert_close(dict(fewer.named_parameters())[name], expected, rtol=1e-4, atol=1e-5)
    fewer.save_pretrained(tmp_path / "fewer")
    again = mean_probabilities(BlobModel.from_pretrained(tmp_path / "fewer"))
    np.testing.assert_allclose(again, mean_probabilities(fewer), atol=1e-6)


def test_a_student_has_no_dropout_and_its_shape_is_checked(bert, tmp_path):
    one_line("rank of a student must be >= 1, got 0", lambda: make_student(bert, r=0))
    one_line("match no layer", lambda: make_student(bert, target_modules=["nowhere"]))
    torch.manual_seed(0)
    base = BlobModel.from_pretrained(bert).merge_and_unload()
    base.save_pretrained(tmp_path / "merged")
    base = type(base).from_pretrained(tmp_path / "merged")
    model = get_lora_model(base, LoraConfig(target_modules=["query"], r=2, lora_dropout=0.4, task_type="SEQ_CLS"))
    attach_mc_dropout(model)
    model.save_pretrained(tmp_path / "dropped")
    student = make_student(tmp_path / "dropped").train()
    rates = [m.p for m in student.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.4]
    assert student.active_peft_config.lora_dropout == 0 and not rates
    pissa = saved("bert", tmp_path / "p", init_lora_weights="pissa")
    one_line("student of another shape cannot", lambda: make_student(pissa, r=2))


def test_what_is_kept_is_a_share_of_the_gain():
    scores = [{"nll": 0.5, "ece": 0.1}, {"nll": 0.9, "ece": 0.1}, {"nll": 0.6, "ece": 0.2}]
    found = Comparison(*scores, 10, 7, {})
    assert found.kept("nll") == pytest.approx(0.75) and math.isnan(found.kept("ece"))
    assert "keeps 75 % of what 10 samples gain in NLL" in found.sentence() and "gain nothing in ECE" in found.sentence()
    assert found.facts()["kept"] == {"nll": pytest.approx(0.75), "ece": None}
    assert list(found.table().columns) == ["teacher, N=10", "teacher, N=0", "student", "kept of the gain"]
    with pytest.raises(BlobError, match="one network, without samples"):
        require_samples("map", "x")


# ----- teachers of every method -----------------------------------------------------------------------------------

CHANGES = {
    "mc_dropout": {}, "ensemble": {"ensemble_size": 2}, "laplace": {}, "tfb": {"num_anchors": 8}, "scalabl": {},
    "ivon": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", [name if name in ("ensemble", "laplace") else thorough(name) for name in CHANGES])
def test_every_method_teaches(method, tmp_path):
    if method == "laplace":
        pytest.importorskip("laplace")
    base = saved_base("bert", tmp_path / "base")

    def make_model():
        torch.manual_seed(0)
        own = type(base).from_pretrained(tmp_path / "base")
        lora = {"target_modules": ["query", "value", "classifier"], "r": 4, "task_type": "SEQ_CLS"}
        lora["lora_dropout"] = 0.3 if method == "mc_dropout" else 0.0
        model = find_route(method).fresh_model(own, lora, {})
        randomize_b(model)
        return model

    fitted, _ = fit(tmp_path / "run", method, make_model, **CHANGES[method])
    fitted.model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    teacher = BlobModel.from_pretrained(tmp_path / "adapter")
    require_samples(teacher.method, tmp_path)
    sampling = sampling_of(teacher, Sampling(5))
    rows = asked(teacher, TargetCache(tmp_path / "cache", {}), sampling=sampling)
    expected = teacher.predict(TEXTS, sampling=Sampling(5)).probabilities
    np.testing.assert_allclose(rows.log_probs.exp().numpy(), expected, atol=1e-5)
    student = make_student(tmp_path / "adapter")
    assert type(student.active_peft_config) is LoraConfig and not student.has_posterior
    np.testing.assert_allclose(mean_probabilities(student), mean_probabilities(teacher), atol=1e-5)
    before = np.abs(mean_probabilities(student) - expected).max()
    DistilTrainer(student, arguments(tmp_path / "t"), rows).train()
    assert np.abs(mean_probabilities(student) - expected).max() < 0.2 * before + 1e-3
    student.save_pretrained(tmp_path / "s")
    assert mean_probabilities(BlobModel.from_pretrained(tmp_path / "s")) == pytest.approx(mean_probabilities(student))


@pytest.mark.parametrize("kind", ["letter", pytest.param("text", marks=pytest.mark.slow)])
def test_a_student_of_choices_answers_questions(kind, tmp_path):
    torch.manual_seed(0)
    base, tokens = tiny_llama(tmp_path / "base"), tuple(range(5, 8))
    config = BlobConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", r=4, init_eps=0.9)
    model = get_blob_model(base, config)
    randomize_b(model)
    asking = {"letter_prompt": "{question} {lettered}", "text_prompt": "{question}"}
    model.set_companion(ChoiceScoring(kind, tokens if kind == "letter" else (0, 0, 0), **asking))
    model.eval().save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    teacher = BlobModel.from_pretrained(tmp_path / "adapter")
    choices = ["w5 w6", "w7", "w8 w9 w10"]
    questions = [{"question": text, "choices": choices[: 3 - i % 2]} for i, text in enumerate(words(4))]
    scoring = teacher.companion(ChoiceScoring.slot)
    rows = ClassRows(questions, choice_rows(questions, scoring, tiny_tokenizer()))
    rows.ask(teacher, Sampling(6), TargetCache(tmp_path / "cache", {}), batch_size=3, block=4)
    expected = teacher.predict(questions, sampling=6).probabilities
    np.testing.assert_allclose(rows.log_probs.exp().numpy(), expected, atol=1e-5)
    assert (expected[1, 2], expected[3, 2]) == (0, 0)  # a choice that is not there
    student = make_student(tmp_path / "adapter")
    assert card_task(student) == "multiple-choice"
    before = np.abs(student.predict(questions, sampling=0).probabilities - expected).max()
    DistilTrainer(student, arguments(tmp_path / "t", max_steps=40), rows).train()
    assert np.abs(student.predict(questions, sampling=0).probabilities - expected).max() < 0.5 * before
    student.save_pretrained(tmp_path / "s")
    again = BlobModel.from_pretrained(tmp_path / "s").predict(questions, tiny_tokenizer(), sampling=0)
    np.testing.assert_allclose(again.probabilities, student.predict(questions, sampling=0).probabilities, atol=1e-6)


def tiny_llama(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=128, **sizes)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)
