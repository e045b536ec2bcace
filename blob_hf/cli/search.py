"""Hyperparameter search with Optuna or Ray Tune, through the Trainer's own `hyperparameter_search`."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from blob_hf.cli.route import FittedRoute, Route
from blob_hf.cli.routes import EnsembleRoute
from blob_hf.trainer.engines import shutdown
from blob_hf.trainer.trainer import BlobTrainer
from blob_hf.trainer.training_args import Arguments, BlobTrainingArguments
from blob_hf.utils import files
from blob_hf.utils.errors import BlobError

BACKENDS = {"optuna": "optuna", "ray": "ray[tune]"}
BEST_FILE = "best_run.json"


@dataclass
class SearchArguments:
    """Which hyperparameters to search, and with what."""

    hp_search: str | None = field(
        default=None,
        metadata={"help": "Search hyperparameters for the lowest validation NLL.", "choices": list(BACKENDS)},
    )
    hp_space: list[str] | None = field(
        default=None,
        metadata={"help": "Training arguments to vary: beta=0.05:0.5:log gamma=6:16 kl_schedule=geometric,elbo"},
    )
    hp_trials: int = field(default=20, metadata={"help": "Runs of the search."})
    hp_storage: str | None = field(
        default=None, metadata={"help": "Optuna storage, e.g. sqlite:///search.db: several machines share one search."}
    )


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, whole ones if both ends are, evenly spread or (`log`) so in their logarithm."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]


Space = Mapping[str, Range | Choice]


def parse_space(specifications: Sequence[str] | None, args: Any) -> dict[str, Range | Choice]:
    """Ranges and choices by name, from `name=low:high`, `name=low:high:log` or `name=a,b,c`.

    Args:
        args: Training arguments; only what they have can be varied.

    Raises:
        BlobError: naming the specification that does not fit.
    """
    space: dict[str, Range | Choice] = {}
    known = {one.name for one in fields(args)}
    for specification in specifications or []:
        name, _, text = specification.partition("=")
        if name not in known:
            raise BlobError(f"--hp_space {specification}: {name!r} is no training argument")
        parts = text.split(":")
        try:
            if len(parts) == 1 and text:
                space[name] = Choice(tuple(_number(value) for value in text.split(",")))
            elif len(parts) in (2, 3) and parts[2:] in ([], ["log"]):
                low, high = (_number(value) for value in parts[:2])
                space[name] = Range(low, high, len(parts) == 3)
                if not low < high or (len(parts) == 3 and low <= 0):
                    raise ValueError
            else:
                raise ValueError
        except (TypeError, ValueError):
            raise BlobError(
                f"--hp_space {specification}: write name=low:high, name=low:high:log (low > 0) or name=a,b,c"
            ) from None
    if not space:
        raise BlobError("--hp_search needs --hp_space, for example beta=0.05:0.5:log gamma=6:16")
    return space


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def optuna_space(space: Space) -> Callable[[Any], dict[str, Any]]:
    """What `hyperparameter_search` wants as hp_space for Optuna."""

    def suggest(trial: Any) -> dict[str, Any]:
        values = {}
        for name, one in space.items():
            if isinstance(one, Choice):
                values[name] = trial.suggest_categorical(name, one.values)
            elif isinstance(one.low, int) and isinstance(one.high, int):
                values[name] = trial.suggest_int(name, one.low, one.high, log=one.log)
            else:
                values[name] = trial.suggest_float(name, one.low, one.high, log=one.log)
        return values

    return suggest


def ray_space(space: Space) -> Callable[[Any], dict[str, Any]]:
    """What `hyperparameter_search` wants as hp_space for Ray Tune."""
    from ray import tune

    def domain(one: Range | Choice) -> Any:
        if isinstance(one, Choice):
            return tune.choice(list(one.values))
        if isinstance(one.low, int) and isinstance(one.high, int):
            return (tune.lograndint if one.log else tune.randint)(one.low, one.high + 1)
        return (tune.loguniform if one.log else tune.uniform)(one.low, one.high)

    return lambda trial: {name: domain(one) for name, one in space.items()}


def check_backend(args: SearchArguments) -> None:
    """Raise a BlobError when the library is not installed, or there is nothing to search."""
    if args.hp_search is not None and importlib.util.find_spec(args.hp_search) is None:
        raise BlobError(f"--hp_search {args.hp_search} needs it installed: pip install '{BACKENDS[args.hp_search]}'")
    if args.hp_trials < 1:
        raise BlobError(f"--hp_trials must be >= 1, got {args.hp_trials}")
    if args.hp_storage and args.hp_search != "optuna":
        raise BlobError("--hp_storage is Optuna's; give --hp_search optuna")


def check_route(route: Route, args: SearchArguments) -> None:
    """Refuse a method that is not one training, and a space that it does not read."""
    if route.name == "map" and any(one.startswith("beta=") for one in args.hp_space or []):
        raise BlobError("--method map makes beta a weight decay before the search: vary weight_decay instead")
    if isinstance(route, (FittedRoute, EnsembleRoute)):
        raise BlobError(f"--hp_search varies one training a trial, which method {route.name} has not")


def search(trainer: BlobTrainer, args: SearchArguments) -> dict[str, Any] | None:
    """Search for the lowest NLL of the predictive on the evaluation set, and write best_run.json.

    Args:
        trainer: A `BlobTrainer` made with `model_init`, so that every trial starts from a fresh model.

    Returns:
        run_id, eval_nll and hyperparameters of the best trial; None on the processes that do not lead the search.
    """
    space = parse_space(args.hp_space, trainer.args)
    own: dict[str, Any] = {}
    if args.hp_storage:
        own = {
            "storage": args.hp_storage,
            "study_name": Path(str(trainer.args.output_dir)).name,
            "load_if_exists": True,
        }
    make_space = optuna_space if args.hp_search == "optuna" else ray_space
    best: Any = trainer.hyperparameter_search(
        hp_space=make_space(space),
        n_trials=args.hp_trials,
        direction="minimize",
        backend=args.hp_search,
        **own,
    )
    found = None
    if best is not None:
        found = {"run_id": best.run_id, "eval_nll": best.objective, "hyperparameters": best.hyperparameters}
        files.write_text(Path(str(trainer.args.output_dir)) / BEST_FILE, json.dumps(found, indent=2) + "\n")
        flags = " ".join(f"--{name} {value}" for name, value in best.hyperparameters.items())
        print(f"lowest validation NLL {best.objective:.4f} of {args.hp_trials} trials; train with {flags}")
    shutdown(trainer.accelerator)
    return found


def searchable(args: Arguments) -> Arguments:
    """Training arguments in a class that Ray's workers know: they cannot import one of the script that was started."""
    known = next(
        kind for kind in type(args).__mro__ if kind.__module__ != "__main__" and issubclass(kind, BlobTrainingArguments)
    )
    same: Any = object.__new__(known)
    same.__dict__.update(vars(args))
    return same
