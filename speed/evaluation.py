"""All settings of XQuAD-R, with every measure and per-query values, from embeddings: beside ir_measures (pytrec_eval) and beside the bare matrix product.

Eleven corpora searched from eleven languages (11 within a language, 110 across), and the pool from eleven: 132 settings. ir_measures is given the same scores
for a sample of queries of each kind, and its time is scaled to all of them: with all scores as Python objects the whole would not fit into memory. All in one
process, alternating, so that a busy machine is busy for everyone. Needs the data folder (HYBRID_IR_DATA). Writes speed/results/evaluation.json.

    python speed/evaluation.py [--queries 20] [--rounds 2]
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import ir_measures
import numpy as np
import torch
from ir_measures import AP, RR, R, nDCG

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.evaluation import score_embeddings
from hybrid_ir.experiment import processor_name

PEER_MEASURES = [AP, RR @ 10, nDCG @ 10, R @ 1, R @ 10, R @ 100]


def unit_vectors(n: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    "float32 [n, dim] of length 1."
    vectors = rng.standard_normal((n, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bare_product(queries: np.ndarray, passages: np.ndarray, block: int = 1024) -> float:
    "Seconds of nothing but the product of all queries with all passages, in blocks."
    queries, passages, started = torch.from_numpy(queries), torch.from_numpy(passages), time.perf_counter()
    for start in range(0, len(queries), block):
        queries[start : start + block] @ passages.T
    return time.perf_counter() - started


def peer_seconds(benchmark, scores: np.ndarray, rows: np.ndarray, corpus: slice) -> tuple[float, dict]:
    "Seconds that ir_measures needs for some queries on one corpus, from their scores to per-query values, and its mean values."
    judged = {int(row): benchmark.judgement_passages[benchmark.judgement_queries == row] for row in rows}
    qrels = {str(row): {str(passage): 1 for passage in found if corpus.start <= passage < corpus.stop} for row, found in judged.items()}
    names, started = [str(passage) for passage in range(corpus.start, corpus.stop)], time.perf_counter()
    run = {str(row): dict(zip(names, line.tolist())) for row, line in zip(rows, scores)}
    values = list(ir_measures.iter_calc(PEER_MEASURES, qrels, run))
    seconds = time.perf_counter() - started
    return seconds, {str(measure): float(np.mean([value.value for value in values if value.measure == measure])) for measure in PEER_MEASURES}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=20, help="queries of each language that ir_measures evaluates")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dim", type=int, default=384)
    arguments = parser.parse_args()
    benchmark, rng = load_benchmark("xquad_r"), np.random.default_rng(0)
    queries, passages = unit_vectors(len(benchmark.queries), arguments.dim, rng), unit_vectors(len(benchmark.passages), arguments.dim, rng)
    np.add.at(queries, benchmark.judgement_queries, passages[benchmark.judgement_passages] * 0.5)  # so that there is something to find
    ours, product, peer, agreement = [], [], [], {}
    languages = benchmark.languages
    for round_number in range(arguments.rounds + 1):  # the first round compiles, and does not count
        started = time.perf_counter()
        scores = score_embeddings(benchmark, queries, passages, k=0)
        ours.append(time.perf_counter() - started)
        product.append(bare_product(queries, passages))
        seconds = 0.0
        for language in languages:
            rows = np.arange(benchmark.query_slices[language].start, benchmark.query_slices[language].stop)[: arguments.queries]
            whole, factor = queries[rows] @ passages.T, len(benchmark.queries) / len(languages) / len(rows)
            for corpus in (*[benchmark.passage_slices[other] for other in languages[:3]], slice(0, len(passages))):
                taken, values = peer_seconds(benchmark, whole[:, corpus], rows, corpus)
                is_pool = corpus == slice(0, len(passages))
                seconds += taken * factor * (1 if is_pool else len(languages) / 3)  # three of eleven corpora stand for all
                if is_pool:
                    found = scores.per_query.query("task == 'multi' and query_language == @language").iloc[: len(rows)]
                    agreement[language] = abs(values["AP"] - found["map"].mean())
        peer.append(seconds)
    best = {name: min(times[1:]) for name, times in (("ours", ours), ("product", product), ("peer", peer))}
    assert max(agreement.values()) < 1e-4, agreement
    settings = len(languages) ** 2 + len(languages)
    result = {
        "what": f"{settings} settings of XQuAD-R, {len(scores.per_query):,} rows of per-query values", "unit": "seconds", "ours": round(best["ours"], 2),
        "ir_measures, scaled from a sample": round(best["peer"], 1), "bare matrix product": round(best["product"], 2),
        "ratios": {"ir_measures to ours": round(best["peer"] / best["ours"], 1), "ours to the bare product": round(best["ours"] / best["product"], 2)},
        "largest difference in mAP": float(f"{max(agreement.values()):.1e}"), "sample": f"{arguments.queries} queries of each language, three corpora and the pool",
        "machine": {"processor": processor_name(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "numba", "ir_measures", "pytrec_eval-terrier", "hybrid_ir")},
        "command": f"python speed/evaluation.py --queries {arguments.queries} --rounds {arguments.rounds}",
    }  # fmt: skip
    target = Path(__file__).parent / "results" / "evaluation.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
