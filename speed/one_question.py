"""Milliseconds from one question to its vector, as a search needs it, beside sentence-transformers.

The same weights and questions of XQuAD-R in one run, alternating; the median counts. `as if weights had changed` is what each question would cost if the packed network were not kept.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/one_question.json, or, on a processor with AMX or without bf16, a file with that in its name, and prints it.

    python speed/one_question.py [--questions 5]
"""

import argparse
import os
import tempfile
import time

import numpy as np
from _entries import compared, entries, fast_precisions, write_result
from training_and_encoding import DTYPES, our_encoder, peer_model, sample_texts

from hybrid_ir.encoders import KEPT, load_encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=20, help="in each language")
    options = parser.parse_args()
    _, questions = sample_texts(options.questions)
    precisions = fast_precisions()
    with tempfile.TemporaryDirectory() as folder:
        load_encoder("me5-small-q4", device="cpu").save(folder)
        ours = {precision: our_encoder(folder, precision) for precision in precisions}
        peers = {precision: peer_model(folder, DTYPES[precision]) for precision in precisions if precision in DTYPES}
    calls = {f"ours, {name}": lambda text, one=encoder: one.encode([text], progress=False) for name, encoder in ours.items()}
    calls |= {f"sentence-transformers, {name}": lambda text, one=model: one.encode(["query: " + text], show_progress_bar=False) for name, model in peers.items()}
    again = {f"ours, {name}, as if weights had changed": lambda text, one=encoder: (KEPT.pop(one, None), one.encode([text], progress=False)) for name, encoder in ours.items()}
    seconds = {name: [] for name in calls | again}
    for number, text in enumerate(questions):
        for name, call in (calls | (again if number % 10 == 0 else {})).items():
            if number == 0:
                call(text)  # loads, compiles
            started = time.perf_counter()
            call(text)
            seconds[name].append(time.perf_counter() - started)
    found = {name: round(1000 * float(np.median(times)), 2) for name, times in seconds.items()}
    comparisons = [compared(f"one question, {name.partition(', ')[2]}", "milliseconds", found[name], peer, found[peer]) for name in calls if name.startswith("ours") for peer in calls if peer.startswith("sentence")]
    write_result(__file__, {"comparisons": comparisons, "milliseconds": found, "questions": len(questions)} | entries(__file__, ["torch", "transformers", "sentence-transformers"], options), by_precision=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
