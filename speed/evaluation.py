"""All settings of XQuAD-R, with every measure and per-query values, from embeddings: beside ir_measures (pytrec_eval), ranx and the bare matrix product.

Eleven corpora searched from eleven languages (11 within a language, 110 across), and the pool from eleven: 132 settings. The peers are given the same scores
for a sample of queries of each kind, and their time is scaled to all of them: with all scores as Python objects the whole would not fit into memory. All in one
process, alternating, on one thread, and in seconds of the processor, so that other work on the machine counts little. Memory is measured in a process of its own: what comes
on top of texts and embeddings, beside the largest block of scores. Needs the data folder (HYBRID_IR_DATA) and ranx (`pip install ranx`). Writes speed/results/evaluation.json.

    python speed/evaluation.py [--queries 20] [--rounds 2]
    python speed/evaluation.py --xm3600     the 33 x 33 settings of XM3600 and its pool, once, without the peers: speed/results/evaluation_xm3600.json
"""

import argparse
import time

import ir_measures
import numba
import numpy as np
import ranx
import torch
from _entries import compared, entries, forget_peak, measure, memory, unit_vectors, write_result
from ir_measures import AP, RR, R, nDCG

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.evaluation import score_embeddings
from hybrid_ir.retrieval import queries_per_block

MEASURES = {"map": AP, "mrr@10": RR @ 10, "ndcg@10": nDCG @ 10, "recall@1": R @ 1, "recall@10": R @ 10, "recall@100": R @ 100}  # ranx has our names


def bare_product(queries: np.ndarray, passages: np.ndarray, block: int = 1024) -> float:
    "Seconds of nothing but the product of all queries with all passages, in blocks."
    queries, passages, started = torch.from_numpy(queries), torch.from_numpy(passages), time.process_time()
    for start in range(0, len(queries), block):
        queries[start : start + block] @ passages.T
    return time.process_time() - started


def with_ir_measures(qrels: dict, run: dict) -> dict:
    "{measure: values of the queries, in their order} by ir_measures, which calls pytrec_eval."
    found = {(str(value.measure), value.query_id): value.value for value in ir_measures.iter_calc(list(MEASURES.values()), qrels, run)}
    return {name: np.array([found[str(measure), query] for query in run]) for name, measure in MEASURES.items()}


def with_ranx(qrels: dict, run: dict) -> dict:
    "The same by ranx."
    found = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(MEASURES), return_mean=False)
    places = np.argsort(np.argsort(list(run)))  # ranx sorts the queries by name
    return {name: found[name][places] for name in MEASURES}


PEERS = {"ir_measures": with_ir_measures, "ranx": with_ranx}


def peer_work(benchmark, scores: np.ndarray, rows: np.ndarray, corpus: slice) -> tuple[dict, dict]:
    "For some queries on one corpus, from their scores to per-query values: the seconds of each peer, and {peer: {measure: values}}."
    judged = {int(row): benchmark.judgement_passages[benchmark.judgement_queries == row] for row in rows}
    qrels = {str(row): {str(passage): 1 for passage in found if corpus.start <= passage < corpus.stop} for row, found in judged.items()}
    names, started = [str(passage) for passage in range(corpus.start, corpus.stop)], time.process_time()
    run = {str(row): dict(zip(names, line.tolist())) for row, line in zip(rows, scores)}
    both, seconds, values = time.process_time() - started, {}, {}
    for name, evaluate in PEERS.items():
        started = time.process_time()
        values[name] = evaluate(qrels, run)
        seconds[name] = both + time.process_time() - started
    return seconds, values


def problem(name: str, dim: int):
    "A benchmark, and random vectors for its queries and passages."
    benchmark, rng = load_benchmark(name), np.random.default_rng(0)
    queries, passages = unit_vectors(len(benchmark.queries), dim, rng), unit_vectors(len(benchmark.passages), dim, rng)
    for start in range(0, len(benchmark.judgement_queries), 100_000):  # so that there is something to find
        part = slice(start, start + 100_000)
        np.add.at(queries, benchmark.judgement_queries[part], passages[benchmark.judgement_passages[part]] * 0.5)
    return benchmark, queries, passages


def settings_of(benchmark, scores) -> str:
    "How much was computed."
    return f"{len(scores.cells)} settings of {benchmark.name}: {len(benchmark.queries):,} queries, {len(benchmark.passages):,} passages, {len(scores.per_query):,} rows of per-query values"


def one_scoring(name: str, dim: int) -> dict:
    "Processor seconds and memory of all tasks with every measure. `peak_mib`: at the highest, on top of texts and embeddings; `table_mib`: of it, the table that stays."
    torch.set_num_threads(1)
    score_embeddings(*problem("sample", 8), k=0)  # compiles
    benchmark, queries, passages = problem(name, dim)
    forget_peak()
    before, started = memory("VmRSS"), time.process_time()
    scores = score_embeddings(benchmark, queries, passages, k=0)
    taken, peak = time.process_time() - started, memory() - before
    block = 4 * len(passages) * min(len(queries), queries_per_block(len(passages)))
    table = scores.per_query.memory_usage(deep=True).sum()
    found = {"cpu seconds": round(taken, 2), "block_mib": round(block / 2**20, 1), "peak_mib": round(1024 * peak, 1), "table_mib": round(table / 2**20, 1), "what": settings_of(benchmark, scores)}
    sample = queries[:: max(1, len(queries) // 12_000)]
    return found | {"bare product, cpu seconds": round(bare_product(sample, passages) * len(queries) / len(sample), 2)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=20, help="queries of each language that the peers evaluate")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--xm3600", action="store_true", help="XM3600 instead, without the peers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # and Numba takes as many, in this library
    numba.set_num_threads(1)  # for ranx
    found = measure(one_scoring, "xm3600" if arguments.xm3600 else "xquad_r", arguments.dim)
    if arguments.xm3600:
        comparisons = [compared("every measure of every query", "seconds", found["cpu seconds"], "bare matrix product", found["bare product, cpu seconds"])]
        return write_result(__file__, {"what": found["what"], "comparisons": comparisons, "scoring": found} | entries(__file__, ["torch", "numba"], arguments), "evaluation_xm3600")
    benchmark, queries, passages = problem("xquad_r", arguments.dim)
    times, languages, pool = {name: [] for name in ("ours", "bare matrix product", *PEERS)}, benchmark.languages, slice(0, len(passages))
    differences = dict.fromkeys(PEERS, 0.0)
    for _ in range(arguments.rounds + 1):  # the first round compiles, and does not count
        started = time.process_time()
        scores = score_embeddings(benchmark, queries, passages, k=0)
        times["ours"].append(time.process_time() - started)
        times["bare matrix product"].append(bare_product(queries, passages))
        seconds = dict.fromkeys(PEERS, 0.0)
        for language in languages:
            rows = np.arange(benchmark.query_slices[language].start, benchmark.query_slices[language].stop)[: arguments.queries]
            whole, factor = queries[rows] @ passages.T, len(benchmark.queries) / len(languages) / len(rows)
            for corpus in (*[benchmark.passage_slices[other] for other in languages[:3]], pool):
                taken, values = peer_work(benchmark, whole[:, corpus], rows, corpus)
                for name in PEERS:
                    seconds[name] += taken[name] * factor * (1 if corpus == pool else len(languages) / 3)  # three of eleven corpora stand for all
                    if corpus == pool:
                        pooled = scores.per_query.query("task == 'multi' and query_language == @language").iloc[: len(rows)]
                        differences[name] = max(differences[name], *[float(abs(values[name][measure] - pooled[measure]).max()) for measure in MEASURES])
        for name in PEERS:
            times[name].append(seconds[name])
    assert max(differences.values()) < 1e-4, differences
    best = {name: min(rounds[1:]) for name, rounds in times.items()}
    result = {
        "comparisons": [compared("every measure of every query", "seconds", best["ours"], name, best[name]) for name in (*PEERS, "bare matrix product")],
        "largest difference of a measure of a query": {name: float(f"{difference:.1e}") for name, difference in differences.items()},
        "what": found["what"], "scoring": found,
        "sample": f"{arguments.queries} queries of each language, three corpora and the pool",
    }
    write_result(__file__, result | entries(__file__, ["torch", "numba", "ir_measures", "pytrec_eval-terrier", "ranx"], arguments))


if __name__ == "__main__":
    main()
