"""A small server's day: threads that answer requests on one model at once, each answer checked against the lone one.

    python benchmarks/server.py --minutes 30

Requests are a mixture of what a server does: classification with samples of the request's own seed, the posterior mean,
raw contexts over repeated batches. The first wrong answer ends the run with code 1.
"""

import argparse
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import BertConfig, BertForSequenceClassification

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model

SIZES = {
    "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip


def build() -> BlobModel:
    """A classifier whose samples differ visibly."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZES, num_labels=4))
    model = get_blob_model(base, BlobConfig(target_modules=["query", "value"], init_eps=0.8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def answer(model: BlobModel, kind: str, seed: int) -> torch.Tensor:
    """What a request of a kind and seed is answered."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 500, (1 + seed % 4, 6 + seed % 5), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind == "predict":
        return torch.from_numpy(model.predict(batch, sampling=Sampling(3, seed=seed)).probabilities)
    if kind == "mean":
        return model(**batch).logits
    with model.posterior_samples(Sampling(4, seed=seed), repeat=True):
        return model(**batch).logits


KINDS = ("predict", "samples", "mean")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build()
    requests = [(kind, seed) for kind in KINDS for seed in range(60)]
    expected = {request: answer(model, *request) for request in requests}
    end, counts, wrong, lock = time.monotonic() + 60 * args.minutes, Counter[str](), [], threading.Lock()

    def serve(worker: int) -> None:
        order = random.Random(worker)
        while time.monotonic() < end and not wrong:
            request = order.choice(requests)
            found = answer(model, *request)
            with lock:
                counts[request[0]] += 1
                if not torch.equal(found, expected[request]):
                    wrong.append((worker, request, (found - expected[request]).abs().max().item()))

    with ThreadPoolExecutor(args.threads) as pool:
        list(pool.map(serve, range(args.threads)))
    print(f"{args.threads} threads, {args.minutes:g} minutes: {dict(counts)}, {len(wrong)} wrong")
    for worker, request, difference in wrong:
        print(f"worker {worker}, {request}: off by {difference:.3g}")
    return 1 if wrong or not counts else 0


if __name__ == "__main__":
    raise SystemExit(main())
