"""Where the time of a training step goes, how much of the machine's matrix products it reaches, and what was tried to make encoding faster.

    python speed/where_time_goes.py [--steps 4] [--texts 25] [--rounds 2]

The encoder is me5-small-q4, the pairs are those of `training_and_encoding.py`. Floating-point operations are counted by PyTorch; the peak is what one large
product of matrices reaches in the same run. Every variant encodes the same texts, one after the other in each round, and the fastest round of each counts, the first one
left out. All on one thread and in seconds of the processor, so that other work on the machine counts little. What to expect of a variant is computed before it runs: from the padding that it saves, or from the share of the time that it can change. torch.compile needs a C++ compiler.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/where_time_goes.json.
"""

import argparse
import os
import time
from itertools import groupby

import numpy as np
import torch
from _entries import entries, write_result
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_and_encoding import BATCH, LENGTH, complete_pairs, sample_texts
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid_ir import training
from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import has_fast_bf16, length_chunks, load_encoder


def matrix_peak(rounds: int, size: int = 2048) -> float:
    "Operations a second of a product of two square matrices in fp32."
    first, second = torch.rand(2, size, size)
    times = []
    for _ in range(rounds + 1):
        started = time.process_time()
        first @ second
        times.append(time.process_time() - started)
    return 2 * size**3 / min(times)


class Clock:
    "Adds up the seconds of some functions."

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def watch(self, owner, name: str, part: str):
        "Replace a function or method by one whose calls count as this part."
        inner = getattr(owner, name)

        def timed(*arguments, **options):
            started = time.process_time()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - started

        setattr(owner, name, timed)


def training_parts(pairs, steps: int) -> tuple[dict, float]:
    "Milliseconds of a step by part, and the operations of a step."
    encoder = load_encoder("me5-small-q4", device="cpu", precision="auto", query_length=LENGTH, passage_length=LENGTH)
    options = training.training_options(sampler="hybrid", batch_size=BATCH, steps=2 * steps + 2, heldout=0)
    started = time.process_time()
    trainer = training.Trainer(encoder, pairs, options, None, False)
    tokenising = (time.process_time() - started) / len(pairs) * BATCH  # if every pair is used once
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    clock = Clock()
    clock.watch(training, "batch_loss", "forward")
    clock.watch(trainer.accelerator, "backward", "backward")
    clock.watch(trainer.optimizer, "step", "optimiser")
    clock.watch(trainer.feed, "next", "waiting for tokens")
    started = time.process_time()
    for _ in range(steps):
        trainer.step()
    whole, seconds = time.process_time() - started, dict(clock.seconds)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trainer.step()
    embedding = sum(event.cpu_time_total for event in profiler.key_averages() if event.key == "aten::embedding_dense_backward") / 1e6
    trainer.feed.close()
    parts = {
        "forward": seconds["forward"], "backward, without word embeddings": seconds["backward"] - embedding, "gradient of word embeddings": embedding,
        "optimiser": seconds["optimiser"], "waiting for tokens": seconds["waiting for tokens"], "the rest": whole - sum(seconds.values()),
    }  # fmt: skip
    milliseconds = {name: round(1000 * part / steps, 1) for name, part in parts.items()} | {"tokenising, once for all passes": round(1000 * tokenising, 1)}
    return milliseconds, counter.get_total_flops() / (whole / steps)


def chunks_in_order(tokens: list[np.ndarray], size: int = 32) -> list[np.ndarray]:
    "Texts in the order in which they come, 32 at a time."
    return [np.arange(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]


def padded_tokens(tokens: list[np.ndarray], chunks: list[np.ndarray]) -> int:
    "Tokens that are computed, padding included."
    return sum(len(chunk) * max(len(tokens[row]) for row in chunk) for chunk in chunks)


def padding_of_a_collection() -> dict:
    "What padding is left when all passages of XQuAD-R are encoded in one call, with the usual lengths."
    encoder, passages = load_encoder("me5-small-q4", device="cpu"), load_benchmark("xquad_r").passages["text"]
    tokens = encoder.tokenize(passages, "passage")
    lengths = np.array([len(text) for text in tokens])
    return {"passages": len(passages), "share": round(float(1 - lengths.sum() / padded_tokens(tokens, length_chunks(lengths, encoder.token_budget))), 4)}


def encode_packed(encoder, tokens: list[np.ndarray]):
    "No padding at all: the texts of a portion in one row, and attention within each text, texts of one length together."
    runs, vectors = [], np.empty((len(tokens), encoder.dim), dtype=np.float32)

    def attention(module, query, key, value, mask, scaling=None, **options):  # query, key, value: [1, heads, tokens, width]
        parts, start = [], 0
        for count, length in runs:
            block = [part[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value)]
            parts.append(torch.nn.functional.scaled_dot_product_attention(*block, scale=scaling).transpose(1, 2).flatten(0, 1))
            start += count * length
        return torch.cat(parts)[None], None

    ALL_ATTENTION_FUNCTIONS.register("packed", attention)
    encoder.backbone.config._attn_implementation = "packed"
    for chunk in length_chunks(np.array([len(text) for text in tokens]), encoder.token_budget):
        texts = [tokens[row] for row in chunk]
        runs[:] = [(len(list(group)), length) for length, group in groupby(map(len, texts))]
        row = torch.from_numpy(np.concatenate(texts)).long()[None]
        places = torch.from_numpy(np.concatenate([np.arange(len(text)) for text in texts]))[None]
        hidden = encoder.backbone(input_ids=row, position_ids=places).last_hidden_state[0]
        means = torch.stack([part.mean(0) for part in hidden.split([len(text) for text in texts])])
        vectors[chunk] = torch.nn.functional.normalize(means, dim=-1).numpy()
    encoder.backbone.config._attn_implementation = "sdpa"
    return vectors


def product_shares(encoder, tokens: list[np.ndarray]) -> tuple[float, float]:
    "Shares of the time of encoding: products with weights, and all products of matrices, attention included."
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        encoder.embed_tokens(tokens)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    weights = sum(time for key, time in times.items() if key in ("aten::addmm", "aten::mm"))
    attention = sum(time for key, time in times.items() if "attention" in key or key == "aten::bmm")
    return weights / sum(times.values()), (weights + attention) / sum(times.values())


def int8_gain(rounds: int) -> float:
    "How many times as fast one layer of weights is in int8."
    layer, vectors, seconds = torch.nn.Sequential(torch.nn.Linear(384, 1536)), torch.rand(2048, 384), []
    for module in (layer, torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)):
        times = []
        for _ in range(5 * rounds):
            started = time.process_time()
            module(vectors)
            times.append(time.process_time() - started)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def variants(texts: list[str], rounds: int) -> list[dict]:
    "What was tried for encoding: its name, what to expect of it and from what, how to run it, and what became of it."
    encoder, quantised, compiled = (load_encoder("me5-small-q4", device="cpu", precision="fp32", passage_length=LENGTH) for _ in range(3))
    quantised.backbone = torch.ao.quantization.quantize_dynamic(quantised.backbone, {torch.nn.Linear}, dtype=torch.qint8)
    compiled.backbone.compile(dynamic=True)
    tokens = encoder.tokenize(texts, "passage", LENGTH)
    lengths, (weights, products), gain = np.array([len(text) for text in tokens]), product_shares(encoder, tokens), int8_gain(rounds)
    computed = {budget: padded_tokens(tokens, length_chunks(lengths, budget)) for budget in (encoder.token_budget, 16_384, 256)}
    usual, unsorted = computed[encoder.token_budget], chunks_in_order(tokens)
    found = [
        ("as it is: sorted by length, 2,048 tokens at a time", 1.0, "", lambda: encoder.embed_tokens(tokens), "yes"),
        ("in the order of the texts, 32 at a time", usual / padded_tokens(tokens, unsorted), "padding", lambda: torch.cat([encoder(*encoder.pad([tokens[row] for row in chunk])) for chunk in unsorted]), "no"),
        ("16,384 tokens at a time", usual / computed[16_384], "padding", lambda: encoder.embed_tokens(tokens, 16_384), "no"),
        ("256 tokens at a time", usual / computed[256], "padding", lambda: encoder.embed_tokens(tokens, 256), "no"),
        ("packed: no padding, attention within each text", usual / lengths.sum(), f"padding: {1 - lengths.sum() / usual:.1%} of the tokens", lambda: torch.from_numpy(encode_packed(encoder, tokens)), "no: see below"),
        ("torch.compile, shapes free", 1 / products, f"at most: {products:.0%} of the time are products", lambda: compiled.embed_tokens(tokens), "no: see below"),
        ("int8 weights, quantised as they run", 1 / (1 - weights + weights / gain), f"one layer {gain:.1f} times as fast, {weights:.0%} of the time", lambda: quantised.embed_tokens(tokens), "no: other vectors"),
    ]  # fmt: skip
    if has_fast_bf16(torch.device("cpu")):
        half = load_encoder("me5-small-q4", device="cpu", precision="bf16", passage_length=LENGTH)
        found.append(("bf16", 2.0, "twice the operations", lambda: half.embed_tokens(tokens), "yes, where the hardware has it"))
    return [dict(zip(("variant", "predicted", "from", "run", "kept"), row)) for row in found]


def tried(texts: list[str], rounds: int) -> list[dict]:
    "Texts per second of each variant beside the first, predicted and measured, how long its first round took, and how near its vectors are to those of the first."
    found = variants(texts, rounds)
    times, vectors = [[] for _ in found], [None] * len(found)
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first round compiles, and does not count
            for number, variant in enumerate(found):
                started = time.process_time()
                vectors[number] = variant["run"]().float().numpy()
                times[number].append(time.process_time() - started)
    best = [min(seconds[1:]) for seconds in times]
    return [
        {"variant": variant["variant"], "predicted": round(float(variant["predicted"]), 2), "measured": round(best[0] / best[number], 2), "kept": variant["kept"], "predicted from": variant["from"],
         "texts per second": round(len(texts) / best[number], 1), "smallest cosine": round(float((vectors[0] * vectors[number]).sum(1).min()), 4), "first round, s": round(times[number][0], 1)}
        for number, variant in enumerate(found)
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--texts", type=int, default=25, help="passages of each language")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs, texts = complete_pairs(), sample_texts(options.texts)[0]
    parts, rate = training_parts(pairs, options.steps)
    peak = matrix_peak(options.rounds)
    results = {
        "milliseconds of a step": parts, "batch": BATCH, "operations a second": {"training": round(rate / 1e9, 1), "one large product": round(peak / 1e9, 1)},
        "share of the peak": round(rate / peak, 2), "encoding": tried(texts, options.rounds), "texts": len(texts), "padding of a collection": padding_of_a_collection(),
    }  # fmt: skip
    write_result(__file__, results | entries(__file__, ["torch", "transformers"], options))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
