"""A tiny classifier with a posterior, its data and its trainer, for the tests that train."""

import torch
from datasets import Dataset

from blob_hf import BlobConfig, BlobTrainer, BlobTrainingArguments, get_blob_model
from helpers.models import TARGETS, tiny_bert


def rows(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (count, 8), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
        "eval_samples": 3, "kl_cycle_steps": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    return BlobTrainingArguments(**{**defaults, **changes})


def blob_bert(noise="shared", seed=0, **config):
    torch.manual_seed(seed)
    return get_blob_model(tiny_bert(), BlobConfig(target_modules=TARGETS["bert"], noise=noise, **config))


def trainer(folder, model=None, data=None, **changes):
    model = model or blob_bert()
    return BlobTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=data or rows(), eval_dataset=rows(13, seed=1)
    )


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
