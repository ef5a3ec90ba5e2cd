"""Pairs per second in training and texts per second in encoding, beside sentence-transformers doing the same work.

The same weights, texts, prefixes, batches and lengths, in one run, alternating, so that a busy machine is busy for both.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/training_and_encoding.json and prints a table.

    python speed/training_and_encoding.py [--steps 4] [--texts 40]
"""

import argparse
import os
import tempfile
import time
from itertools import islice

import numpy as np
import torch
from _entries import compared, entries, write_result
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import has_fast_bf16, load_encoder
from hybrid_ir.pairs import load_pairs
from hybrid_ir.samplers import BatchSampler
from hybrid_ir.training import Trainer, training_options

LANGUAGES = ["ar", "de", "en", "es", "hi", "ru", "th", "tr", "zh"]
BATCH, LENGTH, TEMPERATURE, RATE = 32, 64, 0.02, 3e-5


def peer_model(folder: str, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> SentenceTransformer:
    "sentence-transformers with the same weights, pooling and length."
    transformer = Transformer(folder, max_seq_length=length, model_kwargs={"dtype": dtype, "add_pooling_layer": False})
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension()), Normalize()], device="cpu")


class FixedBatches:
    "The batches in the order of the data set."

    def __init__(self, size: int, count: int):
        self.size, self.count = size, count

    def __iter__(self):
        return iter([list(range(start, start + self.size)) for start in range(0, self.size * self.count, self.size)])

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):
        pass


def peer_training(folder: str, pairs, batches: list[np.ndarray], bf16: bool = False, cached: int | None = None, length: int = LENGTH, clock=time.perf_counter) -> float:
    "Seconds that sentence-transformers' trainer takes for the batches; `cached`: with cached gradients, so many texts at a time."
    rows, size = np.concatenate(batches), len(batches[0])
    data = Dataset.from_dict({"anchor": ["query: " + pairs.table[int(q)]["query"] for q in rows[:, 0]], "positive": ["passage: " + pairs.table[int(p)]["passage"] for p in rows[:, 1]]})
    model = peer_model(folder, length=length)
    with tempfile.TemporaryDirectory() as output:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=output, per_device_train_batch_size=size, num_train_epochs=1, learning_rate=RATE, bf16=bf16, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
            batch_sampler=lambda dataset, batch_size, **options: FixedBatches(size, len(batches)), logging_strategy="no",
        )  # fmt: skip
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=cached) if cached else MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
        started = clock()
        trainer.train()
        return clock() - started


def our_training(encoder, pairs, steps: int) -> tuple[float, list[np.ndarray]]:
    "Seconds that our trainer takes, from making it (tokenising, vocabulary) to its end, and the batches it drew."
    options = training_options(sampler="hybrid", batch_size=BATCH, steps=steps, temperature=TEMPERATURE, learning_rate=RATE, heldout=0)
    started = time.perf_counter()
    Trainer(encoder, pairs, options, None, False).fit()
    return time.perf_counter() - started, list(islice(BatchSampler(pairs, "hybrid", batch_size=BATCH), steps))


def complete_pairs(count: int = 2 * BATCH):
    "So many training pairs that exist in every language."
    pairs = load_pairs("parallel_docs", languages=LANGUAGES)
    return pairs.select(ids=np.flatnonzero((pairs.rows >= 0).all(axis=1))[:count])


def sample_texts(count: int) -> tuple[list[str], list[str]]:
    "Passages and queries of XQuAD-R, `count` in each language."
    benchmark, rng = load_benchmark("xquad_r"), np.random.default_rng(0)
    chosen = ((benchmark.passages, benchmark.passage_slices), (benchmark.queries, benchmark.query_slices))
    return tuple([table["text"].iloc[row] for part in slices.values() for row in rng.choice(np.arange(part.start, part.stop), count, replace=False)] for table, slices in chosen)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--texts", type=int, default=40, help="passages and queries per language")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    pairs, (passages, queries) = complete_pairs(), sample_texts(arguments.texts)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        load_encoder("me5-small-q4", device="cpu").save(folder)
        for _ in range(arguments.rounds):
            encoder = load_encoder(folder, device="cpu", precision="auto", query_length=LENGTH, passage_length=LENGTH)
            peer = peer_model(folder)
            started = time.perf_counter()
            ours = np.concatenate([encoder.encode(queries, "query", progress=False), encoder.encode(passages, "passage", progress=False)])
            seconds.setdefault("encode, ours", []).append(time.perf_counter() - started)
            started = time.perf_counter()
            theirs = np.concatenate([peer.encode(["query: " + text for text in queries]), peer.encode(["passage: " + text for text in passages])])
            seconds.setdefault("encode, sentence-transformers fp32", []).append(time.perf_counter() - started)
            agreement = float((ours * theirs).sum(1).min())
            taken, batches = our_training(encoder, pairs, arguments.steps)
            seconds.setdefault("train, ours", []).append(taken)
            seconds.setdefault("train, sentence-transformers fp32", []).append(peer_training(folder, pairs, batches))
            if has_fast_bf16(torch.device("cpu")):
                half = peer_model(folder, torch.bfloat16)
                started = time.perf_counter()
                half.encode(["query: " + text for text in queries]), half.encode(["passage: " + text for text in passages])
                seconds.setdefault("encode, sentence-transformers bf16", []).append(time.perf_counter() - started)
                seconds.setdefault("train, sentence-transformers bf16", []).append(peer_training(folder, pairs, batches, bf16=True))
    units = {"encode": len(passages) + len(queries), "train": BATCH * arguments.steps}
    rates = {name: units[name.split(",")[0]] / min(times) for name, times in seconds.items()}
    comparisons = []
    for name, rate in rates.items():
        work, who = name.split(", ")
        if who != "ours":
            comparisons.append(compared(work, {"encode": "texts per second", "train": "pairs per second"}[work], rates[f"{work}, ours"], who, rate))
    results = {"comparisons": comparisons, "smallest cosine between our vectors and theirs": round(agreement, 6), "bf16 in hardware": has_fast_bf16(torch.device("cpu"))}
    write_result(__file__, results | entries(__file__, ["torch", "transformers", "sentence-transformers"], arguments))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
