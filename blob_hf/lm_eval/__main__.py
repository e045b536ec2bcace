"""`python -m blob_hf.lm_eval ...`, or `blob lm-eval ...`: the harness's command, with the model `blob`.

The harness finds models in its own package only, and has no entry points for those of others.
"""

import sys
from collections.abc import Sequence

from blob_hf.cli.terminal import user_errors
from blob_hf.lm_eval import TASKS, register

_INCLUDE = "--include_path"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the harness's command; with no include_path given, our task is there.

    Args:
        argv: Its arguments; those of this process by default.
    """
    with user_errors("the same command starts anew"):
        register()
        from lm_eval.__main__ import cli_evaluate

        arguments = list(sys.argv[1:] if argv is None else argv)
        asks = any(one in ("-h", "--help") for one in arguments)
        if arguments and not asks and not any(one.split("=")[0] == _INCLUDE for one in arguments):
            arguments += [_INCLUDE, str(TASKS)]
        sys.argv = ["lm_eval", *arguments]  # where the harness reads them
        cli_evaluate()


if __name__ == "__main__":
    main()
