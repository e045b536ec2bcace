"""Look at an adapter, or at a run, in the browser: `blob app ADAPTER`, `blob app --run FOLDER`, `blob app --demo`."""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blob_hf.app import require_gradio
from blob_hf.app.demo import demo_run
from blob_hf.app.serving import LOCALHOST, Part, adapter_part, blocks, run_part, serve
from blob_hf.app.space import write_space
from blob_hf.cli.arguments import OneLineParser
from blob_hf.cli.terminal import setup_logging, user_errors
from blob_hf.data.loading import FORMATS
from blob_hf.utils.errors import BlobError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = OneLineParser(prog="blob app", description=(__doc__ or "").strip())
    own.add_argument("adapter", nargs="?", help="folder or Hub repo of an adapter, of any method")
    own.add_argument("--run", help="output folder of a run: its report, plots and predictions")
    own.add_argument("--demo", action="store_true", help="embedded data and models, trained once; no network")
    own.add_argument(
        "--space", metavar="DIR", help="instead of serving, write a Space for the Hub into this new folder"
    )
    own.add_argument("--examples", help=f"file of texts or questions to choose from: {FORMATS}; default: the run's")
    own.add_argument("--text_columns", nargs="+", help="of --examples: the one or two columns of the texts")
    own.add_argument("--prompt", help="summarizers: the prompt of the training; default: that of the run")
    own.add_argument("--host", help=f"who may reach it; 0.0.0.0: all (default: {LOCALHOST})")
    own.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    return own


def parts_of(args: argparse.Namespace) -> list[Part]:
    """The tabs that the flags ask for.

    Raises:
        BlobError: They ask for nothing, or for too much.
    """
    if args.demo:
        if args.adapter or args.run or args.examples or args.text_columns or args.prompt:
            raise BlobError("--demo has its own adapters, examples and run: leave out the rest")
        with ThreadPoolExecutor() as pool:
            classifier, summarizer = pool.map(demo_run, ("classifier", "summarizer"))
        return [
            adapter_part(classifier, api_name="classify"), adapter_part(summarizer, api_name="write"),
            run_part(classifier),
        ]  # fmt: skip
    if args.text_columns and not args.examples:
        raise BlobError("--text_columns is of the file that --examples names")
    if not args.adapter and not args.run:
        raise BlobError("name an adapter, or give --run FOLDER or --demo")
    parts = [adapter_part(args.adapter, args.prompt, args.examples, args.text_columns)] if args.adapter else []
    if not args.adapter and (args.examples or args.prompt):
        raise BlobError("--examples and --prompt are for the page of an adapter; --run shows what was saved")
    return parts + ([run_part(Path(args.run))] if args.run else [])


def title_of(args: argparse.Namespace) -> str:
    """What the page is called."""
    if args.demo:
        return "blob_hf: the demo"
    return f"{Path(args.adapter or args.run).name or args.adapter or args.run}: how sure is it?"


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors("start it again"):
        args = parser().parse_args(argv)
        require_gradio()
        setup_logging(is_main=True, quiet_libraries=True)
        if args.space is not None:
            if not args.adapter or args.run or args.demo or args.examples:
                raise BlobError("--space needs an adapter, and neither --run, --examples nor --demo")
            if args.text_columns or args.host or args.port is not None:
                raise BlobError("--space writes files and serves nothing: leave out --text_columns, --host and --port")
            texts = write_space(args.adapter, Path(args.space), args.prompt)
            print(f"{args.space} is a Space: python {args.space}/app.py starts it here, and its files are what to push")
            if texts:
                print(f"the texts in {', '.join(texts)} go with it; delete these files if they are not for others")
            return
        if args.port is not None and not 0 < args.port < 65536:
            raise BlobError(f"--port must be between 1 and 65535, got {args.port}")
        serve(blocks(parts_of(args), title_of(args)), args.host or LOCALHOST, args.port)


if __name__ == "__main__":
    main()
