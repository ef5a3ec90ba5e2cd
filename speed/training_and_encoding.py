"""Pairs per second in training and texts per second in encoding, beside sentence-transformers doing the same work.

The same weights, texts, prefixes, batches, lengths and dropout, in one run, alternating, so that a busy machine is busy for both. Of each side the fastest round counts. On one thread (OMP_NUM_THREADS=1), time is that of the processor, so that other work counts little.
Before that, the gradients of both sides for one batch are compared: in fp32, and in bf16, where each side has its own rounding and the fp32 gradient is the truth.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/training_and_encoding.json, or, on a processor with AMX or without bf16, a file with that in its name, and prints it.

    python speed/training_and_encoding.py [--steps 4] [--texts 40] [--rounds 3] [--encodings 3]
"""

import argparse
import os
import tempfile
import time
from itertools import islice

import numpy as np
import torch
from _entries import compared, entries, fast_precisions, write_result
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import autocast, has_fast_bf16, has_fast_int8, load_encoder
from hybrid_ir.pairs import load_pairs
from hybrid_ir.samplers import BatchSampler
from hybrid_ir.training import Trainer, batch_loss, set_dropout, training_options

CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
LANGUAGES = ["ar", "de", "en", "es", "hi", "ru", "th", "tr", "zh"]
BATCH, LENGTH, TEMPERATURE, RATE = 100, 64, 0.02, 3e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INT8 = ", our products of weights in int8"


def fastest(call, rounds: int, clock=time.process_time) -> float:
    "Seconds of the fastest of five calls a round."
    times = []
    for _ in range(5 * rounds):
        started = clock()
        call()
        times.append(clock() - started)
    return min(times)


def matrix_peaks(rounds: int, clock=time.process_time, size: int = 2048) -> dict[str, float]:
    "Operations a second of a product of two square matrices, in fp32 and, where the hardware has it, in bf16."
    first, second = torch.rand(2, size, size)
    pairs = {name: (first.to(dtype), second.to(dtype)) for name, dtype in DTYPES.items() if name in fast_precisions()}
    return {name: 2 * size**3 / fastest(lambda: one @ other, rounds, clock) for name, (one, other) in pairs.items()}


def operations_of_products(encoder, texts: list[str], kind: str) -> int:
    "Operations of the products of weights that the texts need on the way there, without padding."
    weights = sum(parameter.numel() for parameter in encoder.backbone.encoder.parameters() if parameter.ndim == 2)
    return 2 * weights * sum(map(len, encoder.tokenize(texts, kind)))


def peer_model(folder: str, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> SentenceTransformer:
    "sentence-transformers with the same weights, pooling and length."
    transformer = Transformer(folder, max_seq_length=length, model_kwargs={"dtype": dtype, "add_pooling_layer": False})
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension()), Normalize()], device="cpu")


def our_encoder(folder: str, precision: str = "auto"):
    "The same weights here."
    return load_encoder(folder, device="cpu", precision=precision, query_length=LENGTH, passage_length=LENGTH)


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


def texts_of(pairs, batches: list[np.ndarray]) -> tuple[list[str], list[str]]:
    "The questions and the passages of some batches."
    rows = np.concatenate(batches)
    return [pairs.table[int(row)]["query"] for row in rows[:, 0]], [pairs.table[int(row)]["passage"] for row in rows[:, 1]]


def with_prefixes(pairs, batches: list[np.ndarray]) -> dict[str, list[str]]:
    "The same as sentence-transformers gets them."
    queries, passages = texts_of(pairs, batches)
    return {"anchor": ["query: " + text for text in queries], "positive": ["passage: " + text for text in passages]}


def peer_training(folder: str, pairs, batches: list[np.ndarray], bf16: bool = False, cached: int | None = None, length: int = LENGTH, clock=CLOCK) -> float:
    "Seconds that sentence-transformers' trainer takes for the batches; `cached`: with cached gradients, so many texts at a time."
    size, model = len(batches[0]), peer_model(folder, length=length)
    with tempfile.TemporaryDirectory() as output:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=output, per_device_train_batch_size=size, num_train_epochs=1, learning_rate=RATE, bf16=bf16, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
            batch_sampler=lambda dataset, batch_size, **options: FixedBatches(size, len(batches)), logging_strategy="no",
        )  # fmt: skip
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=cached) if cached else MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(with_prefixes(pairs, batches)), loss=loss)
        started = clock()
        trainer.train()
        return clock() - started


def hybrid_options(steps: int, **others):
    "The options of our training."
    return training_options(sampler="hybrid", batch_size=BATCH, steps=steps, temperature=TEMPERATURE, learning_rate=RATE, heldout=0, **others)


def our_training(encoder, pairs, steps: int) -> tuple[float, list[np.ndarray]]:
    "Seconds that our trainer takes, from making it (tokenising, vocabulary) to its end, and the batches it drew."
    started = CLOCK()
    Trainer(encoder, pairs, hybrid_options(steps), None, False).fit()
    return CLOCK() - started, list(islice(BatchSampler(pairs, "hybrid", batch_size=BATCH), steps))


def our_gradient(folder: str, pairs, precision: str) -> dict[str, torch.Tensor]:
    "The gradient of each weight for the first batch; word embeddings as a full table."
    encoder = our_encoder(folder, precision)
    trainer = Trainer(encoder, pairs, hybrid_options(1, dropout=0.0), None, False)
    with autocast(encoder.device, precision):
        batch_loss(trainer.towers, trainer.feed.next(more=False), trainer.options).backward()
    found = {name: parameter.grad for name, parameter in encoder.backbone.named_parameters() if parameter.grad is not None}
    words, compact = torch.zeros_like(trainer.vocabulary.full.weight), trainer.vocabulary.compact.weight.grad
    words[trainer.vocabulary.tokens] = compact
    trainer.feed.close()
    return found | {"embeddings.word_embeddings.weight": words}


def peer_gradient(folder: str, texts: dict[str, list[str]], precision: str) -> dict[str, torch.Tensor]:
    "The same from the loss of sentence-transformers."
    model = peer_model(folder)
    set_dropout(model, 0.0)
    with autocast(torch.device("cpu"), precision):
        MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)([model.preprocess(part) for part in texts.values()], None).backward()
    return {name: parameter.grad for name, parameter in model[0].model.named_parameters() if parameter.grad is not None}


def compare_gradients(folder: str, pairs) -> dict:
    "Relative differences of the gradients of all weights."
    texts = with_prefixes(pairs, list(islice(BatchSampler(pairs, "hybrid", batch_size=BATCH), 1)))
    truth = peer_gradient(folder, texts, "fp32")
    size = sum(part.square().sum() for part in truth.values()).sqrt()

    def difference(found: dict[str, torch.Tensor]) -> float:
        assert found.keys() == truth.keys()
        return float(f"{float(sum((found[name] - part).square().sum() for name, part in truth.items()).sqrt() / size):.2g}")

    result = {"ours in fp32": difference(our_gradient(folder, pairs, "fp32"))}
    if has_fast_bf16(torch.device("cpu")):
        result |= {"ours in bf16": difference(our_gradient(folder, pairs, "bf16")), "theirs in bf16": difference(peer_gradient(folder, texts, "bf16"))}
    return result


def complete_pairs(count: int = 2 * BATCH):
    "So many training pairs that exist in every language."
    pairs = load_pairs("parallel_docs", languages=LANGUAGES)
    return pairs.select(ids=np.flatnonzero((pairs.rows >= 0).all(axis=1))[:count])


def sample_texts(count: int, name: str = "xquad_r") -> tuple[list[str], list[str]]:
    "Passages and queries of a benchmark, `count` in each language."
    benchmark, rng = load_benchmark(name), np.random.default_rng(0)
    chosen = ((benchmark.passages, benchmark.passage_slices), (benchmark.queries, benchmark.query_slices))
    return tuple([table["text"].iloc[row] for part in slices.values() for row in rng.choice(np.arange(part.start, part.stop), min(count, part.stop - part.start), replace=False)] for table, slices in chosen)


def our_encoding(encoder, passages: list[str], queries: list[str]) -> np.ndarray:
    "What this library makes of the texts."
    return np.concatenate([encoder.encode(queries, "query", progress=False), encoder.encode(passages, "passage", progress=False)])


def peer_encoding(model: SentenceTransformer, passages: list[str], queries: list[str]) -> np.ndarray:
    "What sentence-transformers makes of the texts."
    return np.concatenate([model.encode(["query: " + text for text in queries]), model.encode(["passage: " + text for text in passages])])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--texts", type=int, default=60, help="passages and queries per language")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encodings", type=int, default=3, help="of all texts by each side in a round: the first ones prepare products and memory")
    arguments = parser.parse_args()
    pairs, texts = complete_pairs(), {title: sample_texts(arguments.texts, name) for title, name in (("XQuAD-R", "xquad_r"), ("XM3600", "xm3600"))}
    (bf16, int8), seconds, agreement = (has(torch.device("cpu")) for has in (has_fast_bf16, has_fast_int8)), {}, {}

    def timed(work: str, who: str, call):
        started = CLOCK()
        result = call()
        seconds.setdefault((work, who), []).append(CLOCK() - started)
        return result

    with tempfile.TemporaryDirectory() as folder:
        load_encoder("me5-small-q4", device="cpu").save(folder)
        gradients = compare_gradients(folder, pairs)
        for _ in range(arguments.rounds):
            encoder, peer, half = our_encoder(folder), peer_model(folder), peer_model(folder, torch.bfloat16) if bf16 else None
            ours = {"": encoder} | ({INT8: our_encoder(folder, "int8")} if int8 else {})
            for title, (passages, queries) in [work for work in texts.items() for _ in range(arguments.encodings)]:
                theirs = timed(f"encoding {title}", "sentence-transformers, as it comes (fp32)", lambda: peer_encoding(peer, passages, queries))
                if bf16:
                    timed(f"encoding {title}", "sentence-transformers, bf16", lambda: peer_encoding(half, passages, queries))
                for how, one in ours.items():
                    vectors = timed(f"encoding {title}{how}", "ours", lambda: our_encoding(one, passages, queries))
                    agreement[title + how] = round(float((vectors * theirs).sum(1).min()), 6)
            taken, batches = our_training(encoder, pairs, arguments.steps)
            seconds.setdefault(("training", "ours"), []).append(taken)
            for who, half_precision in (("sentence-transformers, as it comes (fp32)", False), ("sentence-transformers, bf16", True))[: 1 + bf16]:
                seconds.setdefault(("training", who), []).append(peer_training(folder, pairs, batches, bf16=half_precision))
    units = {f"encoding {title}": (sum(map(len, parts)), "texts per second") for title, parts in texts.items()} | {"training": (BATCH * arguments.steps, "pairs per second")}
    rates = {(work, who): units[work.removesuffix(INT8)][0] / min(times) for (work, who), times in seconds.items()}
    comparisons = [compared(work + how, units[work][1], rates[work + how, "ours"], who, rate) for (work, who), rate in rates.items() if who != "ours" for how in ("", INT8) if (work + how, "ours") in rates]
    peaks, given = matrix_peaks(2, CLOCK), {"training": texts_of(pairs, batches), **{f"encoding {title}": (queries, passages) for title, (passages, queries) in texts.items()}}
    passes = {work: 3 if work == "training" else 1 for work in given}  # two on the way back for each on the way there
    operations = {work: passes[work] * sum(operations_of_products(encoder, part, kind) for part, kind in zip(parts, ("query", "passage"), strict=True)) / units[work][0] for work, parts in given.items()}
    results = {
        "operations a second of one large product": {name: float(f"{peak:.4g}") for name, peak in peaks.items()},
        "share of the last of these, without padding": [{"work": work, "who": who, "share": round(operations[work] * rate / list(peaks.values())[-1], 2)} for (work, who), rate in rates.items() if work in operations and (not bf16 or "fp32" not in who)],
        "comparisons": sorted(comparisons, key=lambda row: row["work"], reverse=True), "pairs in a batch": BATCH, "tokens of a text, at most": LENGTH, "smallest cosine between our vectors and theirs": agreement,
        "difference of gradients from theirs in fp32, relative": gradients, "bf16 in hardware": bf16, "time": "of the processor" if CLOCK is time.process_time else "on the wall",
    }  # fmt: skip
    write_result(__file__, results | entries(__file__, ["torch", "transformers", "sentence-transformers"], arguments), by_precision=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
