"""What the generative experiments start from: two adapters, dialogues with their references, a scorer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from blob_hf import cli
from blob_hf.cli.adapters import saved_method
from blob_hf.data import demo
from blob_hf.data.summarization import (
    DEFAULT_PROMPT,
    Dialogue,
    Prompt,
    group_dialogues,
    load_summaries,
    scoring_rows,
    single_references,
)
from blob_hf.metrics.bertscore import PUBLISHED_MODEL, BertScorer
from blob_hf.trainer import BlobSeq2SeqTrainer, BlobSeq2SeqTrainingArguments
from blob_hf.tuner import adapter_files
from blob_hf.tuner.base_model import load_base_model
from blob_hf.tuner.build import get_blob_model, get_lora_model, load_lora
from blob_hf.tuner.config import BlobConfig, default_target_modules
from blob_hf.tuner.model import BlobModel
from blob_hf.utils.errors import BlobError
from blob_hf.utils.hub import fetching

logger = logging.getLogger(__name__)

METHODS = ("blob", "lora")


@dataclass
class ExperimentArguments:
    """Adapters, dialogues and decoding of an experiment."""

    blob: str | None = field(default=None, metadata={"help": "BLoB adapter: folder or Hub repo."})
    lora: str | None = field(default=None, metadata={"help": "Plain LoRA adapter to compare with."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/experiment-{name}."})
    dataset_name: str = field(default="knkarthick/dialogsum", metadata={"help": "Hub dataset; its test split."})
    test_file: str | None = field(default=None, metadata={"help": "csv, json or jsonl file of dialogues instead."})
    text_column: str = field(default="dialogue", metadata={"help": "Column of the dialogues."})
    summary_column: str = field(default="summary", metadata={"help": "Column of the reference summaries."})
    prompt: str = field(default=DEFAULT_PROMPT, metadata={"help": "The prompt of training; {dialogue} is filled in."})
    max_source_length: int = field(default=512, metadata={"help": "Longest prompt in tokens (the dialogue is cut)."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest summary in tokens."})
    num_dialogues: int = field(default=500, metadata={"help": "Dialogues, from the start of the test split."})
    seed: int = field(default=0, metadata={"help": "Names posterior samples, token samples and bootstrap resamples."})
    bertscore_model: str = field(
        default=PUBLISHED_MODEL, metadata={"help": "Encoder of BERTScore; none leaves it out."}
    )
    demo: bool = field(default=False, metadata={"help": "Train both adapters on the embedded demo first, no network."})

    def __post_init__(self) -> None:
        for name in ("num_dialogues", "max_new_tokens", "max_source_length"):
            if getattr(self, name) < 1:
                raise BlobError(f"{name} must be >= 1, got {getattr(self, name)}")


DEMO = {
    "test_file": str(demo.SUMMARIZATION_FILES["test"]),
    "max_source_length": 192,
    "max_new_tokens": 48,
    "num_dialogues": 12,
    "bertscore_model": "none",
}


@dataclass(frozen=True)
class Summarizer:
    """An adapter on its base model, ready to generate."""

    model: BlobModel
    tokenizer: Any


def start(args: ExperimentArguments, name: str, ignored: Sequence[str] = ()) -> Path:
    """Claim the output folder and set up logging.

    Args:
        ignored: Arguments that may differ between calls on the same folder.

    Raises:
        BlobError: The folder holds an experiment of other settings, or no adapters were given.
    """
    state = PartialState()
    cli.setup_logging(state.is_main_process, quiet_libraries=True)
    folder = Path(args.output_dir or f"runs/experiment-{name}")
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", *ignored)}
    cli.claim_folder(folder, {"experiment": name, **settings}, write=state.is_main_process)
    if args.demo:
        for method in METHODS:
            if getattr(args, method) is None:
                setattr(args, method, _train_demo(method, folder / method))
    missing = [f"--{method}" for method in METHODS if getattr(args, method) is None]
    if missing:
        raise BlobError(
            f"give {' and '.join(missing)}: train with run_summarization_blob.py (--method lora for plain LoRA), "
            "or use --demo"
        )
    return folder


def load_dialogues(args: ExperimentArguments) -> list[Dialogue]:
    """The first `num_dialogues` dialogues with their references."""
    files = {"test": args.test_file} if args.test_file else None
    splits = load_summaries(args.dataset_name, None, files, args.text_column, args.summary_column)
    if "test" not in splits:
        raise BlobError(f"{args.dataset_name} has no test split, only {', '.join(splits)}; give --test_file")
    dialogues = group_dialogues(splits["test"], args.num_dialogues)
    empty = [dialogue.id for dialogue in dialogues if not dialogue.text.strip()]
    if empty:
        raise BlobError(f"dialogue {empty[0]} is empty ({len(empty)} are); remove it from the file")
    return dialogues


def load_summarizer(args: ExperimentArguments, method: str) -> Summarizer:
    """The adapter of a method on its base model, in eval mode."""
    folder = adapter_files.resolve(getattr(args, method))
    found, config = saved_method(folder), adapter_files.read_config(folder)
    if found != method:
        raise BlobError(f"--{method} {getattr(args, method)} is an adapter of method {found}; exchange it")
    if method == "lora":
        model = load_lora(load_base_model(folder, config, None, {}), folder)
    else:
        model = BlobModel.from_pretrained(folder)
    source = str(folder) if (folder / "tokenizer_config.json").is_file() else str(config.base_model_name_or_path)
    with fetching("tokenizer", source, f"--{method}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return Summarizer(model.to(PartialState().device).eval(), tokenizer)


class Summarizers:
    """The adapters of an experiment with the prompts of its dialogues, one in memory at a time.

    Args:
        dialogues: Their prompts are cut to `max_source_length` and the model's positions; the log says how many were.
    """

    def __init__(self, args: ExperimentArguments, dialogues: Sequence[Dialogue]) -> None:
        self.args, self.dialogues = args, dialogues
        self._loaded: dict[str, tuple[Summarizer, list[list[int]]]] = {}

    def __call__(self, method: str) -> tuple[Summarizer, list[list[int]]]:
        """The summarizer of a method, and the token ids of each dialogue's prompt."""
        if method not in self._loaded:
            self._loaded.clear()
            summarizer = load_summarizer(self.args, method)
            self._loaded[method] = summarizer, self._encode(summarizer)
        return self._loaded[method]

    def _encode(self, summarizer: Summarizer) -> list[list[int]]:
        positions = getattr(summarizer.model.config, "max_position_embeddings", None)
        longest = min(self.args.max_source_length, positions or self.args.max_source_length)
        texts = [dialogue.text for dialogue in self.dialogues]
        return Prompt(self.args.prompt).encode(texts, summarizer.tokenizer, longest)["input_ids"]


def make_scorer(args: ExperimentArguments, folder: Path) -> BertScorer | None:
    """BERTScore with its cache in the experiment's folder, None for `--bertscore_model none`."""
    if args.bertscore_model == "none":
        return None
    return BertScorer(args.bertscore_model, cache=folder / "bertscore.sqlite", device=PartialState().device)


def _train_demo(method: str, folder: Path, max_steps: int = 100) -> str:
    """A small adapter trained on the embedded dialogues in some seconds, by all processes together."""
    is_trained = (folder / "adapter_model.safetensors").is_file()
    PartialState().wait_for_everyone()  # all have looked before anyone saves
    if is_trained:
        return str(folder)
    transformers.set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.BACKBONE_DIR)
    base = AutoModelForSeq2SeqLM.from_pretrained(demo.BACKBONE_DIR)
    targets = default_target_modules("bart", "summarization")
    config = BlobConfig(target_modules=targets, task_type="SEQ_2_SEQ_LM")
    model = get_blob_model(base, config) if method == "blob" else get_lora_model(base, config.to_lora())
    train = load_summaries(None, None, {"train": str(demo.SUMMARIZATION_FILES["train"])})["train"]
    training_args = BlobSeq2SeqTrainingArguments(
        str(folder), max_steps=max_steps, learning_rate=3e-3, per_device_train_batch_size=16,
        warmup_steps=6, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=100,
        dataloader_pin_memory=False, kl_cycle_steps=50,
    )  # fmt: skip
    trainer = BlobSeq2SeqTrainer(
        model=model,
        args=training_args,
        point_estimate=not model.has_posterior,
        train_dataset=scoring_rows(single_references(train), tokenizer, Prompt(), 192, 48),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=base),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    PartialState().wait_for_everyone()
    return str(folder)
