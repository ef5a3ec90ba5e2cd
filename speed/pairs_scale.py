"""Samplers and pairs at the paper's scale: a generated training set of 40 million rows in 9 languages, opened, split and sampled from.

    python speed/pairs_scale.py --rows 40000000

The texts are generated ("passage 17 in de ..."), one id in fifty shares its passage with its neighbour, and four ids make a page. Each step runs in
a process of its own. Reported are seconds and the peak of anonymous memory: what the process needs beyond mapped files, which the system
may drop at any time. The peer is the sampler of sentence-transformers that keeps equal texts apart, on the same texts. Then me5-small-q4 is trained on real pairs for some steps, their tokens
once in memory and once computed batch by batch, as for a set of this size: does the training wait for them? Needs the data folder (HYBRID_IR_DATA). Writes speed/results/pairs_scale.json; the set (180 bytes a row) and its index are made below --folder and removed in the end.
"""

import argparse
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
from _entries import compared, entries, measure, memory, write_result

LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "ru", "th", "zh"]
SAMPLERS, BATCHES, BATCH = ("english", "mixed", "mono", "cross", "hybrid"), 2000, 100


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
        sampler = BatchSampler(train, name, batch_size=BATCH)
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
    return {"samplers": found, "texts of a batch": texts_of_a_batch(train, sampler)}


def texts_of_a_batch(train, sampler, count: int = 20) -> dict:
    "Seconds to read the questions of a batch that nothing has read before: from rows with all their columns, and from the column of questions."
    found, tables = {}, {"all columns": train.table, "one column": train.table.select_columns(["query"])}
    for name, table in tables.items():
        batches = [sampler.next_batch()[:, 0].tolist() for _ in range(count)]
        started = time.perf_counter()
        assert all(len(table[rows]["query"]) == BATCH for rows in batches)
        found[name] = round((time.perf_counter() - started) / count, 4)
    return found


def peer(folder, rows, count: int = 20) -> dict:
    "The same batches a second from the sampler of sentence-transformers, and how long it takes to begin."
    from datasets import Dataset
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
    from torch import Generator

    data = Dataset.from_file(str(folder / "rows.arrow")).select_columns(["query", "passage"])
    started = time.perf_counter()
    batches = iter(NoDuplicatesBatchSampler(data, BATCH, True, generator=Generator()))
    next(batches)
    made = time.perf_counter()
    for _ in range(count):
        next(batches)
    return {"making": round(made - started, 3), "batches a second": round(count / (time.perf_counter() - made), 1)}


def streaming(steps: int, table_rows: int) -> dict:
    "Steps of training on one thread: seconds of each, and of waiting for tokens; sets of more than `table_rows` rows are tokenised batch by batch."
    import torch
    from training_and_encoding import complete_pairs

    from hybrid_ir import training
    from hybrid_ir.encoders import load_encoder

    torch.set_num_threads(1)
    training.TABLE_ROWS = table_rows
    pairs, encoder = complete_pairs(), load_encoder("me5-small-q4", device="cpu", passage_length=64)
    trainer = training.Trainer(encoder, pairs, training.training_options(sampler="hybrid", batch_size=32, steps=2 * steps, heldout=0), None, False)
    waited, take = [], trainer.feed.next

    def timed(more: bool):
        started = time.perf_counter()
        batch = take(more)
        waited.append(time.perf_counter() - started)
        return batch

    trainer.feed.next = timed
    trainer.step()  # for its batch everybody waits
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    taken = time.perf_counter() - started
    trainer.feed.close()
    return {"seconds a step": round(taken / steps, 3), "waiting a step": round(sum(waited[1:]) / steps, 5), "of the first step": round(waited[0], 4)}


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
    parser.add_argument("--steps", type=int, default=8, help="of training, with the tokens in memory and without")
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
    results["sampling, sentence-transformers"] = measure(with_peak, peer, options.folder, rows)
    results["training"] = {"tokens in memory": measure(streaming, options.steps, rows), "tokenised batch by batch": measure(streaming, options.steps, 0)}
    results["bytes"] = {"texts": (options.folder / "rows.arrow").stat().st_size, "indexes": sum(path.stat().st_size for path in options.folder.rglob("*.npy"))}
    theirs = results["sampling, sentence-transformers"]["batches a second"]
    comparisons = [compared(f"{name} batches of {BATCH}", "batches per second", found["batches a second"], "sentence-transformers, NoDuplicatesBatchSampler", theirs) for name, found in results["sampling"]["samplers"].items()]
    write_result(__file__, {"comparisons": comparisons} | results | entries(__file__, ["numpy", "pyarrow", "datasets", "sentence-transformers"], options))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
