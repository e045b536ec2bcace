"""The pages in a real browser, headless: what they show is what the library says."""

import json
import math
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.models import words
from helpers.pages import (
    PROMPT,
    fit_sets,
    save_chat,
    save_choices,
    save_classifier,
    save_summarizer,
    some_questions,
)

from blob_hf import BlobModel, Sampling, generate_predictive
from blob_hf.app.beside import saved_evaluation
from blob_hf.app.class_markup import threshold_sentence
from blob_hf.app.class_view import decide
from blob_hf.app.engine import Engine
from blob_hf.app.run_view import WORST, run_view
from blob_hf.app.serving import Part, adapter_part, blocks, run_part, serve
from blob_hf.app.text_view import level_of
from blob_hf.data.summarization import Prompt
from blob_hf.inference.inputs import find_tokenizer
from blob_hf.utils.errors import BlobError

pytestmark = pytest.mark.slow
DIALOGUE = "#Person1#: Can I borrow the tent?\n#Person2#: Yes. Please return it on Monday or Friday."
PATIENCE = 120_000  # ms


def chromium(playwright):
    """Playwright's own browser, or the machine's."""
    own = shutil.which(playwright.chromium.executable_path)
    found = own or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium: playwright install chromium, or apt-get install chromium")
    return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory):
    return save_summarizer(tmp_path_factory.mktemp("summarizer"))


@pytest.fixture(scope="module")
def address(classifier_run, summarizer):
    pytest.importorskip("gradio", reason="the page needs gradio")
    parts = [
        adapter_part(classifier_run, api_name="classify"), adapter_part(summarizer, api_name="write"),
        run_part(classifier_run),
    ]  # fmt: skip
    page = blocks(parts, "Pages")
    yield serve(page, wait=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="tests in a browser need playwright")
    with api.sync_playwright() as playwright:
        browser = chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, and in `page.elsewhere` what it has asked other servers for."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.elsewhere = []
    own = (address, address.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: page.elsewhere.append(request.url) if not request.url.startswith(own) else None)
    page.goto(address)
    page.wait_for_selector("h1")
    yield page
    page.close()


def cells(page, table):
    """A table's rows with ordinary blanks."""
    rows = page.locator(f"{table} tbody tr").all()
    return [[" ".join(cell.inner_text().split()) for cell in row.locator("th, td").all()] for row in rows]


def percent(value):
    return f"{100 * value:.1f} %"


def test_a_classifier_shows_what_predict_says(page, classifier_run):
    text = words(1, seed=9)[0]
    page.get_by_label("Text", exact=True).fill(text)
    page.locator("#classify").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#classes .blob-card")
    model = BlobModel.from_pretrained(classifier_run).eval()
    found, mean = model.predict([text], sampling=Sampling(10)), model.predict([text], sampling=0)
    order = np.argsort(-found.probabilities[0])
    assert cells(page, "#classes .blob-classes") == [
        [
            found.class_names[i], percent(found.probabilities[0, i]), f"± {percent(found.std[0, i])}",
            percent(mean.probabilities[0, i]),
        ]
        for i in order
    ]  # fmt: skip
    tables = page.locator("#classes table").count()
    assert tables == 3
    values = [row[1] for row in cells(page, "#classes .blob-card:nth-of-type(2)")]
    assert values == [f"{value[0]:.3f}" for value in (found.entropy, found.aleatoric, found.epistemic)]
    both = cells(page, "#classes .blob-card:nth-of-type(3)")
    assert both[0][1:] == [found.labels[0], percent(found.confidence[0]), f"{found.entropy[0]:.3f}"]
    assert both[1][1:] == [mean.labels[0], percent(mean.confidence[0]), f"{mean.entropy[0]:.3f}"]
    ticks = page.locator("#classes .blob-bar").first.locator("i").all()
    lefts = [float(re.search(r"left:\s*([\d.]+)%", tick.get_attribute("style"))[1]) for tick in ticks]
    np.testing.assert_allclose(lefts, 100 * found.sample_probabilities[0, :, order[0]], atol=0.006)
    evaluation = saved_evaluation(classifier_run, model)
    threshold = page.get_by_label("number input for Abstain above this entropy (nats)")
    highest = math.ceil(100 * math.log(3)) / 100  # where the slider ends
    for limit in (round(float(found.entropy[0]) - 0.05, 2), min(round(float(found.entropy[0]) + 0.05, 2), highest)):
        threshold.fill(str(limit))
        threshold.press("Tab")
        decision = decide(float(found.entropy[0]), limit, evaluation)
        page.wait_for_selector(".blob-answers" if decision.answers else ".blob-abstains")
        page.wait_for_function(
            "said => document.querySelector('#decision').innerText.replace(/\\s+/g, ' ').includes(said)",
            arg=" ".join(threshold_sentence(decision).split()),
        )
    assert page.elsewhere == []


def test_bad_input_gets_a_sentence(page):
    for text, said in ((" ", "The text is empty"), ("a" * 100_001, "at most 100,000 are taken")):
        page.get_by_label("Text", exact=True).fill(text)
        page.locator("#classify").click()
        page.wait_for_selector(f"#classifier-message [role=alert]:has-text('{said}')")
    assert page.locator("#classes .blob-card").count() == 0


def predictive(model, text, samples, length):
    tokenizer = find_tokenizer(model)
    encoded = Prompt(PROMPT).encode([text], tokenizer, 512)
    inputs = {name: torch.tensor(values) for name, values in encoded.items()}
    found = generate_predictive(model, inputs, Sampling(samples), max_new_tokens=length, do_sample=False)
    return tokenizer, found


def test_a_summarizer_colours_its_tokens_as_generate_predictive_says(page, summarizer):
    page.get_by_role("tab", name="Summarizer").click()
    page.get_by_label("Dialogue or text").fill(DIALOGUE)
    page.get_by_text("More settings").nth(1).click()
    page.get_by_label("number input for Longest answer (tokens)").fill("12")
    page.get_by_label("number input for Longest answer (tokens)").press("Tab")
    page.locator("#write").click()
    page.wait_for_selector("#written .blob-card")
    model = BlobModel.from_pretrained(summarizer).eval()
    tokenizer, found = predictive(model, DIALOGUE, 10, 12)
    page.get_by_text("All tokens as a table").click()
    shown = cells(page, "#written details")
    unsure = found.uncertainty
    assert len(shown) == int((found.tokens[0] != -100).sum()) > 3
    for at, row in enumerate(shown):
        name, level, probability, *entropies = row[:6]
        assert name == (tokenizer.decode([int(found.tokens[0, at])]).strip() or "line break")
        assert level == str(level_of(float(unsure.epistemic[0, at])))
        assert probability == percent(float(unsure.log_probs[0, at].exp()))
        assert entropies == [
            f"{float(value[0, at]):.3f}" for value in (unsure.total, unsure.aleatoric, unsure.epistemic)
        ]
    visible = [
        at for at, token in enumerate(found.tokens[0].tolist()) if token not in (-100, *tokenizer.all_special_ids)
    ]
    tokens = page.locator("#written .blob-text .blob-token").all()
    assert len(tokens) == len(visible) and len({token.get_attribute("class") for token in tokens}) > 1
    for at, token in zip(visible, tokens, strict=True):
        epistemic = float(unsure.epistemic[0, at])
        assert float(token.get_attribute("data-epistemic")) == pytest.approx(epistemic, abs=1e-6)
        assert token.get_attribute("class") == f"blob-token blob-level-{level_of(epistemic)}"
        hover = token.get_attribute("title")
        assert f"epistemic {epistemic:.3f}" in hover and "instead: " in hover
    look = "e => getComputedStyle(e).textDecorationStyle + getComputedStyle(e).textDecorationLine"
    styles = [page.locator(f".blob-legend .blob-level-{level}").evaluate(look) for level in range(4)]
    assert len(set(styles)) == 4  # told apart without colours
    samples = [row[1] for row in cells(page, "#written .blob-samples")]
    assert samples == [" ".join(text.split()) for text in model.predict(
        [DIALOGUE], sampling=Sampling(10), prompt=PROMPT, max_new_tokens=12
    ).samples[0]]  # fmt: skip
    assert page.elsewhere == []


def test_an_answer_is_stopped(page):
    page.get_by_role("tab", name="Summarizer").click()
    page.get_by_label("Dialogue or text").fill(DIALOGUE)
    page.get_by_label("number input for Samples N").nth(1).fill("64")
    page.get_by_label("number input for Samples N").nth(1).press("Tab")
    page.locator("#write").click()
    page.wait_for_selector("#writer-message .blob-busy:has-text('64 networks write')")
    page.locator("#stop").click()
    page.wait_for_selector("#writer-message:has-text('Stopped.')")
    assert page.locator("#written .blob-card").count() == 0


def test_a_new_conversation_stays_new_though_an_answer_was_being_written(browser, tmp_path):
    from blob_hf.app.pages.writer import WriterPage

    chat = WriterPage(Engine(save_chat(tmp_path)), [], max_new_tokens=4)
    built = blocks([Part("Chat", "", chat.build)], "Chat")
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(serve(built, wait=False))
        first, second = words(2, seed=8)
        page.get_by_label("Your message").fill(first)
        page.locator("#write").click()
        page.wait_for_selector("#written .blob-card")
        assert page.locator("#turns .blob-turn").count() == 2
        with chat.engine._turn:  # the second answer is on its way
            page.get_by_label("Your message").fill(second)
            page.locator("#write").click()
            page.wait_for_selector("#writer-message .blob-busy")
            page.get_by_role("button", name="New conversation").click()
            page.wait_for_function("!document.querySelector('#turns .blob-turn')")
        page.wait_for_timeout(2000)
        assert page.locator("#turns .blob-turn, #written .blob-card, #writer-message .blob-message").count() == 0
        page.get_by_label("Your message").fill(second)
        page.locator("#write").click()
        page.wait_for_selector("#written .blob-card")
        assert page.locator("#turns .blob-turn").count() == 2
    finally:
        page.close()
        built.close()


def test_fitted_decisions_are_those_of_predict_and_promise_nothing_of_other_samples(browser, tmp_path):
    from blob_hf.app.pages.classifier import ClassifierPage

    folder = save_classifier(tmp_path)
    fit_sets(folder, Sampling(4, seed=2))
    (text,) = words(1)
    (expected,) = BlobModel.from_pretrained(folder).eval().predict([text], sampling=Sampling(4, seed=2)).records()
    own = ClassifierPage(Engine(folder), None, [])
    record = own.predict(text, num_samples=4, seed=2)
    assert record["prediction_set"] == expected["prediction_set"] and record["abstain"] == expected["abstain"]
    assert record["guarantee_holds"] and record["guarantee"].startswith("Promised for inputs like the 50 held-out rows")
    assert not own.predict(text, num_samples=4, seed=3)["guarantee_holds"]
    built = blocks([Part("Classifier", "", own.build)], "Page")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(PATIENCE)
    try:
        page.goto(serve(built, wait=False))
        page.get_by_label("Text", exact=True).fill(text)
        page.locator("#classify").click()  # it stands at the samples that were fitted to
        fitted = page.locator("#decision .blob-card")
        fitted.wait_for()
        assert fitted.locator(".blob-in-set").all_inner_texts() == expected["prediction_set"]
        assert ("Ask a person:" in fitted.inner_text()) == expected["abstain"]
        marked = page.locator("#classes .blob-classes tr:has(.blob-in-set) th").all_inner_texts()
        assert marked == expected["prediction_set"]
        assert "Promised for" in fitted.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_label("number input for Samples N").fill("3")
        page.get_by_label("number input for Samples N").press("Tab")
        page.locator("#classify").click()
        page.wait_for_selector("#decision .blob-busy:has-text('fitted with N=4. With N=3 its guarantee does not hold')")
        assert "Promised for" not in fitted.inner_text()
    finally:
        page.close()
        built.close()


def test_a_question_is_answered_as_predict_says(browser, tmp_path):
    from gradio_client import Client

    from blob_hf.app.space import write_space

    folder, asked = save_choices(tmp_path), some_questions(4)
    rows = tmp_path / "asked.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in asked))
    write_space(str(folder), tmp_path / "space")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "base")  # the Space has its own
    adapter = tmp_path / "space" / "adapter"
    model = BlobModel.from_pretrained(adapter).eval()
    found, mean = model.predict([asked[1]], sampling=Sampling(10)), model.predict([asked[1]], sampling=0)
    with pytest.raises(BlobError, match="--text_columns is for texts; this adapter answers questions"):
        adapter_part(adapter, examples=str(rows), text_columns=["question"])
    built = blocks([adapter_part(adapter, examples=str(rows))], "Page")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(PATIENCE)
    try:
        address = serve(built, wait=False)
        page.goto(address)
        page.get_by_label("Example").click()
        page.get_by_role("option").nth(1).click()
        page.wait_for_function(
            "said => [...document.querySelectorAll('textarea')].some(box => box.value == said)",
            arg="\n".join(asked[1]["choices"]),
        )
        page.locator("#classify").click()
        page.wait_for_selector("#classes .blob-card")
        count = len(asked[1]["choices"])
        assert cells(page, "#classes .blob-classes") == [
            [
                f"{found.class_names[i]}) {asked[1]['choices'][i]}", percent(found.probabilities[0, i]),
                f"± {percent(found.std[0, i])}", percent(mean.probabilities[0, i]),
            ]
            for i in np.argsort(-found.probabilities[0, :count])
        ]  # fmt: skip
        values = [row[1] for row in cells(page, "#classes .blob-card:nth-of-type(2)")]
        assert values == [f"{value[0]:.3f}" for value in (found.entropy, found.aleatoric, found.epistemic)]
        assert page.locator("#decision .blob-verdict").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_label("Choices, one a line").fill("w1")
        page.locator("#classify").click()
        page.wait_for_selector("#classifier-message [role=alert]:has-text('needs two choices or more')")
        client = Client(address, verbose=False, analytics_enabled=False)
        record = client.predict(question=asked[1]["question"], choices=asked[1]["choices"], api_name="/predict")
        (expected,) = found.records()
        assert record["label"] == expected["label"]
        assert record["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-6, abs=1e-9)
    finally:
        page.close()
        built.close()


def test_a_run_page_sorts_its_rows(page, classifier_run):
    page.get_by_role("tab", name="Run").click()
    page.wait_for_selector("#rows .blob-rows")
    doubts = [float(row[4]) for row in cells(page, "#rows .blob-rows")]
    assert len(doubts) == 25 and all(one >= other for one, other in pairwise(doubts))
    (saved,) = run_view(classifier_run).predictions
    worst = saved.ordered(WORST)
    assert [row[0] for row in cells(page, "#top .blob-card:nth-of-type(1)")] == [row.name for row in worst[:5]]
    page.get_by_label("Order").click()
    page.get_by_role("option", name="worst first").click()
    page.wait_for_selector("#rows .blob-message:has-text('worst first')")
    assert [row[0] for row in cells(page, "#rows .blob-rows")] == [row.name for row in worst[:25]]
    page.get_by_role("tab", name="Report").click()
    page.wait_for_selector("text=The report of a tiny run")
    assert page.elsewhere == []


def test_a_phone_and_the_dark(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#classify")
    page.get_by_label("Text", exact=True).fill(words(1)[0])
    page.locator("#classify").click()
    page.wait_for_selector("#classes .blob-card")
    for tab in ("Classifier", "Summarizer", "Run"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    colours = page.evaluate(
        "() => (s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.blob-card')))"
    )
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert light > 600 > 250 > dark
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("img:not([alt])").count() == 0
    page.close()
