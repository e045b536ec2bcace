"""The command line, or a file that stands for it, as dataclasses."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from blob_hf.cli.flags import RENAMED, check_known, explain
from blob_hf.cli.implied import implied
from blob_hf.cli.limits import check_numbers
from blob_hf.utils.errors import BlobError


def parse_arguments(
    types: Sequence[Any],
    demo: Mapping[str, Any],
    description: str,
    argv: Sequence[str] | None = None,
    pass_on: bool = False,
) -> tuple[Any, ...]:
    """Parse the command line, or a .json/.yaml file as the only argument, into dataclasses.

    Args:
        types: Argument dataclasses; one of them has a flag `demo`.
        demo: Defaults that take effect with `--demo` (anything given explicitly wins).
        pass_on: Return the arguments that no dataclass knows as a list at the end, instead of refusing them.

    Raises:
        BlobError: A value, a flag or a configuration key that the dataclasses refuse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(list(types), description=description, allow_abbrev=not pass_on)
    try:
        if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
            argv = _as_argv(_read_config(argv[0]))
        if "--demo" in argv:
            parser.set_defaults(**demo)
        values, rest = parser.parse_known_args(argv)
        if not pass_on:
            check_known(rest, parser.options)
        follows = implied(_given(types, argv), vars(values))
        parser.set_defaults(**{name: value for name, value in follows.items() if name in values})
        parsed = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=pass_on)
    except BlobError:
        raise
    except ValueError as error:
        raise BlobError(" ".join(str(error).split())) from error
    check_numbers(*(part for part in parsed if dataclasses.is_dataclass(part)))
    return parsed


def _given(types: Sequence[Any], argv: Sequence[str]) -> set[str]:
    """Names of the arguments that were typed, whatever their values."""
    parser = _Parser(list(types))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(argv)[0]))


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line instead of the whole usage."""

    @property
    def options(self) -> set[str]:
        """Every flag that it knows, with its dashes."""
        return {option for action in self._actions for option in action.option_strings}

    def error(self, message: str) -> NoReturn:
        if (found := re.match(r"ambiguous option: --(\w+)", message)) and found[1] in RENAMED:
            raise BlobError(explain(f"--{found[1]}", self.options))
        raise BlobError(f"{message} (--help lists the arguments)")


class _Parser(OneLineParser, HfArgumentParser):
    """The same of transformers' parser."""


def _read_config(path: str) -> dict[str, Any]:
    try:
        content = Path(path).read_text(encoding="utf-8")
        config = json.loads(content) if path.endswith(".json") else yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BlobError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BlobError(f"the configuration {path} must map argument names to values, got a {type(config).__name__}")
    return config


def _as_argv(config: dict[str, Any]) -> list[str]:
    """A configuration as command-line arguments, so that both go through the same types and checks."""
    argv: list[str] = []
    for name, value in config.items():
        if value is None or (name == "demo" and not value):
            continue
        argv.append(f"--{name}")
        if name == "demo":
            continue
        if isinstance(value, list):
            argv += [str(item) for item in value]
        else:
            argv.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return argv
