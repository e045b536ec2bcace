"""What BLoB does with every field of `LoraConfig`: rows of tests/tuner/test_lora_fields.py and of docs/peft.md.

`python tests/helpers/peft_features.py` writes the table into docs/peft.md anew.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import EvaConfig, LoraGAConfig, LoraRuntimeConfig
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "peft.md"
BEGIN, END = "<!-- the table of tests/helpers/peft_features.py -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True)
class Feature:
    """One value of one field, and what comes of it.

    Attributes:
        value: As given to `BlobConfig`.
        outcome: "works": attach, train, save and load give the same mean and the same samples, and plain PEFT loads
            the same mean. "refused": a `BlobError` says why.
        remark: For the table; of a refusal the reason.
        error: A pattern in the message of a refusal.
        family, targets, settings: The tiny model that it is tried on, its target modules, other fields.
        trains: Whether a train step moves the stds.
        shown: The value in the table, if not its `repr`.
    """

    field: str
    value: Any
    outcome: str = "works"
    remark: str = ""
    error: str = ""
    family: str = "bert"
    targets: Any = ("query", "value")
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = True
    shown: str = ""

    @property
    def text(self) -> str:
        return self.shown or repr(self.value)

    def config(self, **posterior: Any) -> dict[str, Any]:
        """Arguments of a `BlobConfig`."""
        targets = list(self.targets) if isinstance(self.targets, tuple) else self.targets
        return {"r": 4, "target_modules": targets, **self.settings, self.field: self.value, **posterior}


def refused(name: str, value: Any, remark: str, error: str = "", shown: str = "", **settings: Any) -> Feature:
    return Feature(name, value, "refused", remark, error or f"switch off {name}", settings=settings, shown=shown)


_VARIANT = "another method than plain LoRA"
_FROM_DATA = "takes a part out of the base weights that depends on data: loading could not take it out again"

FEATURES: tuple[Feature, ...] = (
    Feature("r", 2),
    refused("r", 0, "an integer >= 1", "r must be an integer >= 1"),
    refused("r", 2.5, "an integer >= 1", "r must be an integer >= 1"),
    Feature("target_modules", ["query"], shown="names"),
    Feature("target_modules", r".*\.(query|value)", shown="a regular expression"),
    Feature(
        "target_modules",
        "all-linear",
        settings={"task_type": "SEQ_CLS"},
        remark="a classifier's head stays PEFT's: trained in full",
    ),
    Feature("target_modules", None, remark="PEFT's default for the model's type"),
    Feature(
        "target_modules",
        ["classifier"],
        remark="a classifier's head named: it is frozen under its LoRA, and saved with it",
    ),
    refused(
        "target_modules",
        ["word_embeddings"],
        "the posterior is over linear layers",
        "word_embeddings is Embedding",
        shown="an embedding",
    ),
    refused(
        "target_modules",
        ["nothing"],
        "matches no layer; the message names some",
        "match no layer of Bert",
        shown="a name that is not there",
    ),
    Feature("exclude_modules", ["value"]),
    refused(
        "exclude_modules",
        ["query", "value"],
        "leaves no layer",
        r"none is left by exclude_modules=\{",
        shown="all targets",
    ),
    Feature("lora_alpha", 3),
    Feature("lora_dropout", 0.3),
    Feature(
        "fan_in_fan_out",
        True,
        family="gpt2",
        targets=("c_attn",),
        remark="for GPT-2's `Conv1D`; PEFT sets it by itself, too",
    ),
    Feature("bias", "all", remark="biases of the base model train and are saved with the adapter"),
    Feature("bias", "lora_only", remark="those of the layers with LoRA"),
    Feature("use_rslora", True),
    Feature("modules_to_save", ["classifier"], remark="trained in full, without a posterior"),
    Feature("modules_to_save", ["word_embeddings"]),
    Feature("init_lora_weights", False),
    Feature("init_lora_weights", "gaussian"),
    Feature("init_lora_weights", "orthogonal"),
    Feature(
        "init_lora_weights",
        "pissa",
        remark="changes the base model: for one adapter alone; no conversion to plain LoRA",
    ),
    Feature("init_lora_weights", "olora", remark="as `'pissa'`"),
    Feature(
        "init_lora_weights",
        "eva",
        remark="run PEFT's `initialize_lora_eva_weights` on the model: layers of other ranks have a posterior, too",
    ),
    Feature("init_lora_weights", "mica", remark="B stays as it starts, A is trained with its posterior"),
    refused(
        "init_lora_weights",
        "pissa_niter_4",
        "starts from a random decomposition: loading would find another one",
        "random decomposition",
    ),
    refused("init_lora_weights", "corda", _FROM_DATA, "depends on data"),
    refused("init_lora_weights", "lora_ga", _FROM_DATA, "depends on data"),
    refused(
        "init_lora_weights",
        "loftq",
        "replaces the base weights by quantised ones: load the base quantised instead",
        "quantised",
        loftq_config={"loftq_bits": 4},
    ),
    Feature("layers_to_transform", [1]),
    refused(
        "layers_to_transform",
        [7],
        "leaves no layer",
        r"none is left by layers_to_transform=\[7\]",
        shown="a layer that is not there",
    ),
    Feature("layers_pattern", "layer", settings={"layers_to_transform": [0]}),
    Feature("rank_pattern", {"query": 2}),
    Feature("alpha_pattern", {"value": 3}, settings={"rank_pattern": {"query": 2}, "use_rslora": True}),
    refused("megatron_config", {"tensor_model_parallel_size": 1}, "its layers shard A", shown="any"),
    Feature("megatron_core", "megatron.core", remark="read with `megatron_config` only"),
    Feature("trainable_token_indices", [4, 5], remark="trained in full, without a posterior"),
    Feature("trainable_token_indices", {"wte": [4]}, family="gpt2", targets=("c_attn",)),
    Feature("loftq_config", {"loftq_bits": 4}, remark="read with `init_lora_weights='loftq'` only, which is refused"),
    Feature("eva_config", EvaConfig(rho=2.0), settings={"init_lora_weights": "eva"}, shown="EvaConfig(...)"),
    Feature(
        "corda_config",
        CordaConfig(),
        remark="read with `init_lora_weights='corda'` only, which is refused",
        shown="CordaConfig(...)",
    ),
    Feature(
        "lora_ga_config",
        LoraGAConfig(),
        remark="read with `init_lora_weights='lora_ga'` only, which is refused",
        shown="LoraGAConfig(...)",
    ),
    refused("use_dora", True, _VARIANT),
    refused("velora_config", VeloraConfig(), _VARIANT, shown="VeloraConfig(...)"),
    refused("alora_invocation_tokens", [1], _VARIANT, task_type="CAUSAL_LM"),
    refused("use_qalora", True, "it pools what A reads, for GPTQ bases"),
    Feature("qalora_group_size", 8, remark="read with `use_qalora` only, which is refused"),
    refused("monteclora_config", MontecloraConfig(), "another posterior", shown="MontecloraConfig(...)"),
    Feature("layer_replication", [[0, 2], [1, 2]], remark="each copy of a layer has a posterior of its own"),
    Feature(
        "runtime_config",
        LoraRuntimeConfig(ephemeral_gpu_offload=True),
        remark="for DoRA: changes nothing",
        shown="LoraRuntimeConfig(...)",
    ),
    Feature("lora_bias", True, remark="B's bias is trained, without a posterior"),
    Feature(
        "target_parameters",
        ["intermediate.dense.weight"],
        remark="experts of MoE models, to which `'all-linear'` turns there; in training one draw a forward",
        shown="names",
    ),
    refused("use_bdlora", BdLoraConfig(), _VARIANT, shown="BdLoraConfig(...)"),
    refused("arrow_config", ArrowConfig(), _VARIANT, shown="ArrowConfig(...)"),
    refused("kasa_config", KasaConfig(), _VARIANT, shown="KasaConfig(...)"),
    Feature("ensure_weight_tying", True, family="gpt2", targets=("c_attn",), settings={"modules_to_save": ["wte"]}),
    Feature("task_type", "SEQ_CLS"),
    Feature("task_type", "CAUSAL_LM", family="gpt2", targets=("c_attn",)),
    Feature("peft_type", "LORA", remark="always, so that plain PEFT loads our files"),
    Feature("auto_mapping", {"dtype": "float32"}, remark="saving writes it anew", shown="a dict"),
    Feature("peft_version", "0.21.0", remark="saving writes it anew"),
    Feature("base_model_name_or_path", "a/name", remark="PEFT sets the model's own name"),
    Feature("revision", "main", remark="the base model's, for finding it again"),
    Feature("inference_mode", True, trains=False, remark="nothing trains"),
)


@dataclass(frozen=True)
class Method:
    """A public method of PEFT's models, what comes of it with a posterior, and the test that shows it.

    Attributes:
        proof: A test as file::function, from the folder of the tests.
    """

    name: str
    proof: str
    outcome: str = "works"
    remark: str = ""


_INJECTION, _IN_FLIGHT = "tuner/test_injection.py::test_", "tuner/test_in_flight.py::test_"
_MODEL, _LOADING, _PEFT = (
    "tuner/test_model.py::test_",
    "tuner/test_loading.py::test_",
    "tuner/test_peft_methods.py::test_",
)
_COUNTS, _OFF = (
    _PEFT + "what_peft_counts_and_shows",
    _PEFT + "a_switched_off_adapter_is_the_base_model_also_for_samples",
)
_SWAP, _SUM = _INJECTION + "hot_swapping_is_refused", _INJECTION + "a_weighted_sum_of_posteriors_is_one"
METHODS = (
    Method(
        "get_peft_model", _INJECTION + "a_blob_config_makes_a_posterior_whoever_takes_it",
        remark="with `mixed=True`, too",
    ),
    Method(
        "add_adapter", _INJECTION + "an_adapter_added_in_eval_mode_is_quiet",
        remark="of transformers, too; what fails leaves nothing behind",
    ),
    Method("inject_adapter", _INJECTION + "a_blob_config_makes_a_posterior_whoever_takes_it"),
    Method("delete_adapter", _MODEL + "a_deleted_adapter_takes_its_companions_along"),
    Method(
        "set_adapter", _INJECTION + "two_active_adapters_have_the_kl_and_the_noise_of_both",
        remark="several at once: the KL of all, independent noise",
    ),
    Method("disable_adapter", _OFF, remark="also inside `posterior_samples`"),
    Method("disable_adapter_layers", _OFF),
    Method("enable_adapter_layers", _OFF),
    Method("unload", _OFF),
    Method(
        "forward", _INJECTION + "rows_that_choose_their_adapter_get_its_samples", remark="with `adapter_names`, too"
    ),
    Method("generate", "inference/test_generate.py::test_a_sample_is_one_network_through_all_decoding_steps"),
    Method(
        "merge_adapter", _IN_FLIGHT + "merging_inside_is_refused", remark="the mean; not inside `posterior_samples`"
    ),
    Method("unmerge_adapter", _MODEL + "merging_an_adapted_lm_head_leaves_the_tied_embeddings_alone"),
    Method(
        "merge_and_unload", _MODEL + "merging_the_mean_and_merging_a_sample",
        remark="the mean; `merge_posterior_sample` merges a sample",
    ),
    Method("add_weighted_adapter", _SUM, remark="`cat`, which is exact, and `linear`"),
    Method(
        "add_weighted_adapter", _INJECTION + "weighted_sums_that_are_no_gaussian_are_refused", "refused",
        "`svd`, `ties`, `dare`, `magnitude_prune`, and plain adapters among them: no Gaussian",
    ),
    Method("save_pretrained", _MODEL + "save_and_load_gives_the_same_mean_and_the_same_samples"),
    Method("from_pretrained", _MODEL + "plain_peft_loads_the_posterior_mean_bit_for_bit"),
    Method("load_adapter", _MODEL + "two_adapters_are_saved_loaded_and_switched_by_name"),
    Method(
        "subtract_mutated_init", _LOADING + "a_conversion_to_plain_lora_is_refused", "refused",
        "of `save_pretrained(path_initial_model_for_weight_conversion=...)`: half of A would be fixed",
    ),
    Method("hotswap_adapter", _SWAP, "refused", "it brings no stds; `load_adapter` of the same name swaps in place"),
    Method("prepare_model_for_compiled_hotswap", _SWAP, "refused", "with `target_rank`: it pads plain LoRA"),
    Method("initialize_lora_eva_weights", _INJECTION + "eva_gives_each_layer_its_rank_and_keeps_the_posterior"),
    Method(
        "create_lorafa_optimizer", "trainer/kl/test_step.py::test_lora_fa_which_freezes_a_is_refused", "refused",
        "it freezes A",
    ),
    Method(
        "prepare_model_for_gradient_checkpointing", _PEFT + "gradient_checkpointing_draws_the_same_noise_twice",
        remark="on a GPU not inside `posterior_samples` with gradients: refused",
    ),
    Method("get_base_model", _COUNTS),
    Method("get_model_config", _COUNTS),
    Method("get_nb_trainable_parameters", _COUNTS, remark="means and stds"),
    Method("print_trainable_parameters", _COUNTS),
    Method("get_layer_status", _COUNTS),
    Method("get_model_status", _COUNTS),
    Method("set_requires_grad", _COUNTS, remark="means and stds together"),
    Method(
        "create_or_update_model_card",
        "integration/test_hub.py::test_a_card_of_the_repo_stays_and_names_that_lead_out_are_refused",
    ),
    Method(
        "supports_lora_conversion", _MODEL + "plain_peft_loads_the_posterior_mean_bit_for_bit",
        remark="the mean is plain LoRA",
    ),
)  # fmt: skip


def table() -> str:
    """docs/peft.md's tables."""
    head = "| field of `LoraConfig` | value | with BLoB | |\n| --- | --- | --- | --- |\n"
    fields = "".join(f"| `{one.field}` | {_code(one)} | {one.outcome} | {one.remark} |\n" for one in FEATURES)
    head_of_methods = "\n| of PEFT's models | with BLoB | |\n| --- | --- | --- |\n"
    return (
        head
        + fields
        + head_of_methods
        + "".join(f"| `{one.name}` | {one.outcome} | {one.remark} |\n" for one in METHODS)
    )


def _code(feature: Feature) -> str:
    words = feature.shown and not feature.shown.endswith("(...)")
    return feature.text if words else f"`{feature.text}`".replace("|", "\\|")


def rendered(text: str) -> str:
    """A text with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
