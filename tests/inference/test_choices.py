"""Multiple choice by letters and by texts, against loops over questions with the whole network."""

from string import ascii_uppercase

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import randomize_b
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from blob_hf import BlobConfig, BlobModel, BlobTrainer, BlobTrainingArguments, Sampling, get_blob_model
from blob_hf.data.multiple_choice import (
    PUBLISHED,
    TASKS,
    continuations,
    letter_prompt,
    tokenize_choices,
)
from blob_hf.inference.choices import ChoiceCollator, ChoiceScoring, answer_tokens, choice_rows
from blob_hf.inference.predict import predict_classes
from blob_hf.utils.errors import BlobError

QUESTIONS = [
    {"question": "who is here", "choices": ["the man", "a very old dog", "nobody"], "label": 1},
    {"question": "what is it and why was it there at all", "choices": ["rain", "the sun"], "label": 0},
    {"question": "where", "choices": ["here", "there", "far away", "at home", "in the sun"], "label": 4},
]
WORDS = {word for q in QUESTIONS for text in (q["question"], *q["choices"]) for word in text.split()}
WORDS |= {
    *PUBLISHED.letter.split(),
    *TASKS["boolq"].asking.letter.split(),
    "false",
    "true",
    *ascii_uppercase,
    *(f"{letter})" for letter in ascii_uppercase),
}


def of_words() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: index for index, word in enumerate(sorted(WORDS), start=2)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def of_bytes() -> PreTrainedTokenizerFast:
    """Every byte a token: no letter has one of its own."""
    alphabet = sorted(ByteLevel.alphabet())
    letters = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=letters)


def blob(kind: str = "llama") -> BlobModel:
    torch.manual_seed(0)
    size = len(of_words())
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128,
        )  # fmt: skip
        base, targets = LlamaForCausalLM(config), ["q_proj", "v_proj", "lm_head"]
    else:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=128))
        targets = ["c_attn", "lm_head"]
    model = get_blob_model(base, BlobConfig(target_modules=targets, task_type="CAUSAL_LM", init_eps=0.8))
    randomize_b(model)
    return model.eval()


def scoring(kind: str, normalization: str = "none") -> ChoiceScoring:
    tokens = answer_tokens(of_words(), "ABCDE", PUBLISHED.letter) if kind == "letter" else (0,) * 5
    return ChoiceScoring(kind, tokens, normalization)


def batch(how: ChoiceScoring, rows=QUESTIONS) -> dict[str, torch.Tensor]:
    tokenized = tokenize_choices(Dataset.from_list(rows), of_words(), PUBLISHED, how.scoring, 100, how.normalization)
    return ChoiceCollator(0, how.scoring)([tokenized[index] for index in range(len(tokenized))])


def by_a_loop(model: BlobModel, how: ChoiceScoring, row: dict) -> torch.Tensor:
    """Log-probabilities of one question's choices: whole vocabulary, one sequence at a time, without padding."""
    tokenizer = of_words()

    def log_probs(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text).input_ids])
        return ids[0], model(input_ids=ids).logits[0].log_softmax(-1)

    if how.scoring == "letter":
        letters = tokenizer.convert_tokens_to_ids(list(ascii_uppercase[: len(row["choices"])]))
        return log_probs(letter_prompt(row, PUBLISHED))[1][-1, letters].log_softmax(-1)
    scores = []
    for (context, text), choice in zip(continuations(row, PUBLISHED), row["choices"], strict=True):
        ids, scored = log_probs(context + text)
        start = len(tokenizer(context).input_ids)
        total = sum(scored[place - 1, ids[place]] for place in range(start, len(ids)))
        scores.append(total / {"none": 1, "characters": len(choice), "tokens": len(ids) - start}[how.normalization])
    return torch.stack(scores).log_softmax(-1)


WAYS = [("letter", "none"), ("text", "none"), ("text", "characters"), ("text", "tokens")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # relative and absolute positions
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_scores_are_those_of_a_loop_over_questions_for_the_mean_and_each_sample(kind, way):
    model, how = blob(kind), scoring(*way)
    model.set_companion(how)
    inputs = batch(how)
    assert inputs.pop("labels").tolist() == [1, 0, 4]
    found = predict_classes(model, inputs, Sampling(3, seed=2, batch_size=2))
    for index, row in enumerate(QUESTIONS):
        count = len(row["choices"])
        torch.testing.assert_close(found.mean_log_probs[index, :count], by_a_loop(model, how, row))
        assert (found.mean_log_probs[index, count:].exp() == 0).all()
        for sample in range(3):
            with model.posterior_samples(Sampling(1, seed=2, first=sample)):
                expected = by_a_loop(model, how, row)
            torch.testing.assert_close(found.sample_log_probs[index, sample, :count], expected)


@torch.no_grad()
def test_letters_are_scored_by_their_rows_of_the_head_alone():
    model, how, widths = blob(), scoring("letter"), []
    model.set_companion(how)
    model.get_output_embeddings().register_forward_hook(lambda *found: widths.append(found[2].shape[1:]))
    inputs = batch(how)
    del inputs["labels"]
    model(**inputs)
    assert widths == [(1, 5)]  # at the last position


@pytest.mark.parametrize("kind", ["letter", "text"])
@torch.no_grad()
def test_samples_of_the_last_layer_share_what_is_below(kind):
    model, how = blob(), scoring(kind)
    model.set_companion(how)
    inputs, one, rows = batch(how), Sampling(3, seed=2, layers=1, batch_size=1), []
    del inputs["labels"]
    expected = predict_classes(model, inputs, one).sample_log_probs  # alone there is nothing to share
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda *found: rows.append(len(found[2])))
    found = predict_classes(model, inputs, Sampling(3, seed=2, layers=1)).sample_log_probs
    torch.testing.assert_close(found, expected)
    assert (found[:, 0] - found[:, 1])[:, 0].abs().min() > 1e-4
    below, last = rows[2:]  # after the mean's
    assert last == 3 * below == 3 * rows[0]


def test_other_batches_go_to_the_model_itself():
    model = blob()
    plain = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    model.set_companion(scoring("letter"))
    assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, plain)


@pytest.mark.parametrize("way", WAYS[:2])
def test_trains_as_cross_entropy_of_the_choices_and_comes_back(way, tmp_path):
    """One SGD step without noise equals autograd on the loop's loss; then saved, loaded, evaluated alike."""
    model, reference, how = blob(), blob(), scoring(*way)
    for one in (model, reference):
        one.set_companion(how)
        for layer in [module for module in one.modules() if hasattr(module, "mean_only")]:
            layer.mean_only = True
    rows = tokenize_choices(Dataset.from_list(QUESTIONS), of_words(), PUBLISHED, how.scoring, 100)
    args = BlobTrainingArguments(
        tmp_path / "run", max_steps=1, per_device_train_batch_size=3, learning_rate=0.1, optim="sgd", use_cpu=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", remove_unused_columns=False,
        kl_schedule="none", eval_samples=2,
    )  # fmt: skip
    trainer = BlobTrainer(model, args, ChoiceCollator(0, how.scoring), rows, rows)
    trainer.train()
    losses = [-by_a_loop(reference, how, row)[row["label"]] for row in QUESTIONS]
    torch.stack(losses).mean().backward()
    trained = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad and not name.endswith("rho"):
            torch.testing.assert_close(trained[name], parameter - 0.1 * parameter.grad)
    metrics = trainer.evaluate()
    for layer in [module for module in model.modules() if hasattr(module, "mean_only")]:
        layer.mean_only = False
    model.save_pretrained(tmp_path / "adapter")
    again = BlobModel.from_pretrained(tmp_path / "adapter", blob().get_base_model())
    assert again.companion("choices") == how
    found = BlobTrainer(again, args, ChoiceCollator(0, how.scoring), rows, rows).evaluate()
    assert found["eval_nll"] == pytest.approx(metrics["eval_nll"], rel=1e-5)


def test_label_smoothing_spreads_over_the_choices_that_a_question_has(tmp_path):
    model, how = blob(), scoring("letter")
    model.set_companion(how)
    rows = tokenize_choices(Dataset.from_list(QUESTIONS), of_words(), PUBLISHED, how.scoring, 100)
    args = BlobTrainingArguments(
        tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False, kl_schedule="none",
        label_smoothing_factor=0.3,
    )  # fmt: skip
    run = BlobTrainer(model, args, ChoiceCollator(0, how.scoring), rows)
    for layer in [module for module in model.modules() if hasattr(module, "mean_only")]:
        layer.mean_only = True
    batch_of_all = run.data_collator([*rows])
    found = run._nll(model.train(), dict(batch_of_all), None)[0]
    expected = []
    for row in QUESTIONS:  # of different numbers of choices
        log_probs = by_a_loop(model, how, row)
        expected.append(-0.7 * log_probs[row["label"]] - 0.3 * log_probs.mean())
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("way", WAYS[:2])
def test_predict_answers_questions_by_letter(way):
    model, how = blob(), scoring(*way)
    model.set_companion(how)
    how.attach(model, None)
    found = model.predict(QUESTIONS, of_words(), Sampling(3, seed=2), batch_size=2)
    inputs = batch(how)
    inputs.pop("labels")
    expected = predict_classes(model, inputs, Sampling(3, seed=2))
    np.testing.assert_allclose(found.probabilities, expected.log_probs.exp(), atol=1e-6)
    assert found.labels == ["ABCDE"[index] for index in expected.log_probs.argmax(1)]
    one = model.predict({"question": "who is here", "choices": ["rain", "nobody"]}, of_words())
    assert one.labels[0] in "AB" and one.probabilities[0, 2:].sum() == 0
    with pytest.raises(BlobError, match="has 6 choices, but the adapter answers with at most 5: A, B, C, D, E"):
        model.predict({"question": "where", "choices": list("abcdef")}, of_words())


def test_a_passage_is_answered_with_words_as_published():
    """BoolQ: a softmax over the tokens of false and true, in the order of the labels 0 and 1."""
    asking, tokenizer, model = TASKS["boolq"].asking, of_words(), blob()
    how = ChoiceScoring(
        "letter", answer_tokens(tokenizer, asking.answer_words(2), asking.letter), letter_prompt=asking.letter,
        answers=asking.answers,
    )  # fmt: skip
    model.set_companion(how)
    how.attach(model, None)
    row = {"question": "is it rain", "passage": "the sun was there", "choices": ["false", "true"]}
    found = model.predict(row, tokenizer, Sampling(0))
    prompt = letter_prompt(row, asking)
    assert prompt.endswith("Passage: the sun was there\nQuestion: is it rain\nAnswer (true or false):")
    logits = model(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
    words = tokenizer.convert_tokens_to_ids(["false", "true"])
    np.testing.assert_allclose(found.probabilities[0], logits[words].softmax(-1).detach(), atol=1e-6)
    assert found.class_names == ["false", "true"]
    with pytest.raises(BlobError, match="arc_easy is answered by letters, but here by false, true"):
        how.check_answers(TASKS["arc_easy"].asking, "arc_easy")


def test_a_passage_that_the_first_question_lacks_is_asked():
    rows = [{"question": "q", "choices": ["x", "y"]}, {"question": "r", "choices": ["x", "y"], "passage": "p"}]
    how = ChoiceScoring("text", (0, 0), text_prompt="{passage} {question}")
    first, second = choice_rows(rows, how, of_words()).rows
    alone = choice_rows(rows[1], how, of_words()).rows[0]
    assert second == alone and len(first["input_ids"][0]) < len(second["input_ids"][0])


def test_what_is_too_long_loses_its_beginning_and_is_counted(caplog):
    rows = Dataset.from_list(QUESTIONS)
    whole = tokenize_choices(rows, of_words(), PUBLISHED, "letter", 100)
    with caplog.at_level("WARNING", "blob_hf"):
        cut = tokenize_choices(rows, of_words(), PUBLISHED, "letter", 25)
    longer = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > 25]
    assert longer and f"{len(longer)} of the prompts are longer than 25 tokens" in caplog.text
    assert all(cut["input_ids"][index] == whole["input_ids"][index][-25:] for index in longer)
    with pytest.raises(BlobError, match="alone is longer than max_length 4"):
        tokenize_choices(rows, of_words(), PUBLISHED, "text", 4)


def test_words_after_a_blank_are_divided_by_their_own_length():
    asked = Dataset.from_list([{"question": "the _ is here", "choices": ["man", "very old dog"]}])
    asking = TASKS["winogrande_s"].asking
    lengths = {
        normalization: tokenize_choices(asked, of_words(), asking, "text", 100, normalization)[0]["choice_lengths"]
        for normalization in ("characters", "tokens")
    }
    assert lengths == {"characters": [len("is here")] * 2, "tokens": [2.0, 2.0]}


def test_letters_without_a_token_of_their_own_are_refused():
    with pytest.raises(BlobError, match="no token for the answer ' A'"):
        answer_tokens(of_bytes(), "ABCD", PUBLISHED.letter)
    with pytest.raises(BlobError, match="scoring must be one of letter, text"):
        ChoiceScoring("words", (1, 2))
    with pytest.raises(BlobError, match="2 to 26 choices, got 1"):
        ChoiceScoring("text", (0,))
    assert np.unique(answer_tokens(of_words(), ascii_uppercase, PUBLISHED.letter)).size == 26


@pytest.mark.parametrize(("longest", "width"), [(63, 63), (64, 65), (128, 128), (192, 193)])
@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_no_batch_has_a_length_at_which_cudnn_loses_gradients(longest, width, scoring):
    """64 modulo 128, seen on an H100 with torch 2.11: NaN after the first batch of 64 tokens, whatever the method."""
    short, long = [5, 6], [5] * longest
    row = {"input_ids": long, "num_choices": 2, "labels": 0}
    rows = [row, {**row, "input_ids": short}]
    if scoring == "text":
        row = {**row, "input_ids": [short, long], "choice_tokens": [1, 1], "choice_lengths": [1.0, 1.0]}
        rows = [row]
    batch = ChoiceCollator(0, scoring)(rows)
    assert batch["input_ids"].shape[-1] == batch["attention_mask"].shape[-1] == width
    assert batch["attention_mask"].sum(-1).max() == longest
