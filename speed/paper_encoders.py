"""The paper's two architectures at full size, random weights, a few hybrid steps: memory and speed.

`python speed/paper_encoders.py` writes speed/results/paper_encoders.json. Random weights take the same time and memory as
trained ones; `papermill nbs/run.ipynb OUT.ipynb -p encoder xlm-roberta-base ...` is the same path with the real ones.
"""

import argparse
import multiprocessing
import platform
import resource
import tempfile
import time
from pathlib import Path

from _entries import entries, write_result

ARCHITECTURES = {  # sizes as in the configurations that their authors published
    "xlm-roberta-base": dict(kind="XLMRoberta", vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1),
    "LaBSE": dict(kind="Bert", vocab_size=501_153, max_position_embeddings=512, type_vocab_size=2),
}
SIZES = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def make_folder(name: str, folder: Path):
    "A folder as the hub has it: the architecture with random weights, and a tokenizer of XLM-R's kind."
    import torch
    import transformers

    from hybrid_ir.encoders import load_me5_small_q4

    values = dict(ARCHITECTURES[name])
    kind = values.pop("kind")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **values, pad_token_id=1)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    load_me5_small_q4()[1].save_pretrained(folder)


def measure(name: str, steps: int, batch_size: int, query_length: int, passage_length: int, results):
    "Train for a few steps; in a process of its own, so that its memory is its own."
    import torch

    from hybrid_ir.encoders import has_fast_bf16, load_encoder
    from hybrid_ir.pairs import load_pairs
    from hybrid_ir.training import train

    with tempfile.TemporaryDirectory() as folder:
        make_folder(name, Path(folder))
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pairs = load_pairs("parallel_docs", languages=["ar", "de", "en", "es", "hi", "ru", "th", "tr", "zh"])
        encoder = load_encoder(folder, query_length=query_length, passage_length=passage_length)
        size = sum(parameter.numel() for parameter in encoder.parameters())
        embeddings = encoder.backbone.get_input_embeddings().weight.numel()
        result = train(encoder, pairs, progress=True, sampler="hybrid", batch_size=batch_size, steps=steps, heldout=0.0, dropout=0.0)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        gpu_memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    results.put({
        "encoder": name, "parameters": size, "word_embeddings": embeddings, "batch_size": batch_size, "query_length": query_length, "passage_length": passage_length, "steps": steps,
        "pairs_per_second": round(result.pairs_per_second, 2), "seconds_per_step": round(batch_size / result.pairs_per_second, 1), "losses": [round(loss, 3) for loss in result.log["loss"]],
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), "gpu_memory_gib": gpu_memory, "memory_after_loading_gib": round(loaded / 2**20, 2),
        "device": device, "threads": torch.get_num_threads(), "precision": "bf16" if has_fast_bf16(encoder.device) else "fp32", "torch": torch.__version__,
    })  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--query-length", type=int, default=32)
    parser.add_argument("--passage-length", type=int, default=64)
    options = parser.parse_args()
    found, context = [], multiprocessing.get_context("spawn")
    for name in ARCHITECTURES:
        started, results = time.time(), context.Queue()
        process = context.Process(target=measure, args=(name, options.steps, options.batch_size, options.query_length, options.passage_length, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} failed")
        found.append(results.get())
        print(f"{name}: {found[-1]['pairs_per_second']} pairs/s, {found[-1]['peak_memory_gib']} GiB, {time.time() - started:.0f} s in all", flush=True)
    write_result(__file__, [record | {"unit": "pairs per second"} | entries(__file__, ["torch", "transformers"], options) for record in found])


if __name__ == "__main__":
    main()
