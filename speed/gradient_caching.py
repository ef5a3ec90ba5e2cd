"""What training needs: all activations of a step in memory at once, or the gradients of the vectors cached and the texts computed again, portion by portion.

    python speed/gradient_caching.py [--plain 32 128] [--cached 128 1024] [--peer 128] [--portion 4] [--length 32] [--pairs 1024]

The encoder is me5-small-q4, the pairs are those of `training_and_encoding.py`; sentence-transformers does the cached step with the same weights, precision, batch and texts at a time.
Each training sees as many pairs, in steps of its own size: one step of a thousand pairs, or thirty of a few dozen, so that all have met about as many words and lengths of texts at the end. Each runs in a process of its own, a copy of one that has loaded the encoder, on one thread, and its seconds are those of the processor, so that other work on the machine counts little. Memory is resident memory:
after loading, and at its highest. Needs the data folder (HYBRID_IR_DATA). Writes speed/results/gradient_caching.json.
"""

import argparse
import gc
import os
import tempfile
import time
from dataclasses import replace
from itertools import islice

import torch
from _entries import compared, entries, forget_peak, measure, memory, write_result
from training_and_encoding import TEMPERATURE, complete_pairs, peer_training

from hybrid_ir.encoders import choose_precision, load_encoder
from hybrid_ir.samplers import BatchSampler
from hybrid_ir.training import Trainer, training_options

ENCODER = load_encoder("me5-small-q4", device="cpu", precision="auto")
PAIRS = complete_pairs(1280)  # to draw from, in nine languages: the same for all, because word embeddings in use need memory, too
SHAPES = 16  # of products, that one step lets oneDNN keep


def our_steps(batch_size: int, portion: int | None, length: int, pairs: int, shapes: int | None = None) -> dict:
    "Steps of our trainer over so many pairs; `portion`: pairs whose activations are in memory at once; `shapes`: products that oneDNN keeps prepared, 1,024 if None."
    if shapes:  # read at the first product
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(shapes)
    ENCODER.config = replace(ENCODER.config, query_length=length, passage_length=length)
    options = training_options(sampler="hybrid", batch_size=batch_size, mini_batch_size=portion, steps=pairs // batch_size, temperature=TEMPERATURE, heldout=0)
    trainer = Trainer(ENCODER, PAIRS, options, None, False)
    forget_peak()
    loaded, started = memory("VmRSS"), time.process_time()
    for _ in range(trainer.options.steps):
        trainer.step()
    return {"seconds a pair": round((time.process_time() - started) / pairs, 4), "loaded_gib": round(loaded, 2)}


def peer_steps(batch_size: int, portion: int, length: int, pairs: int) -> dict:
    "Steps of sentence-transformers' trainer over so many pairs with cached gradients, once our copy of the weights is gone."
    global ENCODER
    bf16 = choose_precision(ENCODER.precision) == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        ENCODER.save(folder)
        batches = list(islice(BatchSampler(PAIRS, "hybrid", batch_size=batch_size), pairs // batch_size))
        forget_peak()
        loaded = memory("VmRSS")
        ENCODER = None  # in this process only: the next step starts from the one that keeps it
        gc.collect()
        forget_peak()
        seconds = peer_training(folder, PAIRS, batches, bf16, cached=2 * portion, length=length, clock=time.process_time)  # our portions hold questions and passages, theirs one of them
    return {"seconds a pair": round(seconds / pairs, 4), "loaded_gib": round(loaded, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", type=int, nargs="*", default=[32, 128], help="batch sizes with all activations in memory")
    parser.add_argument("--cached", type=int, nargs="*", default=[128, 1024], help="batch sizes with cached gradients")
    parser.add_argument("--peer", type=int, default=128, help="one of them, for sentence-transformers")
    parser.add_argument("--portion", type=int, default=4, help="pairs whose activations are in memory at once")
    parser.add_argument("--pairs", type=int, default=1024, help="that each training sees")
    parser.add_argument("--length", type=int, default=32, help="tokens of a text at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = [("plain", our_steps, size, None) for size in options.plain] + [("cached, sentence-transformers", peer_steps, options.peer, options.portion)]
    calls += [("cached", our_steps, size, options.portion) for size in options.cached] + [(f"cached, {SHAPES} shapes of products kept", our_steps, max(options.cached), options.portion, SHAPES)]
    steps = [{"step": name, "batch": size} | measure(step, size, portion, options.length, options.pairs, *more, start="fork") for name, step, size, portion, *more in calls]
    for step in steps:
        step.pop("seconds"), step.pop("cpu seconds")  # with loading
    ours, peer = (next(step for step in steps if step["step"] == name and step["batch"] == options.peer) for name in ("cached", "cached, sentence-transformers"))
    work, name = f"steps of {options.peer} pairs, {options.portion} at a time", "sentence-transformers, cached gradients"
    comparisons = [
        compared(work, "seconds", options.pairs * ours["seconds a pair"], name, options.pairs * peer["seconds a pair"]),
        compared(work, "GiB on top of what was loaded", ours["peak_memory_gib"] - ours["loaded_gib"], name, peer["peak_memory_gib"] - peer["loaded_gib"]),
    ]
    result = {"comparisons": comparisons, "steps": steps, "portion": options.portion, "pairs": options.pairs, "length": options.length, "precision": choose_precision(ENCODER.precision)}
    write_result(__file__, result | entries(__file__, ["torch", "transformers", "sentence-transformers"], options))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
