"""Generating with S posterior samples relative to plain batched PEFT LoRA, and to the published way of doing it.

    python benchmarks/generation.py --samples 32
    python benchmarks/generation.py --model llama-1b --device cuda --dtype bfloat16

An untrained model (by default a BART with d_model 256, 4+4 layers, BART's vocabulary) writes exactly 64 tokens from
256: the work does not depend on the weights. The published way is a loop that decodes one sample at a time, greedily,
without a KV cache. Rounds alternate; the ratios are those of the medians.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from peft import LoraConfig
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from blob_hf import BlobConfig, Sampling, generate_predictive, get_blob_model, get_lora_model
from blob_hf.experiments.scores import rouge_of_pairs

TARGETS = {"SEQ_2_SEQ_LM": ["q_proj", "k_proj", "v_proj", "lm_head"], "CAUSAL_LM": ["q_proj", "v_proj"]}


def bart(width: int, layers: int, heads: int, vocab_size: int = 50265) -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=vocab_size, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, max_position_embeddings=1024,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {
    "bart": partial(bart, 256, 4, 4),
    "bart-base": partial(bart, 768, 6, 12),
    "llama-1b": partial(llama, 2048, 8192, 16, 32, 8, 128256),  # in the shape of Llama-3.2-1B
    "smollm-135m": partial(llama, 576, 1536, 30, 9, 3, 49152),  # of SmolLM2-135M
    "tiny": partial(bart, 16, 1, 2, vocab_size=8000),  # not worth measuring: to see that this runs
}


@torch.no_grad()
def published_loop(model, ids, num_samples: int, new_tokens: int) -> None:
    """One network at a time, and for each token the whole decoder again; the encoder once per text."""
    base = model.get_base_model()
    for s in range(num_samples):
        with model.posterior_samples(Sampling(1, first=s)):
            encoded = base.get_encoder()(input_ids=ids)
            tokens = torch.full((len(ids), 1), base.config.decoder_start_token_id, device=ids.device)
            for _ in range(new_tokens):
                logits = base(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=False).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)


def rouge_seconds(count: int) -> dict[str, float]:
    """ROUGE-1/2/L of `count` texts of 25 words against 3 references of each hundred."""
    generator = torch.Generator().manual_seed(0)
    words = [f"word{i}s" for i in range(3000)]

    def text() -> str:
        return " ".join(words[i] for i in torch.randint(3000, (25,), generator=generator))

    references = [[text() for _ in range(3)] for _ in range(count // 100)]
    texts = [text() for _ in range(count)]
    candidates = [candidate for candidate in texts for _ in range(3)]
    targets = [references[i // 100][r] for i in range(count) for r in range(3)]
    found = {}
    for workers in (1, 2):
        start = time.perf_counter()
        rouge_of_pairs(candidates, targets, workers)
        found[f"{workers} processes"] = time.perf_counter() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop_samples", type=int, default=2, help="samples of the published loop that are timed")
    parser.add_argument("--summaries", type=int, default=10_000, help="texts whose ROUGE is timed, in hundreds")
    parser.add_argument("--model", choices=list(MODELS), default="bart")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    def base() -> BartForConditionalGeneration | LlamaForCausalLM:
        torch.manual_seed(0)
        with device:
            return MODELS[args.model]().to(getattr(torch, args.dtype))

    task = "SEQ_2_SEQ_LM" if base().config.is_encoder_decoder else "CAUSAL_LM"
    lora = {"target_modules": TARGETS[task], "task_type": task, "r": 8}
    plain = get_lora_model(base(), LoraConfig(**lora)).eval()
    blob = get_blob_model(base(), BlobConfig(**lora)).eval()
    ids = torch.randint(4, 8000, (1, args.source), device=device)
    many = ids.repeat(args.samples, 1)
    fixed = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    share = args.samples / args.loop_samples
    runs = {}
    for beams in (1, 4):
        options = {**fixed, "num_beams": beams}
        runs[f"plain LoRA, {args.samples} rows, beams {beams}"] = lambda o=options: plain.generate(input_ids=many, **o)
        runs[f"{args.samples} posterior samples, beams {beams}"] = lambda o=options: blob.generate(
            input_ids=ids, sampling=args.samples, **o
        )
        runs[f"predictive of {args.samples} samples, beams {beams}"] = lambda o=options: generate_predictive(
            blob, {"input_ids": ids}, args.samples, **o
        )
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(args.rounds + 1)][1:]
    medians = {name: statistics.median(one[name] for one in times) for name in runs}
    has_loop = task == "SEQ_2_SEQ_LM"  # it was published for a summarizer
    if has_loop:
        loop = share * seconds(lambda: published_loop(blob, ids, args.loop_samples, args.new_tokens))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} thread(s)"
    print(f"\n{args.model}, {args.source} source and {args.new_tokens} new tokens, {args.dtype}, {where}")
    print(
        "| generation | seconds | ratio to plain LoRA | the published loop is slower by |\n| --- | ---: | ---: | ---: |"
    )
    for name, median in medians.items():
        reference = medians[f"plain LoRA, {args.samples} rows, beams {name[-1]}"]
        speedup = f"{loop / median:.1f}x" if has_loop and name.endswith("beams 1") else ""
        print(f"| {name} | {median:.2f} | {median / reference:.3f} | {speedup} |")
    if has_loop:
        print(f"| published loop ({args.loop_samples} of {args.samples} timed) | {loop:.2f} | | |")
    for name, value in rouge_seconds(args.summaries).items():
        print(f"ROUGE-1/2/L of {args.summaries:,} summaries x 3 references, {name}: {value:.1f} s")


if __name__ == "__main__":
    main()
