"""A model that visitors share: their answers are those that each would get alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from helpers.models import words
from helpers.pages import save_classifier, save_summarizer

from blob_hf import BlobModel, Sampling
from blob_hf.app.engine import Engine, Progress, Stopped, Watch, Writing
from blob_hf.utils.errors import BlobError

DIALOGUE = "#Person1#: Can I borrow the tent?\n#Person2#: Yes. Please return it on Monday."
LATER = "#Person1#: I want to travel to Rome.\n#Person2#: There is a train at nine."


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return Engine(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory):
    return Engine(save_summarizer(tmp_path_factory.mktemp("summarizer")))


def together(*calls):
    """What calls return that run at once."""
    barrier = Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_answers_are_those_of_predict_also_of_two_visitors_at_once(classifier):
    alone = BlobModel.from_pretrained(classifier.folder).eval()
    texts = words(2, seed=4)
    calls = [lambda text=text, seed=seed: classifier.classify((text,), 5, seed) for text in texts for seed in (0, 1)]
    for call, (text, seed) in zip(together(*calls), [(text, seed) for text in texts for seed in (0, 1)], strict=True):
        expected = alone.predict([text], sampling=Sampling(5, seed=seed))
        np.testing.assert_array_equal(call.prediction.sample_probabilities, expected.sample_probabilities)
        np.testing.assert_array_equal(call.mean.probabilities, alone.predict([text], sampling=0).probabilities)


def test_drawn_texts_of_two_visitors_do_not_mix(summarizer):
    """They draw their tokens from torch's one random state."""
    ways = [Writing(3, seed, "predictive", 1.5, 8) for seed in (1, 2)]
    calls = [lambda how=how, text=text: summarizer.write(text, how) for how in ways for text in (DIALOGUE, LATER)]
    alone = [call().prediction for call in calls]
    for one, expected in zip(together(*calls), alone, strict=True):
        assert one.prediction.samples == expected.samples and one.prediction.texts == expected.texts
        assert torch.equal(one.prediction.token_uncertainty.epistemic, expected.token_uncertainty.epistemic)
    assert len({str(one.samples) for one in alone}) == 4


def test_progress_is_told_and_a_stop_ends_the_answer(summarizer):
    class Following(Watch):
        def __init__(self, until):
            super().__init__()
            self.until, self.seen = until, []

        def report(self, progress):
            self.seen.append(progress)
            if progress.stage == self.until:
                self.stop()

    whole = Following(until=9)
    answer = summarizer.write(DIALOGUE, Writing(3, max_new_tokens=6), whole)
    assert {one.stage for one in whole.seen} == {0, 1}
    assert [len(one.texts) for one in whole.seen if one.stage == 0][-1] == 3  # one of each network
    assert whole.seen[-1].texts[0].strip() == answer.prediction.texts[0]
    assert summarizer.write(DIALOGUE, Writing(3, max_new_tokens=6)).prediction.texts == answer.prediction.texts
    for stage in (0, 1):
        stopped = Following(until=stage)
        with pytest.raises(Stopped):
            summarizer.write(DIALOGUE, Writing(3, max_new_tokens=6), stopped)
        assert sum(one.stage == stage for one in stopped.seen) == 1
    assert summarizer.write(DIALOGUE, Writing(3, max_new_tokens=6)).prediction.texts == answer.prediction.texts


def test_who_waits_is_told_so_and_may_leave(summarizer):
    watch = Watch()
    with ThreadPoolExecutor(1) as pool, summarizer._turn:
        left = pool.submit(summarizer.write, DIALOGUE, Writing(2, max_new_tokens=2), watch)
        assert watch.newest(30) == Progress(-1)
        watch.stop()
        with pytest.raises(Stopped):
            left.result(30)


def test_a_text_that_the_model_cannot_read_whole_is_answered_with_a_note(classifier, summarizer):
    assert classifier.classify(("w5 w6",), 2).note == ""
    assert classifier.classify((" ".join(["w5"] * 60),), 2).note == (
        "The text has 61 tokens and the model reads 40: its end was left out."
    )
    note = summarizer.write("word " * 2000, Writing(2, max_new_tokens=2)).note
    assert note.endswith(": its end was left out.")


def test_what_has_no_page_is_refused(classifier, summarizer, tmp_path):
    with pytest.raises(BlobError, match="must contain {dialogue} exactly once"):
        Engine(summarizer.folder, prompt="Say it")
    with pytest.raises(BlobError, match="a prompt is for summarizers"):
        Engine(classifier.folder, prompt="Say {dialogue}")
    with pytest.raises(BlobError, match="expected a folder or Hub repo"):
        Engine(tmp_path)
