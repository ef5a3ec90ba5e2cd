"""Samplers and pairs at the paper's scale: a generated training set of 40 million rows in 9 languages, opened, split and sampled from.

    python speed/pairs_scale.py --rows 40000000

The texts are generated ("passage 17 in de ..."), one id in fifty shares its passage with its neighbour, and four ids make a page. Each step runs in
a process of its own. Reported are seconds and the peak of anonymous memory: what the process needs beyond mapped files, which the system
may drop at any time. Writes speed/results/pairs_scale.json; the set (180 bytes a row) and its index are made below --folder and removed in the end.
"""

import argparse
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
from _entries import entries, measure, memory, write_result

LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "ru", "th", "zh"]
SAMPLERS, BATCHES = ("mono", "cross", "hybrid", "mixed"), 2000


def write_set(folder: Path, rows: int):
    "What `prepare_rows` would have written for these records, column by column instead of record by record."
    import pyarrow as pa
    import pyarrow.compute as pc

    from hybrid_ir.pairs import PAIR_SCHEMA

    block, n_ids = 20_000, rows // len(LANGUAGES)
    languages = pa.array(LANGUAGES * block)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, PAIR_SCHEMA) as writer:
        for start in range(0, n_ids, block):
            ids = np.repeat(np.arange(start, min(start + block, n_ids)), len(LANGUAGES))
            shared = np.where(ids % 50 == 1, ids - 1, ids)  # the passage of the neighbour
            lang = languages[: len(ids)]
            text = pc.binary_join_element_wise(pa.array(shared).cast(pa.string()), lang, " in ")
            passage_key = (shared.astype(np.uint64) * len(LANGUAGES) + np.arange(len(ids), dtype=np.uint64) % len(LANGUAGES) + 1) * np.uint64(0x9E3779B97F4A7C15)
            columns = [
                pa.array(ids).cast(pa.string()), lang, pc.binary_join_element_wise("question", pa.array(ids).cast(pa.string()), lang, " "),
                pc.binary_join_element_wise("passage", text, "with some words that say what was asked", " "), pa.nulls(len(ids), pa.list_(pa.string())),
                pa.repeat("generated", len(ids)), pa.array(ids), pa.array(ids.astype(np.uint64) // 4 + 1), pa.array(passage_key),
            ]  # fmt: skip
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=PAIR_SCHEMA))


def open_set(folder: Path, rows: int):
    from hybrid_ir.pairs import open_pairs

    sources = [{"source": "generated", "license": None, "translation": None, "ids": rows // len(LANGUAGES)}]
    return open_pairs(folder / "rows.arrow", {"fingerprint": f"generated-{rows}", "sources": sources}, "generated")


def open_only(folder, rows):
    open_set(folder, rows)


def split(folder, rows):
    return open_set(folder, rows).split(heldout=0.001)


def split_only(folder, rows):
    split(folder, rows)


def sample(folder, rows) -> dict:
    "Batches of 100 a second for each sampler, how long a sampler takes to be made and to go on, and the texts of a batch."
    from hybrid_ir.samplers import BatchSampler

    train, _ = split(folder, rows)
    found = {}
    for name in SAMPLERS:
        started = time.perf_counter()
        sampler = BatchSampler(train, name, batch_size=100)
        made = time.perf_counter()
        for _ in range(BATCHES):
            sampler.next_batch()
        drawn = time.perf_counter()
        state = sampler.state_dict()
        expected = sampler.next_batch()
        saved = time.perf_counter()
        sampler.load_state_dict(state)
        assert np.array_equal(sampler.next_batch(), expected)
        resumed = time.perf_counter()
        found[name] = {"making": round(made - started, 3), "batches a second": round(BATCHES / (drawn - made)), "resuming": round(resumed - saved, 4)}
    train.table[[0]]
    started = time.perf_counter()
    for _ in range(20):
        batch = sampler.next_batch()
        assert len(train.table[batch[:, 0].tolist()]["query"]) == 100
    found["texts of a batch"] = round((time.perf_counter() - started) / 20, 4)
    return {"samplers": found}


def with_peak(step, folder, rows) -> dict:
    "What a step found, and the anonymous memory that it needed at its highest."
    before, peak, done = memory("RssAnon"), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = step(folder, rows)
    done.set()
    watcher.join()
    return {"memory_gib": round(max(peak[0], memory("RssAnon")) - before, 3)} | (found or {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000_000)
    parser.add_argument("--folder", type=Path, default=Path("pairs_scale"))
    parser.add_argument("--keep", action="store_true", help="leave the set in its folder, for another run")
    options = parser.parse_args()
    if shutil.disk_usage(options.folder.absolute().parent).free < 300 * options.rows:
        raise SystemExit(f"{options.rows:,} rows and their indexes take {300 * options.rows / 2**30:.1f} GiB; {options.folder.absolute().parent} has too little room")
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["HYBRID_IR_CACHE"] = str(options.folder.absolute() / "cache")
    rows = options.rows // len(LANGUAGES) * len(LANGUAGES)
    results = {"rows": rows, "languages": len(LANGUAGES)}
    if not (options.folder / "rows.arrow").exists():
        results["writing the texts"] = measure(with_peak, write_set, options.folder, rows)
    for name, step in {"opening, the first time": open_only, "opening": open_only, "splitting, the first time": split_only, "splitting": split_only}.items():
        results[name] = measure(with_peak, step, options.folder, rows)
    results["sampling"] = measure(with_peak, sample, options.folder, rows)
    results["bytes"] = {"texts": (options.folder / "rows.arrow").stat().st_size, "indexes": sum(path.stat().st_size for path in options.folder.rglob("*.npy"))}
    write_result(__file__, results | entries(__file__, ["numpy", "pyarrow", "datasets"], options))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
