"""Causal models with a posterior and a chat template, and decoding by hand: one row, merged networks, no padding."""

import copy

import torch

from blob_hf import BlobConfig, get_blob_model
from helpers.models import randomize_b, tiny_gpt2
from helpers.sft import llama

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
ENDS = [2, *range(30, 42)]


def causal(family, ends=ENDS):
    """With weights so large that every token and its position matters to the next."""
    torch.manual_seed(0)
    base = llama() if family == "llama" else tiny_gpt2()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    model = get_blob_model(base, BlobConfig(target_modules=TARGETS[family], init_eps=0.9, task_type="CAUSAL_LM"))
    randomize_b(model)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 0
    return model.eval()


def networks(model, samples, seed):
    """Each posterior sample as a plain transformers model."""
    return [copy.deepcopy(model).merge_posterior_sample(seed, index).eval() for index in range(samples)]


@torch.no_grad()
def by_hand(models, ids, count, ends=ENDS):
    """Greedy decoding of the average of networks, a whole forward for each token.

    Returns:
        Tokens with the end token, and of each the log-probability, total entropy, and aleatoric entropy (rows of 3).
    """
    tokens, unsure = [], []
    while len(tokens) < count and not (tokens and tokens[-1] in ends):
        row = torch.tensor([[*ids, *tokens]])
        probs = torch.stack([model(row).logits[0, -1].double().softmax(-1) for model in models])
        mean = probs.mean(0)
        tokens.append(int(mean.argmax()))
        unsure.append([float(mean.max().log()), entropy(mean), sum(map(entropy, probs)) / len(models)])
    return tokens, torch.tensor(unsure)


def entropy(p):
    return float(-(p * p.clamp(min=1e-300).log()).sum())
