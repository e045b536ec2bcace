"""The page of a chat: the conversation goes on, and what is shown is `model.predict`'s answer to all of it."""

from types import SimpleNamespace

import pytest
from helpers.models import words
from helpers.pages import save_chat

from blob_hf import BlobModel, Sampling
from blob_hf.app.beside import longest_answer
from blob_hf.app.engine import Engine
from blob_hf.inference.writing import DECODINGS
from blob_hf.utils.errors import BlobError

pytestmark = pytest.mark.slow  # Gradio takes seconds to import
SETTINGS = (3, 0.0, "predictive", 6, 0)  # samples, temperature, decoding, longest answer, seed
VISITOR = SimpleNamespace(session_hash="visitor")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs gradio")
    from blob_hf.app.pages.writer import WriterPage

    return WriterPage(Engine(save_chat(tmp_path_factory.mktemp("chat"))), [])


def said(turns):
    return [(one["role"], one["content"]) for one in turns]


def test_a_conversation_goes_on(page):
    assert page.talks
    model = BlobModel.from_pretrained(page.engine.folder).eval()
    first, second = words(2, seed=8)
    turns = []
    for message in (first, second):
        *_, (note, shown, turns, talk) = page.answer(message, turns, *SETTINGS, VISITOR)
        asked = turns[:-1]
        expected = model.predict([asked], sampling=Sampling(3), max_new_tokens=6)
        assert said(turns)[-2:] == [("user", message), ("assistant", expected.texts[0])] and not note
        for at in range(int((expected.tokens[0] != -100).sum())):
            assert f"<td>{float(expected.token_uncertainty.epistemic[0, at]):.3f}</td>" in shown
        assert all(sample in shown for sample in expected.samples[0])
        assert ">You</b>" in talk and ">Model</b>" in talk and "meaning" in shown
    assert [role for role, _ in said(turns)] == ["user", "assistant"] * 2


def test_settings_are_those_of_predict(page):
    from blob_hf.app.pages.writer import DECODING_CHOICES

    assert {value for _, value in DECODING_CHOICES} == set(DECODINGS)
    model = BlobModel.from_pretrained(page.engine.folder).eval()
    (text,) = words(1, seed=9)
    asked = [{"role": "user", "content": text}]
    plain = model.predict([asked], sampling=Sampling(4, seed=3), max_new_tokens=7)
    for decoding in DECODINGS:
        expected = model.predict(
            [asked], sampling=Sampling(4, seed=3), max_new_tokens=7, temperature=0.7, decoding=decoding
        )
        *_, (note, shown, turns, _) = page.answer(text, [], 4, 0.7, decoding, 7, 3, VISITOR)
        assert turns[-1]["content"] == expected.texts[0] and not note
        own = page.predict(text, 4, 0.7, decoding, 7, 3)
        assert own["samples"] == expected.samples[0] != plain.samples[0]
        assert own["generated_text"] == expected.texts[0]
        assert all(f">{value:.2f}<" in shown for value in expected.sample_log_probs[0])


def test_a_longest_answer_above_the_slider_is_its_end(page):
    from blob_hf.app.pages.writer import MOST_TOKENS, WriterPage

    assert WriterPage(page.engine, [], 5000).max_new_tokens == MOST_TOKENS
    assert longest_answer({"max_target_length": 7}) == 7 and longest_answer({}) == 128
    for value in ("many", 0, 2.5, True):
        with pytest.raises(BlobError, match="max_new_tokens in run_settings.json must be a whole number"):
            longest_answer({"max_new_tokens": value})


def test_turns_are_escaped(page):
    from blob_hf.app.pages.writer import turns_html

    shown = turns_html([{"role": "user", "content": "<script>1"}, {"role": "<script>2", "content": "a"}])
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 2


def test_only_an_answered_message_leaves_the_box(page):
    from blob_hf.app.pages.writer import unsent
    from blob_hf.app.serving import Part, blocks

    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    assert (unsent("w5", turns), unsent("w7", turns), unsent("w7", [])) == ("", "w7", "w7")
    built = blocks([Part("Chat", "", page.build)], "Chat")
    assert sum("stop" in str(one.get_config().get("elem_id")) for one in built.blocks.values()) == 1


def test_a_mistake_leaves_the_conversation_as_it_was(page):
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    for message, settings, sentence in (
        ("", SETTINGS, "The message is empty"),
        ("w7", (3, 0.0, "predictive", 600, 0), "600 new tokens leave no room for a text: the model takes 64"),
        ("w7", (3, 9.0, "predictive", 6, 0), "The temperature must be a number between 0 and 2."),
        ("w7", (3, 0.0, "random", 6, 0), "decoding must be one of predictive, mbr"),
    ):
        *_, (note, shown, after, _) = page.answer(message, turns, *settings, VISITOR)
        assert sentence in note and 'role="alert"' in note and not shown and after == turns


def test_an_error_inside_is_a_sentence_and_the_log_does_not_repeat_the_text(page, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("w55 w44 is in my message")

    monkeypatch.setattr(page.engine, "write", broken)
    *_, (note, _, _, _) = page.answer("w55 w44", [], *SETTINGS, VISITOR)
    assert "Something went wrong inside (RuntimeError)" in note
    assert "RuntimeError at " in caplog.text and "w55" not in caplog.text + note
