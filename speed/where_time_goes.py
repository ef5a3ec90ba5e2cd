"""Where the time of a training step goes, how much of the machine's matrix products it reaches, and what was tried to make encoding faster.

    python speed/where_time_goes.py [--steps 4] [--texts 25] [--rounds 2]

The encoder is me5-small-q4, the pairs are those of `training_and_encoding.py`. Floating-point operations are counted by PyTorch; the peak is what one large
product of matrices reaches in the same run. Every variant encodes the same texts, one after the other in each round, and the fastest round of each counts.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/where_time_goes.json.
"""

import argparse
import os
import time

import numpy as np
import torch
from _entries import entries, write_result
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_and_encoding import BATCH, LENGTH, complete_pairs, sample_texts

from hybrid_ir import training
from hybrid_ir.encoders import has_fast_bf16, load_encoder


def matrix_peak(rounds: int, size: int = 2048) -> float:
    "Operations a second of a product of two square matrices in fp32."
    first, second = torch.rand(2, size, size)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        first @ second
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


class Clock:
    "Adds up the seconds of some functions."

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def watch(self, owner, name: str, part: str):
        "Replace a function or method by one whose calls count as this part."
        inner = getattr(owner, name)

        def timed(*arguments, **options):
            started = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)


def training_parts(pairs, steps: int) -> tuple[dict, float]:
    "Milliseconds of a step by part, and the operations of a step."
    encoder = load_encoder("me5-small-q4", device="cpu", precision="auto", query_length=LENGTH, passage_length=LENGTH)
    options = training.training_options(sampler="hybrid", batch_size=BATCH, steps=2 * steps + 2, heldout=0)
    started = time.perf_counter()
    trainer = training.Trainer(encoder, pairs, options, None, False)
    tokenising = (time.perf_counter() - started) / len(pairs) * BATCH  # if every pair is used once
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    clock = Clock()
    clock.watch(training, "batch_loss", "forward")
    clock.watch(trainer.accelerator, "backward", "backward")
    clock.watch(trainer.optimizer, "step", "optimiser")
    clock.watch(trainer.feed, "next", "waiting for tokens")
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    whole, seconds = time.perf_counter() - started, dict(clock.seconds)
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


def in_order(encoder, tokens: list[np.ndarray], size: int = 32):
    "Texts in the order in which they come, 32 at a time."
    return np.concatenate([encoder(*encoder.pad(tokens[start : start + size])).float().numpy() for start in range(0, len(tokens), size)])


def variants(texts: list[str]) -> dict:
    "What was tried for encoding: {name: function of nothing}."
    encoder = load_encoder("me5-small-q4", device="cpu", precision="fp32", passage_length=LENGTH)
    quantised = load_encoder("me5-small-q4", device="cpu", precision="fp32", passage_length=LENGTH)
    quantised.backbone = torch.ao.quantization.quantize_dynamic(quantised.backbone, {torch.nn.Linear}, dtype=torch.qint8)
    tokens = encoder.tokenize(texts, "passage", LENGTH)
    found = {
        "as it is: sorted by length, 2,048 tokens at a time": lambda: encoder.embed_tokens(tokens).float().numpy(),
        "in the order of the texts, 32 at a time": lambda: in_order(encoder, tokens),
        "16,384 tokens at a time": lambda: encoder.embed_tokens(tokens, 16_384).float().numpy(),
        "256 tokens at a time": lambda: encoder.embed_tokens(tokens, 256).float().numpy(),
        "int8 weights, quantised as they run": lambda: quantised.embed_tokens(tokens).float().numpy(),
    }
    if has_fast_bf16(torch.device("cpu")):
        half = load_encoder("me5-small-q4", device="cpu", precision="bf16", passage_length=LENGTH)
        found["bf16"] = lambda: half.embed_tokens(tokens).float().numpy()
    return found


def tried(texts: list[str], rounds: int) -> list[dict]:
    "Texts per second of each variant beside the first, and how near its vectors are to those of the first."
    found = variants(texts)
    times, vectors = {name: [] for name in found}, {}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in found.items():
                started = time.perf_counter()
                vectors[name] = run()
                times[name].append(time.perf_counter() - started)
    first = next(iter(found))
    return [
        {"variant": name, "texts per second": round(len(texts) / min(times[name]), 1), "times as fast": round(min(times[first]) / min(times[name]), 2),
         "smallest cosine": round(float((vectors[first] * vectors[name]).sum(1).min()), 4)}
        for name in found
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--texts", type=int, default=25, help="passages of each language")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    pairs, texts = complete_pairs(), sample_texts(options.texts)[0]
    parts, rate = training_parts(pairs, options.steps)
    peak = matrix_peak(options.rounds)
    results = {
        "milliseconds of a step": parts, "batch": BATCH, "operations a second": {"training": round(rate / 1e9, 1), "one large product": round(peak / 1e9, 1)},
        "share of the peak": round(rate / peak, 2), "encoding": tried(texts, options.rounds), "texts": len(texts),
    }  # fmt: skip
    write_result(__file__, results | entries(__file__, ["torch", "transformers"], options))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
