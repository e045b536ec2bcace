"""Commands as a user runs them, in this process."""

from blob_hf.experiments.__main__ import main


def run_experiment(*arguments):
    """Exit code of `python -m blob_hf.experiments`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code
    return 0
