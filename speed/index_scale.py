"""Retrieval beyond memory: vectors in shards, indexed by FAISS and searched, with time, disk, memory and recall.

    python speed/index_scale.py [--rows 10000000] [--factories IVF1024,PQ48]
    python speed/index_scale.py --rows 200000 --factories Flat HNSW32 IVF1024,Flat IVF1024,PQ48 OPQ48,IVF1024,PQ96
    python speed/index_scale.py --corpus xquad_r --factories Flat HNSW32 IVF128,Flat IVF128,PQ64 --training-rows 13014

The vectors are generated (points around random centres, of length 1, float16), because this is about size, not about language: how
long the work takes and what it needs. They are the worst case for recall: around a centre all directions are alike, so nothing that a code could learn tells the nearest from the next.
With --corpus they are the passages of a benchmark, encoded by use-multilingual-v3, and the queries are its queries.
Writes speed/results/index_scale.json, for other sizes and for a corpus with the size or name added; a folder with the shards is made below --folder and removed in the end.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from _entries import compared, entries, measure, write_result

ROWS, FACTORY = 10_000_000, "IVF1024,PQ48"
CENTRES, SPREAD = 20_000, 0.7  # points lie around this many centres; SPREAD is the length of what is added to a centre of length 1
ENOUGH = 0.9  # recall@10 of the setting that is compared with exact search; where none has it, the best one


def generate(seed: int, rows: int, dim: int) -> np.ndarray:
    "float32 [rows, dim] of length 1: a function of the seed alone."
    centres = np.random.default_rng(0).standard_normal((CENTRES, dim), dtype=np.float32)
    random = np.random.default_rng([1, seed])
    vectors = random.standard_normal((rows, dim), dtype=np.float32) * SPREAD + centres[random.integers(CENTRES, size=rows)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(folder: Path, rows: int, dim: int, shard_size: int):
    "Shards as `encode_corpus` leaves them, with generated vectors; shards that are there are kept."
    from hybrid_ir.index import claim_vectors, finish_vectors, read_shard_entry, write_shard

    identity = {"weights": "generated", "dim": dim, "dtype": "float16", "shard_size": shard_size, "kind": "passage"}
    claim_vectors(folder, identity, {"encoder": {"name": "generated"}})
    for number, start in enumerate(range(0, rows, shard_size)):
        n = min(shard_size, rows - start)
        if read_shard_entry(folder, number) is None:
            write_shard(folder, number, generate(number, n, dim).astype(np.float16), {"id": [str(row) for row in range(start, start + n)], "lang": [""] * n, "text": [""] * n})
    finish_vectors(folder)


def encode_vectors(folder: Path, corpus: str, n_queries: int, shard_size: int):
    "Shards of the passages of a benchmark, and the vectors of some of its queries."
    from hybrid_ir.benchmarks import load_benchmark
    from hybrid_ir.encoders import load_encoder
    from hybrid_ir.index import encode_corpus

    benchmark, encoder = load_benchmark(corpus), load_encoder("use-multilingual-v3", device="cpu")
    encode_corpus(encoder, benchmark.passages[["id", "lang", "text"]], folder, shard_size, progress=False)
    chosen = np.random.default_rng(0).choice(len(benchmark.queries), n_queries, replace=False)
    np.save(folder / "queries.npy", encoder.encode(benchmark.queries["text"].iloc[chosen].tolist(), "query", progress=False))


def search_exact(folder: Path, queries: np.ndarray, k: int):
    from hybrid_ir.index import Vectors

    np.save(folder / "exact.npy", Vectors(folder).search(queries, k)[0])


def build(folder: Path, factory: str, training_rows: int):
    from hybrid_ir.index import Vectors, build_index

    build_index(Vectors(folder), factory, training_rows, progress=False)


def settings_of(factory: str) -> list[dict]:
    "What can be set in a search, by the kind of index. Scoring again is of use where the index has codes in place of the vectors."
    again = (0, 100) if "PQ" in factory or "SQ" in factory else (0,)
    name, values = ("nprobe", (1, 8, 32)) if "IVF" in factory else ("efSearch", (16, 64, 256)) if "HNSW" in factory else ("", (None,))
    return [({name: value} if name else {}) | {"rescore": rescore} for value in values for rescore in again]


def search(folder: Path, factory: str, queries: np.ndarray) -> dict:
    "Recall and time of each setting; `own_memory_gib`: what opening and searching took that is not a mapped file."
    from _entries import memory
    from hybrid_ir.index import FaissIndex, Vectors, index_folder, recall_table

    before = memory("RssAnon")
    index = FaissIndex(index_folder(Vectors(folder), factory))
    table = recall_table(index, queries, settings_of(factory), exact=np.load(folder / "exact.npy")).drop(columns="index")
    return {"own_memory_gib": round(memory("RssAnon") - before, 3), "recall": json.loads(table.to_json(orient="records"))}


def beside_exact(results: dict) -> list[dict]:
    "The time of a question: in each index beside exact search, and exact search beside the flat index of FAISS, if there is one."
    exact, found = results["exact search"], []
    ours = 1000 * exact["seconds"] / exact["queries"]
    for part in results["indexes"]:
        good = [row for row in part["recall"] if row["recall@10"] >= ENOUGH]
        row = min(good, key=lambda row: row["ms per query"]) if good else max(part["recall"], key=lambda row: row["recall@10"])
        if part["factory"] == "Flat":
            found.append(compared("exact search, a question of a batch", "milliseconds", ours, "FAISS Flat", row["ms per query"]))
        else:
            setting = ", ".join(f"{name}={row[name]}" for name in row if name in ("nprobe", "efSearch", "rescore") and row[name])
            found.append(compared(f"{part['factory']}, {setting}: recall@10 {row['recall@10']:.2f}", "milliseconds", row["ms per query"], "exact search", ours))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--corpus", default="", help="a benchmark whose passages are encoded, in place of generated vectors")
    parser.add_argument("--shard-size", type=int, default=100_000)
    parser.add_argument("--factories", nargs="+", default=[FACTORY])
    parser.add_argument("--training-rows", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("index_scale"))
    options = parser.parse_args()
    size = options.rows * options.dim * 2
    if not options.corpus and shutil.disk_usage(options.folder.absolute().parent).free < 2 * size:
        raise SystemExit(f"{options.rows:,} vectors take {size / 2**30:.1f} GiB, and the indexes some more; {options.folder.parent} has too little room")
    from hybrid_ir.index import Vectors, index_folder

    if options.corpus:
        writing = measure(encode_vectors, options.folder, options.corpus, options.queries, options.shard_size)
        queries = np.load(options.folder / "queries.npy")
    else:
        writing = measure(write_vectors, options.folder, options.rows, options.dim, options.shard_size)
        queries = generate(10**6, options.queries, options.dim)
    vectors = Vectors(options.folder)
    results = {"vectors": options.corpus or "generated", "rows": len(vectors), "dim": vectors.dim, "writing": writing}
    results["bytes of vectors"] = sum(path.stat().st_size for path in options.folder.glob("0*.npy"))
    results["exact search"] = measure(search_exact, options.folder, queries, 10) | {"queries": len(queries)}
    results["indexes"] = []
    for factory in options.factories:
        built = measure(build, options.folder, factory, options.training_rows)
        searched = measure(search, options.folder, factory, queries)
        found = index_folder(vectors, factory)
        manifest = json.loads((found / "manifest.json").read_text())
        results["indexes"].append({
            "factory": factory, "training rows": manifest["training_rows"], "seconds": manifest["seconds"], "building": built,
            "bytes": sum(path.stat().st_size for path in found.glob("*")), "recall": searched.pop("recall"), "searching": searched,
        })  # fmt: skip
        write_results(results, options)
    shutil.rmtree(options.folder)


def write_results(results: dict, options):
    import faiss

    unused = ("folder", "rows", "dim") if options.corpus else ("folder",)
    found = {"comparisons": beside_exact(results)} | results | entries(__file__, ["faiss-cpu", "numpy", "torch"], options, unused)
    found["machine"] |= {"faiss threads": faiss.omp_get_max_threads()}
    name = "" if options.rows == ROWS and not options.corpus else f"_{options.corpus or options.rows}"
    write_result(__file__, found, f"index_scale{name}")


if __name__ == "__main__":
    main()
