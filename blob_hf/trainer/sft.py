"""`BlobSFTTrainer`: TRL's supervised fine-tuning of a causal model, with our objective and evaluation.

TRL reads, tokenizes, masks and packs the rows. The loss of a batch, its KL, the evaluation, checkpoints and the model
card are those of `BlobTrainer`. This module needs TRL; nothing else in the package does.
"""

import copy
import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import peft
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from blob_hf.inference.predict import IGNORED_LABEL
from blob_hf.trainer.checkpoints import CheckpointMixin
from blob_hf.trainer.sft_rows import check_set, check_tokenizer, first_row
from blob_hf.trainer.trainer import BlobTrainerMixin
from blob_hf.trainer.training_args import DEFINING, BlobTrainingArguments, as_blob_arguments
from blob_hf.utils.errors import BlobError

if importlib.util.find_spec("trl") is None:
    raise BlobError("supervised fine-tuning needs TRL: pip install 'blob_hf[trl]'")

from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import create_model_from_path

_TOKENS_AT_ONCE = 512  # whose distribution over the vocabulary is looked at together


@dataclass
class BlobSFTConfig(SFTConfig, BlobTrainingArguments):
    """TRL's `SFTConfig` with `BlobArguments`; where both have a default, it is TRL's.

    Of TRL's own, `loss_type` is `nll`, and there is no auxiliary loss of routers (`router_aux_loss_coef`).
    `eval_packing` is false unless it is asked for: rows are evaluated one by one.
    """

    defining: ClassVar[list[str]] = [
        *DEFINING, "max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss",
        "assistant_only_loss", "shuffle_dataset", "dataset_text_field", "chat_template_path", "eos_token",
    ]  # fmt: skip

    def __post_init__(self) -> None:
        if self.class_weights is not None:
            raise BlobError("class_weights weighs the classes of a classifier; texts have none: leave it out")
        if self.loss_type not in ("nll", "chunked_nll"):
            raise BlobError(f"loss_type must be nll, the likelihood of the posterior, got {self.loss_type}")
        if self.router_aux_loss_coef:
            raise BlobError("router_aux_loss_coef would add a loss beside NLL and KL; leave it out")
        super().__post_init__()


@dataclass
class _Collator(DataCollatorForLanguageModeling):
    """TRL's collator; in a packed training it pads the rows that are not packed, those of an evaluation."""

    packed_rows: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.packed_rows and "seq_lengths" not in examples[0]:
            padded = copy.copy(self)
            padded.padding_free = padded.packed_rows = False
            return padded.torch_call(examples)
        return super().torch_call(examples)


class _SFTTrainer(SFTTrainer):
    """TRL's trainer, called as `BlobTrainerMixin` calls transformers', and without its own forward and casts."""

    def __init__(
        self, model: nn.Module, args: BlobSFTConfig, data_collator: Any, train_dataset: Any, eval_dataset: Any,
        processing_class: Any, model_init: Any, *others: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        own_forward = vars(base).get("forward")
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, *others, **kwargs
            )
        except (ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, BlobError) or not _raised_by_trl(error):
                raise
            raise BlobError(" ".join(str(error).split())) from error
        # TRL scores tokens in its own forward without logits; posterior samples and their predictive need the logits
        if own_forward is None:
            vars(base).pop("forward", None)
        else:
            base.forward = own_forward
        # On a quantised model TRL rounds all that is trained to bfloat16, where the KL's small steps would be lost
        for name, parameter in model.named_parameters():
            if name in trained and parameter.dtype != trained[name].dtype:
                parameter.data = trained[name].to(parameter.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's would write its own model card each time


class BlobSFTTrainer(BlobTrainerMixin, CheckpointMixin, _SFTTrainer):
    """`trl.SFTTrainer` for a `BlobModel`: NLL of the trained tokens + pi_t * KL, and evaluation by the predictive.

    Rows are in TRL's forms (prompt and completion, messages, text, or input_ids and labels), and TRL's arguments say
    which tokens are trained and how rows are packed. Evaluations add `perplexity` and `mean_perplexity`. In training
    the log has TRL's `mean_token_accuracy`, `entropy` (of the sampled network) and `num_tokens`.

    Args:
        model: A `BlobModel`, any model of PEFT or transformers, or a Hub id or folder of a base model.
        args: `BlobSFTConfig`; to TRL's or transformers' own BLoB's defaults are added.
        peft_config: Makes the adapter on a base model: a `BlobConfig`, or with `point_estimate=True` a `LoraConfig`.
        train_dataset: May be left out to evaluate only.
        quantization_config: Of the base model, if `model` is a name.
        kwargs: As of `BlobTrainerMixin` and `trl.SFTTrainer` (`formatting_func`).

    Raises:
        BlobError: Model, arguments, tokenizer and rows do not fit.
    """

    args: BlobSFTConfig  # type: ignore[assignment]
    arguments_class = BlobSFTConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if model is None or kwargs.get("model_init") is not None:
            raise BlobError("BlobSFTTrainer needs a model, as TRL's trainer does; model_init is not supported")
        own = _settled(as_blob_arguments(args, BlobSFTConfig))
        some = next(iter(eval_dataset.values()), None) if isinstance(eval_dataset, dict) else eval_dataset
        shown = some if train_dataset is None else train_dataset
        if shown is None:
            raise BlobError("BlobSFTTrainer needs train_dataset, or to evaluate only eval_dataset")
        set_seed(own.seed)  # of the adapter's weights, as TRL does
        network = _network(model, own, peft_config, quantization_config)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(network.config._name_or_path)
        row = first_row(shown)
        formatted = kwargs.get("formatting_func") is not None
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
        for where, rows in {"training": train_dataset, **evaluated}.items():
            check_set(rows, own.dataset_text_field, where, formatted)
        check_tokenizer(processing_class, row, own.chat_template_path)
        # TRL insists on rows to train on: those of an evaluation show it the form
        given = (shown.select([0]) if isinstance(shown, Dataset) else shown) if train_dataset is None else train_dataset
        super().__init__(network, own, data_collator, given, eval_dataset, processing_class, **kwargs)
        if train_dataset is None:
            self.train_dataset = None
        elif isinstance(self.train_dataset, Dataset) and not len(self.train_dataset):
            raise BlobError(f"no row has a token to train within max_length {own.max_length}; give a larger one")
        if data_collator is None:
            theirs = cast(DataCollatorForLanguageModeling, self.data_collator)
            fields = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
            self.data_collator = _Collator(**fields, packed_rows=own.packing)

    # ----- training ----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """`ObjectiveMixin`'s loss; TRL's figures of a training batch go into the log."""
        loss, outputs = super().compute_loss(model, {**inputs, "use_cache": False}, True, num_items_in_batch)
        if model.training:
            self._note_figures(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _note_figures(self, logits: Tensor, inputs: dict[str, Any]) -> None:
        labels = self._aligned_labels(dict(inputs))
        kept = labels != IGNORED_LABEL
        targets, scores = labels[kept], logits[kept]
        found = scores.new_zeros(4, dtype=torch.float32)  # right ones, entropy, targets, tokens
        for some, right in zip(scores.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True):
            log_probs = some.float().log_softmax(-1)
            found[0] += (log_probs.argmax(-1) == right).sum()
            found[1] -= (log_probs.exp() * log_probs).nan_to_num(nan=0.0).sum()
        found[2] = len(targets)
        mask = inputs.get("attention_mask")
        found[3] = inputs["input_ids"].numel() if mask is None else mask.sum()
        correct, entropy, count, tokens = self.accelerator.reduce(found, reduction="sum").tolist()
        figures = self._metrics["train"]
        figures["mean_token_accuracy"].append(correct / max(count, 1))
        figures["entropy"].append(entropy / max(count, 1))
        self._total_train_tokens += int(tokens) // self._tp_size
        figures["num_tokens"] = [self._total_train_tokens]

    # ----- evaluation --------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for kind in ("", "mean_"):
            nll = (output.metrics or {}).get(f"{prefix}_{kind}nll")
            if nll is not None:
                output.metrics[f"{prefix}_{kind}perplexity"] = math.exp(nll) if nll < 700 else math.inf
        return output

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `predict` on rows in any of TRL's forms."""
        return super().predict(self._tokenized(test_dataset), *args, **kwargs)

    def plain_loader(self, rows: Any) -> DataLoader:
        return super().plain_loader(self._tokenized(rows))

    def _tokenized(self, rows: Any) -> Any:
        if not isinstance(rows, Dataset) or self._skip_prepare_dataset or "input_ids" in rows.column_names:
            return rows
        tokenizer = self.processing_class
        check_set(rows, self.args.dataset_text_field, "evaluation", self._formatting_func is not None)
        return self._prepare_dataset(
            rows, tokenizer, self.args, bool(self.args.eval_packing), self._formatting_func, "test"
        )


def _settled(args: BlobSFTConfig) -> BlobSFTConfig:
    """Arguments with what TRL would settle later, or otherwise than we need it."""
    if args.pad_to_multiple_of == "auto":  # of arguments that were not made as an SFTConfig
        args.pad_to_multiple_of = None
    if args.eval_packing is None:
        args.eval_packing = False
    if args.router_aux_loss_coef is None:
        args.router_aux_loss_coef = 0.0
    return args


def _network(model: Any, args: BlobSFTConfig, config: PeftConfig | None, quantization_config: Any) -> Any:
    """The model to train: loaded if it is a name, with the adapter of a config on it."""
    if isinstance(model, str):
        settings = dict(args.model_init_kwargs or {})
        settings.setdefault("trust_remote_code", args.trust_remote_code)
        if quantization_config is not None:
            settings["quantization_config"] = quantization_config
        model = create_model_from_path(model, **settings)
    elif quantization_config is not None:
        raise BlobError("quantization_config is for a model that is loaded by its name; this one is loaded already")
    if config is not None:
        if isinstance(model, PeftModel):
            raise BlobError("the model has an adapter already: leave peft_config out, or give the base model")
        model = peft.get_peft_model(model, config)
    if isinstance(model, PeftModel) and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise BlobError("TRL's supervised fine-tuning has no adapter on lm_head; take it out of target_modules")
    return model


def _raised_by_trl(error: BaseException) -> bool:
    """Whether an error is TRL's complaint of what it was given, not one from further inside."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("trl.trainer.sft")
