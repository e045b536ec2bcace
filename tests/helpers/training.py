"""A tiny classifier with a posterior, its data and its trainer, for the tests that train."""

from dataclasses import fields

import torch
from datasets import Dataset

from blob_hf import BlobConfig, BlobTrainer, BlobTrainingArguments, get_blob_model
from blob_hf.cli.method_arguments import MethodArguments
from blob_hf.cli.route import Job
from blob_hf.cli.routes import find_route
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


def trainer(folder, model=None, data=None, point_estimate=False, **changes):
    return BlobTrainer(
        model=model or blob_bert(), args=arguments(folder, **changes), train_dataset=data or rows(),
        eval_dataset=rows(13, seed=1), point_estimate=point_estimate,
    )  # fmt: skip


def fit(folder, method, make_model, data=None, calibration=None, **changes):
    """What the scripts do for --method: a trainer whose model is trained or fitted, and the outcome.

    Args:
        changes: Of the training arguments, and of `MethodArguments`.
    """
    names = {field.name for field in fields(MethodArguments)}
    method_args = MethodArguments(method, **{name: changes.pop(name) for name in list(changes) if name in names})
    args = arguments(folder, **changes)
    route = find_route(method)
    route.check(method_args)
    route.check_run(method_args, args)
    data = rows() if data is None else data

    def make_trainer(model, own=args):
        return BlobTrainer(
            model=model, args=route.arguments(own, data), train_dataset=data, eval_dataset=rows(13, seed=1),
            point_estimate=route.name != "blob" and not model.has_posterior,
        )  # fmt: skip

    fitted = make_trainer(make_model())
    outcome = route.train(Job(args, method_args, make_model, make_trainer, calibration), fitted)
    return fitted, outcome


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
