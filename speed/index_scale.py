"""Retrieval beyond memory: vectors of a given number written in shards, indexed by FAISS and searched, with time, disk, memory and recall.

    python speed/index_scale.py --rows 10000000 --factories IVF1024,PQ48

The vectors are generated (points around random centres, of length 1, float16), because this is about size, not about language: how
long the work takes and what it needs. Recall on them says how the index is set, not how well a real corpus can be searched.
Writes speed/results/index_scale.json; a folder with the shards is made below --folder and removed in the end.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from _entries import entries, measure, write_result

CENTRES, SPREAD = 20_000, 0.7  # points lie around this many centres; SPREAD is the length of what is added to a centre of length 1


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


def search_exact(folder: Path, queries: np.ndarray, k: int):
    from hybrid_ir.index import Vectors

    np.save(folder / "exact.npy", Vectors(folder).search(queries, k)[0])


def build(folder: Path, factory: str, training_rows: int):
    from hybrid_ir.index import Vectors, build_index

    build_index(Vectors(folder), factory, training_rows)


def search(folder: Path, factory: str, queries: np.ndarray, settings: list[dict]):
    from hybrid_ir.index import FaissIndex, Vectors, index_folder, recall_table

    index = FaissIndex(index_folder(Vectors(folder), factory))
    table = recall_table(index, queries, settings, exact=np.load(folder / "exact.npy")).drop(columns="index")
    (folder / "found.json").write_text(json.dumps(json.loads(table.to_json(orient="records"))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--shard-size", type=int, default=100_000)
    parser.add_argument("--factories", nargs="+", default=["IVF1024,PQ48"])
    parser.add_argument("--training-rows", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("index_scale"))
    options = parser.parse_args()
    size = options.rows * options.dim * 2
    if shutil.disk_usage(options.folder.parent).free < 2 * size:
        raise SystemExit(f"{options.rows:,} vectors take {size / 2**30:.1f} GiB, and the indexes some more; {options.folder.parent} has too little room")
    from hybrid_ir.index import Vectors, index_folder

    settings = [{"nprobe": nprobe, "rescore": rescore} for nprobe in (1, 8, 32) for rescore in (0, 100)]
    queries = generate(10**6, options.queries, options.dim)
    results = {"rows": options.rows, "dim": options.dim, "writing": measure(write_vectors, options.folder, options.rows, options.dim, options.shard_size)}
    results["bytes of vectors"] = sum(path.stat().st_size for path in options.folder.glob("*.npy"))
    results["exact search"] = measure(search_exact, options.folder, queries, 10) | {"queries": len(queries)}
    results["indexes"] = []
    for factory in options.factories:
        built = measure(build, options.folder, factory, options.training_rows)
        searched = measure(search, options.folder, factory, queries, settings)
        found = index_folder(Vectors(options.folder), factory)
        manifest = json.loads((found / "manifest.json").read_text())
        results["indexes"].append({
            "factory": factory, "training rows": manifest["training_rows"], "seconds": manifest["seconds"], "building": built, "searching": searched,
            "bytes": sum(path.stat().st_size for path in found.glob("*")), "recall": json.loads((options.folder / "found.json").read_text()),
        })  # fmt: skip
        write_results(results, options)
    shutil.rmtree(options.folder)


def write_results(results: dict, options):
    import faiss

    found = results | entries(__file__, ["faiss-cpu", "numpy", "torch"], options)
    found["machine"] |= {"faiss threads": faiss.omp_get_max_threads()}
    write_result(__file__, found)


if __name__ == "__main__":
    main()
