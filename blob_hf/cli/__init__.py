"""Floor 5, what the scripts share: arguments, output folders, one-line errors, the choice of a method."""

from blob_hf.cli.adapters import AdapterArguments, known_classes
from blob_hf.cli.arguments import parse_arguments
from blob_hf.cli.comparison import is_comparable, rival_arguments
from blob_hf.cli.decisions import hold_out_decisions
from blob_hf.cli.evaluation import check_best_metric
from blob_hf.cli.folders import claim_folder, claim_output_dir, data_source, name_of_files, with_output_dir
from blob_hf.cli.head import settle_head
from blob_hf.cli.held_out import early_stopping
from blob_hf.cli.languages import TextArguments
from blob_hf.cli.loading import LoadingArguments, with_saved_revision
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.methods import check_texts, choose_route, make_model, starting_adapter, warn_of_ignored
from blob_hf.cli.published import PublishedDefaults, with_kl_rate
from blob_hf.cli.route import Job
from blob_hf.cli.routes import find_route
from blob_hf.cli.rows import FixedLengths, RowArguments, asked_splits, require_split, split_names
from blob_hf.cli.terminal import setup_logging, user_errors

__all__ = [
    "AdapterArguments",
    "FixedLengths",
    "Job",
    "LoadingArguments",
    "MethodArguments",
    "PublishedDefaults",
    "RowArguments",
    "TextArguments",
    "asked_splits",
    "check_best_metric",
    "check_texts",
    "choose_route",
    "claim_folder",
    "claim_output_dir",
    "data_source",
    "early_stopping",
    "find_route",
    "hold_out_decisions",
    "is_comparable",
    "known_classes",
    "make_model",
    "name_of_files",
    "parse_arguments",
    "require_split",
    "rival_arguments",
    "settle_head",
    "setup_logging",
    "split_names",
    "starting_adapter",
    "user_errors",
    "warn_of_ignored",
    "with_kl_rate",
    "with_output_dir",
    "with_saved_revision",
]
