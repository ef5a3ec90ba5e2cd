"""How time and memory grow: evaluation with the languages, ranking with the pool, a training step with the batch.

    python speed/growth.py [--languages 2 4 8 11] [--pools 1000 10000 100000] [--batches 8 32 128] [--portion 8]

Every point is measured in a process of its own, a copy of one that has loaded the encoder, on one thread: seconds of the processor, so that other work on the machine counts little, and resident memory beyond what was loaded before.
The slope is that of a straight line through logarithms: 1 is in proportion, 2 is with the square. Memory has a part that is always there; `fixed` and `each` are those of a straight line without logarithms:
MiB that do not depend on the size, and MiB for each one more. The encoder computes in fp32, so that figures of other machines can stand beside these. Needs the data folder (HYBRID_IR_DATA). Writes speed/results/growth.json.
"""

import argparse
import os
import time

import numpy as np
import torch
from _entries import compared, entries, forget_peak, measure, memory, unit_vectors, write_result
from training_and_encoding import complete_pairs

from hybrid_ir.benchmarks import BENCHMARKS, load_benchmark
from hybrid_ir.encoders import load_encoder
from hybrid_ir.evaluation import score_embeddings
from hybrid_ir.retrieval import rank_judgements
from hybrid_ir.training import Trainer, training_options

DIM, QUERIES, LENGTH = 384, 2000, 16
ENCODER = load_encoder("me5-small-q4", device="cpu", precision="fp32", query_length=LENGTH, passage_length=LENGTH)


def vectors_of(rows) -> np.ndarray:
    "A random vector for each row."
    return unit_vectors(len(rows), DIM, np.random.default_rng(0))


def cost(function) -> dict:
    "Processor seconds and additional memory at its highest, in MiB."
    forget_peak()
    before, started = memory("VmRSS"), time.process_time()
    function()
    return {"cpu seconds": round(time.process_time() - started, 3), "mib": max(0.1, round((memory() - before) * 1024, 1))}


def evaluation(languages: int) -> dict:
    "All settings of so many languages of XQuAD-R, every measure of every query."
    small = load_benchmark("sample", ["de", "en"])
    score_embeddings(small, vectors_of(small.queries), vectors_of(small.passages), k=0)  # compiles
    benchmark = load_benchmark("xquad_r", list(BENCHMARKS["xquad_r"].languages)[:languages])
    queries, passages = vectors_of(benchmark.queries), vectors_of(benchmark.passages)
    return cost(lambda: score_embeddings(benchmark, queries, passages, k=0))


def ranking(pool: int) -> dict:
    "The ranks of one passage for each of some queries, in a pool of one language."
    queries, passages, rows = vectors_of(range(QUERIES)), vectors_of(range(pool)), np.arange(QUERIES)
    rank_judgements(queries[:16], passages[:16], {"en": slice(0, 16)}, rows[:16], rows[:16])  # compiles
    return cost(lambda: rank_judgements(queries, passages, {"en": slice(0, pool)}, rows, rows % pool))


def step(batch_size: int, portion: int | None) -> dict:
    "A training step of me5-small-q4; `portion`: pairs whose activations are in memory at once."
    trainer = Trainer(ENCODER, complete_pairs(160), training_options(sampler="hybrid", batch_size=batch_size, mini_batch_size=portion, steps=1, heldout=0), None, False)
    return cost(trainer.step)


def slope(points: list[dict], what: str) -> float:
    "Of the straight line through the logarithms."
    return round(float(np.polyfit(np.log([point["size"] for point in points]), np.log([point[what] for point in points]), 1)[0]), 2)


def line(points: list[dict]) -> dict:
    "MiB that are always needed, and MiB for each one more: the straight line with the least squares, of which neither is below 0."
    sizes, mib = (np.array([point[name] for point in points], dtype=float) for name in ("size", "mib"))
    each, fixed = np.polyfit(sizes, mib, 1)
    if fixed < 0:
        each, fixed = sizes @ mib / (sizes @ sizes), 0.0
    return {"fixed": round(float(fixed), 1), "each": float(f"{each:.3g}")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--languages", type=int, nargs="+", default=[2, 4, 8, 11])
    parser.add_argument("--pools", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--portion", type=int, default=8, help="pairs at a time with cached gradients")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plans = {
        ("evaluation", "languages"): [(evaluation, size) for size in options.languages], ("ranking", "passages in the pool"): [(ranking, size) for size in options.pools],
        ("training step, plain", "pairs in the batch"): [(step, size, None) for size in options.batches],
        ("training step, cached", "pairs in the batch"): [(step, size, options.portion) for size in options.batches],
    }  # fmt: skip
    curves = []
    for (what, against), calls in plans.items():
        points = [{"size": call[1]} | measure(*call, start="fork") for call in calls]
        curves.append({"what": what, "against": against, "slope of time": slope(points, "cpu seconds"), "slope of memory": slope(points, "mib"), "line of memory": line(points), "points": points})
    plain, cached = (curve["points"][-1] for curve in curves[2:])
    comparisons = [compared(f"memory of a training step of {plain['size']} pairs, cached", "MiB", cached["mib"], "plain", plain["mib"])]
    write_result(__file__, {"comparisons": comparisons, "queries of the ranking": QUERIES, "curves": curves} | entries(__file__, ["torch", "transformers", "numba"], options))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
