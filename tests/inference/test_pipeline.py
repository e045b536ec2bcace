"""transformers' text classification pipeline with a `BlobModel` and with a folder, against predict_proba."""

import logging

import pytest
from helpers.adapters import trained
from helpers.models import tiny_tokenizer, words
from transformers import pipeline

from blob_hf import BlobModel, PredictivePipeline, Sampling
from blob_hf.utils.errors import BlobError

NAMES = {0: "no", 1: "perhaps", 2: "yes"}


@pytest.fixture(params=[True, False], ids=["head under LoRA", "head trained by PEFT"])
def adapter(request, tmp_path):
    targets = {} if request.param else {"target_modules": ["query", "value"]}
    model = trained("bert", tmp_path / "base", init_eps=0.9, **targets) if request.param else peft_head(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    loaded = BlobModel.from_pretrained(tmp_path / "adapter")
    loaded.get_base_model().config.id2label = NAMES
    return loaded, tmp_path / "adapter"


def peft_head(tmp_path):
    from helpers.adapters import saved_base
    from helpers.models import randomize_b

    from blob_hf import BlobConfig, get_blob_model

    config = BlobConfig(target_modules=["query", "value"], task_type="SEQ_CLS", init_eps=0.9)
    model = get_blob_model(saved_base("bert", tmp_path / "base"), config)
    randomize_b(model)
    return model.eval()


def scores(answers):
    return {answer["label"]: pytest.approx(answer["score"], rel=1e-4) for answer in answers}


def expected(model, text, samples):
    return dict(zip(NAMES.values(), model.predict_proba(text, tiny_tokenizer(), samples)[0], strict=True))


def test_a_pipeline_answers_with_the_posterior_mean_or_the_predictive(adapter, caplog):
    model, folder = adapter
    text, pair = words(1)[0], {"text": words(1)[0], "text_pair": words(1, seed=2)[0]}
    with caplog.at_level(logging.ERROR, logger="transformers"):
        mean = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())
        predictive = pipeline(
            "text-classification", model=model, tokenizer=tiny_tokenizer(), pipeline_class=PredictivePipeline,
            sampling=Sampling(3, seed=1),
        )  # fmt: skip
    assert "not supported" not in caplog.text
    assert scores(mean(text, top_k=None)) == expected(model, text, 0)
    assert scores(predictive(text, top_k=None)) == expected(model, text, Sampling(3, seed=1))
    assert scores(predictive([text], top_k=None, sampling=2)[0]) == expected(model, text, 2)
    assert expected(model, text, 0) != scores(predictive(text, top_k=None))
    best = model.predict([(pair["text"], pair["text_pair"])], tiny_tokenizer(), Sampling(3, seed=1))
    assert predictive(pair) == {"label": best.labels[0], "score": pytest.approx(best.confidence[0], rel=1e-4)}


def test_transformers_loads_a_folder_as_the_posterior_mean_and_is_told_the_names(adapter):
    model, folder = adapter
    text = words(1)[0]
    names = {"id2label": NAMES}
    plain = pipeline("text-classification", model=str(folder), tokenizer=tiny_tokenizer(), model_kwargs=names)
    assert scores(plain(text, top_k=None)) == expected(model, text, 0)
    with pytest.raises(BlobError, match=r"model=BlobModel.from_pretrained\(name\)"):
        pipeline(
            "text-classification", model=str(folder), tokenizer=tiny_tokenizer(), model_kwargs=names,
            pipeline_class=PredictivePipeline,
        )  # fmt: skip
