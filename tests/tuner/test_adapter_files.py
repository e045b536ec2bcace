"""Damage of every kind to the files of an adapter: one line each, and the model it was for is as it was before."""

import json
import os
import resource
import shutil

import pytest
import torch
from helpers.adapters import inputs_for, logits, saved_base, trained
from helpers.models import TARGETS, tiny_bart
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blob_hf import BlobConfig, BlobModel, get_blob_model
from blob_hf.tuner import adapter_files
from blob_hf.tuner.adapter_files import STD_FILE
from blob_hf.utils.errors import BlobError

MEAN_FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path):
    trained("bart", tmp_path / "base").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(file, change):
    """Change a safetensors file and keep its metadata."""
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(tensors, next(name for name in tensors if "lora_A" in name), metadata)
    save_file(tensors, file, metadata)


def std(change):
    """Change the std as another tool would, which writes no checksum."""

    def changed(tensors, name, metadata):
        metadata.clear()
        change(tensors, name)

    return lambda folder: rewrite(folder / STD_FILE, changed)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def flip(name, position):
    def flipped(folder):
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 4
        (folder / name).write_bytes(data)

    return flipped


def configure(**changes):
    def changed(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return changed


def pickled(folder):
    torch.save(load_file(folder / MEAN_FILE), folder / "adapter_model.bin")
    (folder / MEAN_FILE).unlink()


def mean_of_another_save(folder):
    trained("bart", folder.parent / "base").save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / MEAN_FILE, folder)


def of_another_base(**changes):
    def saved(folder):
        base = tiny_bart(**changes)
        base.save_pretrained(folder.parent / "other")
        model = get_blob_model(base, BlobConfig(target_modules=TARGETS["bart"], task_type="SEQ_2_SEQ_LM", r=4))
        model.save_pretrained(folder)

    return saved


DAMAGE = {
    "std missing": (lambda f: (f / STD_FILE).unlink(), "is missing from the BLoB adapter"),
    "std truncated": (cut(STD_FILE), "cannot read .*posterior_std"),
    "std header": (flip(STD_FILE, 3), "cannot read .*posterior_std"),
    "std bit": (flip(STD_FILE, -7), "posterior_std.safetensors is damaged: its contents do not match"),
    "std of other layers": (std(lambda t, name: t.pop(name)), "stds for other layers"),
    "std shape": (std(lambda t, name: t.update({name: torch.ones(1, 2)})), r"shape \(1, 2\)"),
    "std negative": (std(lambda t, name: t[name].neg_()), "not a standard deviation"),
    "std nan": (std(lambda t, name: t[name].fill_(float("nan"))), "not a standard deviation"),
    "newer format": (
        lambda f: rewrite(f / STD_FILE, lambda t, name, metadata: metadata.update(blob_hf='{"format": 2}')),
        "format version 2, this blob_hf reads up to 1; pip install -U",
    ),
    "metadata": (
        lambda f: rewrite(f / STD_FILE, lambda t, name, metadata: metadata.update(blob_hf="[")),
        "its metadata cannot be read",
    ),
    "mean missing": (lambda f: (f / MEAN_FILE).unlink(), "no adapter_model.safetensors"),
    "mean truncated": (cut(MEAN_FILE), "cannot read .*adapter_model"),
    "mean bit": (flip(MEAN_FILE, -7), "adapter_model.safetensors is damaged, or not the one that"),
    "mean of another save": (mean_of_another_save, "or not the one that posterior_std.safetensors was saved with"),
    "mean nan": (
        lambda f: rewrite(f / MEAN_FILE, lambda t, name, metadata: t[name].fill_(float("nan"))),
        "NaN or infinite entries",
    ),
    "pickle": (pickled, "a pickle like adapter_model.bin is refused"),
    "config missing": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "config not json": (lambda f: (f / CONFIG).write_text("{"), "it is not JSON"),
    "rank": (configure(r=2), r"has rank 4, but the configuration says rank 2 \(r=2\)"),
    "more layers": (of_another_base(encoder_layers=3), "does not fit this model: .*layers.2.*was made for"),
    "wider": (
        of_another_base(d_model=32),
        r"does not fit this model: .*has shape \(4, 32\), the model needs \(4, 16\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_and_leaves_the_model_alone(name, adapter, tmp_path):
    damage, message = DAMAGE[name]
    model = trained("bart", tmp_path / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    damage(adapter)
    base = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    for load in (
        lambda: BlobModel.from_pretrained(adapter, model=base),
        lambda: model.load_adapter(adapter, "second"),
        lambda: model.load_adapter(adapter, "default"),
    ):
        if name == "rank" and load.__code__.co_consts[-1] == "default":
            continue  # the model's own configuration says rank 4, as the file
        with pytest.raises(BlobError, match=message) as error:
            load()
        assert "\n" not in str(error.value)
    after = model.state_dict()
    assert list(model.peft_config) == ["default"] and after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("file", [MEAN_FILE, STD_FILE])
def test_no_flipped_bit_goes_unseen(adapter, tmp_path, file):
    """Anywhere in the file: either it is refused, or it was in a part without meaning (padding, metadata's order)."""
    good, data = adapter_files.read(adapter), (adapter / file).read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for position in torch.randint(len(data), (150,), generator=generator).tolist() + list(range(8, 60)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        (adapter / file).write_bytes(flipped)
        try:
            found = adapter_files.read(adapter)
        except BlobError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            for a, b in ((found.mean, good.mean), (found.std, good.std)):
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert refused > 150


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_stays_inside(adapter, subfolder):
    with pytest.raises(BlobError, match="subfolder must be a path inside"):
        BlobModel.from_pretrained(adapter, subfolder=subfolder)


@pytest.mark.parametrize("name", ["..", "../evil", "/tmp/evil", "a/b"])
def test_an_adapter_name_stays_inside(tmp_path, name):
    lora = get_peft_model(saved_base("bart", tmp_path / "base"), LoraConfig(target_modules=["q_proj"]), "default")
    model = BlobModel.from_pretrained(saved(lora, tmp_path / "lora"), model=saved_base("bart", tmp_path / "base"))
    model.peft_config[name] = model.peft_config["default"]
    with pytest.raises(BlobError, match="is not a folder name"):
        model.save_pretrained(tmp_path / "out" / "inside", selected_adapters=[name])
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [1, 2000, 16000])  # bytes: the config fails, the mean, the std
def test_a_full_disk_leaves_the_adapter_that_was_there(adapter, tmp_path, size):
    before, model = contents(adapter), trained("bart", tmp_path / "base", r=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # writing more fails, as on a full disk
    try:
        with pytest.raises(BlobError, match=f"cannot write to {adapter} .*make room") as error:
            model.save_pretrained(adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and contents(adapter) == before
    assert not [path for path in adapter.iterdir() if path.is_dir()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(adapter, tmp_path):
    adapter.chmod(0o500)
    with pytest.raises(BlobError, match="cannot write to .*Permission denied"):
        trained("bart", tmp_path / "base").save_pretrained(adapter)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", "/proc/adapter"):
        with pytest.raises(BlobError, match=f"cannot write to {folder} ") as error:
            trained("bart", tmp_path / "base").save_pretrained(folder)
        assert "\n" not in str(error.value)


def test_a_save_that_is_killed_leaves_the_old_adapter_whole(adapter, tmp_path, monkeypatch):
    """However far the process came: what is in the folder is the old adapter, and the next save works."""
    before, model = contents(adapter), trained("bart", tmp_path / "base")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for step in (
        "blob_hf.tuner.adapter_files.save_file",
        "blob_hf.tuner.adapter_files._digest",
        "blob_hf.utils.files._flush",
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, killed)
            model.save_pretrained(adapter)
        assert contents(adapter) == before
    (adapter / "_saving").mkdir()
    (adapter / "_saving" / "half").write_text("left by kill -9")
    model.save_pretrained(adapter)
    loaded = BlobModel.from_pretrained(adapter)
    inputs = inputs_for("bart")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs)) and not (adapter / "_saving").exists()


def test_checksums_do_not_depend_on_the_order_of_a_file(adapter):
    before, tensors = (adapter / MEAN_FILE).read_bytes(), load_file(adapter / MEAN_FILE)
    save_file(dict(sorted(tensors.items(), reverse=True)), adapter / MEAN_FILE, {"format": "pt", "by": "another tool"})
    assert (adapter / MEAN_FILE).read_bytes() != before
    found = adapter_files.read(adapter).mean
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_bfloat16_means_and_double_stds_are_checked_too(tmp_path):
    torch.manual_seed(0)
    mean = {"base_model.model.x.lora_A.weight": torch.randn(2, 3).bfloat16(), "s": torch.tensor(3)}
    stds = {"base_model.model.x.lora_A.weight": torch.rand(2, 3).double()}
    adapter_files.write(tmp_path, mean, stds)
    (tmp_path / CONFIG).write_text(json.dumps({"prior_std": 0.2}))
    read = adapter_files.read(tmp_path)
    assert torch.equal(read.std["base_model.model.x.lora_A.weight"], stds["base_model.model.x.lora_A.weight"])


def test_shards_are_not_saved(tmp_path):
    model = trained("bart", tmp_path / "base")
    state = {name: value.flatten()[:0] if "lora_A" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(BlobError, match="a shard that was not gathered"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    with pytest.raises(BlobError, match="pickles"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
