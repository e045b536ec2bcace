"""The page as a whole, and the server that it runs on: this machine alone, and nothing from other servers."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blob_hf.app import require_gradio
from blob_hf.app.beside import examples_of_file, examples_of_questions, longest_answer, saved_evaluation, saved_examples
from blob_hf.app.engine import CHAT, CHOICES, CLASSIFIER, Engine
from blob_hf.app.run_view import run_view
from blob_hf.cli.folders import run_settings
from blob_hf.utils.errors import BlobError

LOCALHOST = "127.0.0.1"
_MOST_WAITING = 128  # requests; who comes then is told that all are busy
_STYLE = Path(__file__).with_name("style.css")
_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]
# The browser itself refuses what would be fetched from elsewhere.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Part:
    """A tab of the page: its title, an introduction, and what lays it out."""

    title: str
    about: str
    build: Callable[[], None]


class OwnServerAlone:
    """ASGI middleware that tells browsers to fetch nothing from other servers."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def adapter_part(
    adapter: str | Path,
    prompt: str | None = None,
    examples: str | None = None,
    text_columns: Sequence[str] | None = None,
    api_name: str = "predict",
) -> Part:
    """The page of an adapter.

    Args:
        adapter: Folder or Hub repo.
        prompt: Of a summarizer; default that of its run, else its script's.
        examples: File of texts, or of questions; default those of the run, if they are there.
        text_columns: Of that file; default those that can only be meant.

    Raises:
        BlobError: As `Engine`; or a file beside it, or of examples, is damaged.
    """
    require_gradio()
    from blob_hf.app.pages.choices import ChoicePage
    from blob_hf.app.pages.classifier import ClassifierPage
    from blob_hf.app.pages.writer import WriterPage

    folder = Path(adapter)
    settings = run_settings(folder) if folder.is_dir() else {}
    own = settings.get("prompt")
    engine = Engine(adapter, prompt if prompt is not None else own if isinstance(own, str) else None)
    if engine.kind == CHOICES:
        if text_columns:
            raise BlobError(
                "--text_columns is for texts; this adapter answers questions, whose columns are question and choices"
            )
        asked = examples_of_questions(examples) if examples else saved_examples(engine.folder)
        evaluation = saved_evaluation(engine.folder, engine.model)
        about = "Choice probabilities of sampled networks, how unsure they are, and when to abstain."
        return Part("Multiple choice", about, ChoicePage(engine, evaluation, asked, api_name).build)
    texts = examples_of_file(examples, text_columns, engine.kind == CHAT) if examples else saved_examples(engine.folder)
    shown = [row for row in texts if all(isinstance(text, str) for text in row)]
    if engine.kind == CLASSIFIER:
        page = ClassifierPage(engine, saved_evaluation(engine.folder, engine.model), shown, api_name)
        about = "Class probabilities of sampled networks, how unsure they are, and when to abstain."
        return Part("Classifier", about, page.build)
    if not shown and examples:
        raise BlobError(f"{examples} has conversations, not texts, which the page has no place for as examples")
    writer = WriterPage(engine, [row[:1] for row in shown], longest_answer(settings), api_name)
    title = "Chat" if engine.kind == CHAT else "Summarizer"
    return Part(title, "A text with the words that the sampled networks disagree about.", writer.build)


def run_part(folder: Path) -> Part:
    """The page of a run's folder.

    Raises:
        BlobError: As `run_view`.
    """
    view = run_view(folder)
    require_gradio()
    from blob_hf.app.pages.run import RunPage

    return Part("Run", f"What the run {view.name} has left.", RunPage(view).build)


def blocks(parts: list[Part], title: str) -> Any:
    """The page: one part as it is, several as tabs."""
    require_gradio()
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {title}")
        if len(parts) == 1:
            gr.Markdown(parts[0].about)
            parts[0].build()
        else:
            with gr.Tabs():
                for part in parts:
                    with gr.Tab(part.title):
                        gr.Markdown(part.about)
                        part.build()
    return page


def serve(page: Any, host: str = LOCALHOST, port: int | None = None, wait: bool = True, own_alone: bool = True) -> str:
    """Serve a page until it is interrupted.

    Args:
        host: Which addresses may reach it: "0.0.0.0" for all.
        port: Default the first free one from 7860 on.
        wait: Return only when it has ended.
        own_alone: Have browsers fetch nothing from other servers.

    Returns:
        The address.

    Raises:
        BlobError: The port is taken, or the host is not this machine's.
    """
    import gradio as gr
    from datasets import disable_progress_bars
    from starlette.middleware import Middleware

    disable_progress_bars()  # a question is a data set of one row

    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_MONO).set(
        body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700", block_title_text_color="*neutral_700",
    )  # fmt: skip  # the theme's own greys are too light to read
    middleware = [Middleware(OwnServerAlone)] if own_alone else []
    page.queue(default_concurrency_limit=None, max_size=_MOST_WAITING, api_open=True)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            theme=theme, css=_STYLE.read_text(encoding="utf-8"), footer_links=[], show_error=False, ssr_mode=False,
            app_kwargs={"middleware": middleware}, enable_monitoring=False, pwa=False, mcp_server=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise BlobError(
            f"cannot listen on {host}:{port or '7860 to 7959'} ({' '.join(str(error).split())[:150]}); choose another "
            "--port or --host"
        ) from error
    print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()
    return str(address)
