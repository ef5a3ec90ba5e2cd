"""The paper's two architectures at full size, random weights, a few hybrid steps: memory and speed.

    python speed/paper_encoders.py [--steps 3] [--query-length 32] [--passage-length 64] [--peer-steps 1]
    python speed/paper_encoders.py --steps 2 --query-length 64 --passage-length 256 --peer-steps 0

Random weights take the same time and memory as trained ones; `papermill nbs/run.ipynb OUT.ipynb -p encoder xlm-roberta-base ...` is the same path with the real ones.
sentence-transformers does the same steps (--peer-steps of them, 0 for none) in the same precision. Every run is a process of its own. Seconds are those of the clock: run this alone.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/paper_encoders.json; with passages of more than 64 tokens, their number is added to the name.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from _entries import compared, entries, measure, memory, write_result

ARCHITECTURES = {  # sizes as in the configurations that their authors published
    "xlm-roberta-base": dict(kind="XLMRoberta", vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1),
    "LaBSE": dict(kind="Bert", vocab_size=501_153, max_position_embeddings=512, type_vocab_size=2),
}
SIZES = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def make_folder(name: str, folder: Path):
    "A folder as the hub has it: the architecture with random weights, and a tokenizer of XLM-R's kind."
    import transformers

    from hybrid_ir.encoders import load_me5_small_q4

    values = dict(ARCHITECTURES[name])
    kind = values.pop("kind")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **values, pad_token_id=1)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    load_me5_small_q4()[1].save_pretrained(folder)


def our_steps(folder: Path, batch_size: int, steps: int, lengths: tuple[int, int]) -> dict:
    "Train for a few steps."
    from training_and_encoding import complete_pairs

    from hybrid_ir.encoders import choose_precision, load_encoder
    from hybrid_ir.training import train

    pairs, encoder = complete_pairs(2 * batch_size), load_encoder(str(folder), query_length=lengths[0], passage_length=lengths[1])
    size, embeddings = sum(parameter.numel() for parameter in encoder.parameters()), encoder.backbone.get_input_embeddings().weight.numel()
    loaded = memory("VmRSS")
    result = train(encoder, pairs, progress=False, sampler="hybrid", batch_size=batch_size, steps=steps, heldout=0.0, dropout=0.0)
    return {
        "parameters": size, "word_embeddings": embeddings, "memory_after_loading_gib": round(loaded, 2), "threads": torch.get_num_threads(), "pairs_per_second": round(result.pairs_per_second, 2), "seconds_per_step": round(batch_size / result.pairs_per_second, 1),
        "losses": [round(loss, 3) for loss in result.log["loss"]], "gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "precision": choose_precision(encoder.precision, encoder.device),
    }  # fmt: skip


def peer_steps(folder: Path, batch_size: int, steps: int, length: int, precision: str) -> dict:
    "The same by sentence-transformers' trainer; it has one length for both kinds of text."
    from training_and_encoding import complete_pairs, peer_training

    from hybrid_ir.samplers import BatchSampler

    pairs = complete_pairs(2 * batch_size)
    sampler = BatchSampler(pairs, "hybrid", batch_size=batch_size)
    seconds = peer_training(str(folder), pairs, [sampler.next_batch() for _ in range(steps)], precision == "bf16", length=length)
    return {"pairs_per_second": round(batch_size * steps / seconds, 2), "seconds_per_step": round(seconds / steps, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--query-length", type=int, default=32)
    parser.add_argument("--passage-length", type=int, default=64)
    parser.add_argument("--peer-steps", type=int, default=1)
    options = parser.parse_args()
    found, comparisons = [], []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            measure(make_folder, name, Path(folder))
            ours = measure(our_steps, Path(folder), options.batch_size, options.steps, (options.query_length, options.passage_length))
            found.append({"encoder": name, "batch_size": options.batch_size, "query_length": options.query_length, "passage_length": options.passage_length, "steps": options.steps} | ours)
            if options.peer_steps:
                peer = measure(peer_steps, Path(folder), options.batch_size, options.peer_steps, options.passage_length, ours["precision"])
                who = f"sentence-transformers {ours['precision']}"
                comparisons.append(compared(f"training {name}", "pairs per second", ours["pairs_per_second"], who, peer["pairs_per_second"]))
                comparisons.append(compared(f"training {name}, memory", "GiB", ours["peak_memory_gib"], who, peer["peak_memory_gib"]))
        name = f"paper_encoders_{options.passage_length}" if options.passage_length > 64 else ""
        write_result(__file__, {"comparisons": comparisons, "encoders": found} | entries(__file__, ["torch", "transformers", "sentence-transformers"], options), name)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
