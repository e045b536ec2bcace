"""Time to draw posterior samples of adapters of 1B and 7B shape, against the forward of the batch that they serve.

    python benchmarks/posterior_samples.py --threads 2

The base weights are on torch's meta device: there is an adapter alone, drawn by `model.posterior_samples`. The forward
is that of S samples over one prompt: one decoder layer of the same shape is run with as many tokens and multiplied by
the number of layers, so head and embeddings come for free. A decoding step is the same with one token for each sample,
without a cache of earlier ones. The target is a drawing under 5 % of one forward. On one CPU thread the process's own
seconds are taken, so that a machine that is busy with others does not count.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from blob_hf import BlobConfig, BlobModel, Sampling, get_blob_model
from blob_hf.tuner.posterior import gaussian_layers

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 128},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008},
}  # fmt: skip
TARGETS = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}


def adapter(shape: str, rank: int, targets: str, device: str) -> BlobModel:
    """An adapter whose base weights do not exist."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], vocab_size=100))
    model = get_blob_model(base, BlobConfig(r=rank, target_modules=TARGETS[targets], task_type="CAUSAL_LM"))
    for layer in gaussian_layers(model).values():  # B is never drawn
        layer.to_empty(device=device)
        layer.weight.data.normal_(), layer.rho.data.fill_(0.05)
    return model.eval()


def seconds(run, rounds: int, device: str) -> float:
    """Median of some rounds, after one to warm up."""
    times = []
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(rounds + 1):
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def forward_seconds(shape: str, rows: int, length: int, rounds: int, device: str, dtype: torch.dtype) -> float:
    """Of all layers, over rows of so many tokens."""
    config = LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": 1}, vocab_size=100)
    with torch.device(device):
        model = LlamaModel(config).to(dtype).eval()
    ids = torch.randint(0, 100, (rows, length), device=device)
    return SHAPES[shape]["num_hidden_layers"] * seconds(lambda: model(ids, use_cache=False), rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the forward")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["1B", "7B"])
    parser.add_argument("--tiny", action="store_true", help="a model not worth measuring: to see that this runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = (args.rounds, args.device, getattr(torch, args.dtype))
    print(f"{args.samples} samples, a prompt of {args.length} tokens, {args.device}, {args.threads} threads")
    columns = ["adapter", "million numbers", "drawing (ms)", "one forward (ms)", "share (%)", "in decoding steps"]
    print(f"| {' | '.join(columns)} |\n| --- {'| ---: ' * (len(columns) - 1)}|")
    for shape in ["tiny"] if args.tiny else args.shapes:
        forward = forward_seconds(shape, args.samples, args.length, *where)
        step = forward_seconds(shape, args.samples, 1, *where)
        for targets in TARGETS:
            for rank in (8, 16):
                model = adapter(shape, rank, targets, args.device)
                sampling = Sampling(args.samples)

                def draw(model=model, sampling=sampling) -> None:
                    with model.posterior_samples(sampling):
                        pass

                drawing = seconds(draw, args.rounds, args.device)
                count = args.samples * sum(p.numel() for name, p in model.named_parameters() if ".rho" in name) / 1e6
                print(
                    f"| {shape}, {targets}, r = {rank} | {count:.2f} | {1e3 * drawing:.1f} | {1e3 * forward:.0f} "
                    f"| {100 * drawing / forward:.2f} | {drawing / step:.2f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
