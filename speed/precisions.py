"""What a lower precision of encoding gives and what it takes: questions and passages of XQuAD-R in each precision, and what is then found.

The same weights and texts in one run, on one thread; time is that of the processor, for encoding alone. Differences of mAP from fp32 have paired bootstrap intervals over the ids of the questions.
Precisions that the hardware lacks are left out unless they are named. Needs the data folder (HYBRID_IR_DATA). Writes speed/results/precisions.json, or, on a processor with AMX or without bf16, a file with that in its name, and prints it.

    python speed/precisions.py [--languages ar de en] [--precisions fp32 bf16 int8]
"""

import argparse
import os
import time

import numpy as np
import torch
from _entries import compared, entries, fast_precisions, write_result

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import ENCODING_PRECISIONS, load_encoder
from hybrid_ir.evaluation import compare, score_embeddings


def encoded(precision: str, benchmark) -> tuple[float, np.ndarray, np.ndarray]:
    "Processor seconds, and the vectors of questions and passages."
    encoder = load_encoder("me5-small-q4", device="cpu", precision=precision)
    encoder.encode(list(benchmark.queries["text"][:50]))  # loads, compiles
    started = time.process_time()
    vectors = [encoder.encode(list(table["text"]), kind) for table, kind in ((benchmark.queries, "query"), (benchmark.passages, "passage"))]
    return time.process_time() - started, *vectors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--languages", nargs="+", help="default: all of XQuAD-R")
    parser.add_argument("--precisions", nargs="+", choices=ENCODING_PRECISIONS[1:], help="default: fp32, and the others where the hardware has them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark("xquad_r", options.languages)
    texts, truth, rows = len(benchmark.queries) + len(benchmark.passages), None, []
    for precision in dict.fromkeys(["fp32", *(options.precisions or fast_precisions())]):
        seconds, queries, passages = encoded(precision, benchmark)
        scores, vectors = score_embeddings(benchmark, queries, passages, measures=["map"], k=0, progress=False), np.concatenate([queries, passages])
        truth = truth or (scores, vectors)
        cosines = (vectors * truth[1]).sum(1)
        found = {task: compare(scores, truth[0], "map", task).loc["macro", ["first", "difference", "low", "high"]].rename({"first": "value"}).astype(float).round(5).to_dict() for task in scores.info["tasks"]}
        rows.append({"precision": precision, "texts per second": round(texts / seconds, 2), "smallest cosine": round(float(cosines.min()), 5), "median cosine": round(float(np.median(cosines)), 5), "map": found})
        print(rows[-1], flush=True)
    comparisons = [compared(f"encoding in {row['precision']}", "texts per second", row["texts per second"], "fp32", rows[0]["texts per second"]) for row in rows[1:]]
    what = {"rows": rows, "languages": len(benchmark.languages), "queries": len(benchmark.queries), "passages": len(benchmark.passages)}
    write_result(__file__, {"comparisons": comparisons} | what | entries(__file__, ["torch", "transformers"], options), by_precision=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
