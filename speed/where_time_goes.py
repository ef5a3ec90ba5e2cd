"""Where the time of a training step goes, how much of the machine's matrix products it reaches, and what was tried to make training and encoding faster.

    python speed/where_time_goes.py [--steps 4] [--texts 25] [--rounds 2]

The encoder is me5-small-q4, the pairs are those of `training_and_encoding.py`. Floating-point operations are counted by PyTorch; the peak is what one large
product of matrices reaches in the same run and precision. Every variant does the same work, one after the other in each round, and the fastest round of each counts, the first one
left out. All on one thread and in seconds of the processor, so that other work on the machine counts little. What to expect of a variant is computed before it runs: from the padding that it adds, or from the share of the time that it can change. torch.compile needs a C++ compiler.
Needs the data folder (HYBRID_IR_DATA). Writes speed/results/where_time_goes.json, or, on a processor with AMX or without bf16, a file with that in its name.
"""

import argparse
import os
import time
from itertools import groupby
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from _entries import compared, entries, write_result
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_and_encoding import BATCH, LENGTH, complete_pairs, fastest, hybrid_options, matrix_peaks, operations_of_products, sample_texts

from hybrid_ir import processor, training
from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import autocast, choose_precision, has_fast_int8, length_chunks, load_encoder

CPU = torch.device("cpu")


class Clock:
    "Adds up the seconds of some functions."

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def watch(self, owner, name: str, part: str):
        "Replace a function or method by one whose calls count as this part."
        inner = getattr(owner, name)

        def timed(*arguments, **options):
            started = time.process_time()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - started

        setattr(owner, name, timed)


def make_trainer(pairs, encoder=None) -> training.Trainer:
    "A trainer with the dropout of the encoder, as it comes."
    return training.Trainer(encoder or short_encoder(), pairs, hybrid_options(1000), None, False)


def short_encoder():
    "The encoder, with short texts."
    return load_encoder("me5-small-q4", device="cpu", query_length=LENGTH, passage_length=LENGTH)


def operations_of_linear(tokens: tuple[int, ...], weight: tuple[int, ...], *others, **options) -> int:
    "Operations of a product that oneDNN adds a bias to, from the shapes; PyTorch does not count these."
    return 2 * int(np.prod(tokens)) * weight[0]


def training_parts(pairs, steps: int) -> tuple[dict, float]:
    "Milliseconds of a step by part, and the operations of a step."
    encoder, started = short_encoder(), time.process_time()
    trainer = make_trainer(pairs, encoder)
    tokenising = (time.process_time() - started) / len(pairs) * BATCH  # if every pair is used once
    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: operations_of_linear}) as counter:
        trainer.step()
    clock = Clock()
    clock.watch(training, "batch_loss", "forward")
    clock.watch(trainer.accelerator, "backward", "backward")
    clock.watch(trainer.optimizer, "step", "optimiser")
    clock.watch(trainer.feed, "next", "waiting for tokens")
    started = time.process_time()
    for _ in range(steps):
        trainer.step()
    whole, seconds = time.process_time() - started, dict(clock.seconds)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trainer.step()
    embedding = sum(event.cpu_time_total for event in profiler.key_averages() if event.key == "aten::embedding_dense_backward") / 1e6
    trainer.feed.close()
    parts = {
        "forward": seconds["forward"], "backward, without word embeddings": seconds["backward"] - embedding, "gradient of word embeddings": embedding,
        "optimiser": seconds["optimiser"], "waiting for tokens": seconds["waiting for tokens"], "the rest": whole - sum(seconds.values()),
    }  # fmt: skip
    milliseconds = {name: round(1000 * part / steps, 1) for name, part in parts.items()} | {"tokenising, once for all passes": round(1000 * tokenising, 1)}
    return milliseconds, counter.get_total_flops() / (whole / steps)


def padded_tokens(tokens: list[np.ndarray], chunks: list[np.ndarray]) -> int:
    "Tokens that are computed, padding included."
    return sum(len(chunk) * max(len(tokens[row]) for row in chunk) for chunk in chunks)


def shares(call) -> dict[str, float]:
    "The share of the processor's time that each operation of PyTorch takes in a call."
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return {key: spent / sum(times.values()) for key, spent in times.items()}


def share_of(found: dict[str, float], *names: str) -> float:
    "The share of all operations with one of these words in their name."
    return sum(share for key, share in found.items() if any(name in key for name in names))


def measured(variants: list[dict], rounds: int) -> list[dict]:
    "What was predicted for each variant, and how many times as fast as the first one it is; `run` returns what is compared with the first."
    times, results = [[] for _ in variants], [None] * len(variants)
    for _ in range(rounds + 1):  # the first round compiles, and does not count
        for number, variant in enumerate(variants):
            started = time.process_time()
            results[number] = variant["run"]()
            times[number].append(time.process_time() - started)
    best = [min(seconds[1:]) for seconds in times]
    return [
        {"variant": variant["variant"], "predicted": round(float(variant["predicted"]), 2), "measured": round(best[0] / best[number], 2), "kept": variant["kept"], "predicted from": variant["from"],
         "seconds": round(best[number], 3), "first round, s": round(times[number][0], 1), "result": results[number]}
        for number, variant in enumerate(variants)
    ]  # fmt: skip


def variant(name: str, predicted: float, source: str, run, kept: str) -> dict:
    "A row of a table of what was tried."
    return dict(zip(("variant", "predicted", "from", "run", "kept"), (name, predicted, source, run, kept)))


def trainers(pairs) -> dict[str, training.Trainer]:
    "A trainer for each variant; all draw the same batches."
    found = {"usual": make_trainer(pairs), "padded": make_trainer(pairs), "attention": make_trainer(pairs), "rectangle": make_trainer(pairs)}
    for name in ("padded", "attention", "rectangle"):
        found[name].encoder.packs = lambda: False
    found["attention"].encoder.backbone.set_attn_implementation("sdpa")
    for layer in found["attention"].encoder.backbone.encoder.layer:
        layer.attention.self.dropout.p = 0.0  # PyTorch's fused attention has no dropout on a CPU
    found["rectangle"].encoder.padding_budget = None
    with mock.patch.object(training, "quicken_training", lambda backbone: None):
        found["plain"] = make_trainer(pairs)
    found["plain"].encoder.packs = lambda: False
    with mock.patch.object(training, "TABLE_ROWS", 0):  # no table of tokens, so no small table of word embeddings
        found["stream"] = make_trainer(pairs)
    usual = torch.optim.AdamW
    with mock.patch("torch.optim.AdamW", lambda *given, fused, **options: usual(*given, foreach=True, **options)):
        found["loops"] = make_trainer(pairs)
    return found


def attention_of_pytorch(projected: torch.Tensor, shared: list[tuple], heads: int, share: float) -> torch.Tensor:
    "What `processor.Attention` does, by operations of PyTorch, for the texts of one length at a time: products and softmax with gradients, else its fused attention."
    runs, parts = [(len(list(texts)), int(length)) for length, texts in groupby(np.concatenate([lengths for _, lengths, _ in shared]))], []
    sizes = [texts * length for texts, length in runs]
    for (texts, length), run in zip(runs, projected[: sum(sizes)].split(sizes), strict=True):
        query, key, value = run.view(texts, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        if torch.is_grad_enabled():
            found, _ = processor.attention_by_products(SimpleNamespace(training=True), query, key, value, None, dropout=share)
        else:
            found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        parts.append(found.reshape(texts * length, -1))
    return torch.cat([*parts, projected.new_zeros(len(projected) - sum(sizes), projected.shape[1] // 3)])


def join_of_pytorch(made: torch.Tensor, around: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, eps: float, share: float, rounding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    "What `processor.Join` does, by operations of PyTorch."
    hidden = F.layer_norm(processor.drop(made, share) + around, gain.shape, gain, offset, eps)
    return hidden, hidden.bfloat16() if rounding else hidden[:0]


def feed_forward_of_pytorch(tokens: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor) -> torch.Tensor:
    "What `processor.FeedForward` does, by operations of PyTorch."
    return F.linear(F.gelu(F.linear(tokens, up, up_bias)), down, down_bias)


OF_PYTORCH = {"Attention": attention_of_pytorch, "Join": join_of_pytorch, "FeedForward": feed_forward_of_pytorch, "Linear": F.linear}


def by_pytorch(call, *names: str):
    "A call in which these functions of `hybrid_ir.processor` are operations of PyTorch."

    def run():
        with mock.patch.multiple(processor, **{name: SimpleNamespace(apply=OF_PYTORCH[name]) for name in names}):
            return call()

    return run


def tried_in_training(pairs, rounds: int, precision: str) -> list[dict]:
    "What was tried for a training step."
    bf16 = precision == "bf16"
    found = trainers(pairs)
    usual, encoder = found["usual"], found["usual"].encoder
    for trainer in found.values():
        trainer.step()  # memory, kernels, and for the profiles below
    whole, padded, plain = (shares(found[name].step) for name in ("usual", "padded", "plain"))
    tokens = usual.feed.prepare().texts
    lengths = np.array([len(text) for text in tokens])
    computed = {name: padded_tokens(tokens, length_chunks(lengths, 4 * encoder.token_budget, budget)) for name, budget in (("rectangle", None), ("padded", encoder.padding_budget))}
    dense, sparse = (found[name].encoder.backbone.get_input_embeddings().num_embeddings for name in ("stream", "usual"))
    rest = sum(parameter.numel() for parameter in encoder.parameters())
    adam = share_of(whole, "adamw", "embedding_dense_backward", "linalg_vector_norm")
    random, gelu, casts, softmax = share_of(plain, "bernoulli", "div_"), share_of(padded, "gelu"), share_of(padded, "copy_"), share_of(padded, "softmax")
    norms = share_of(padded, "layer_norm", "aten::add") + casts / 2
    padding = computed["padded"] / lengths.sum()
    packed, why = (1 / padding * (1 - gelu) * (1 - 0.7 * casts), f"padding, and of its time {gelu:.0%} are GELU and {casts:.0%} conversions") if bf16 else (1 / padding, "padding")
    rows = [
        variant("as it is", 1.0, "", usual.step, "yes"),
        variant("padded, with the layers of transformers", packed, why, found["padded"].step, "where packing is not possible"),
        variant("without padding, softmax and dropout of attention by PyTorch", 1 - softmax, f"softmax is {softmax:.0%} of the time with padding", by_pytorch(usual.step, "Attention"), "no"),
        variant("without padding, dropout, sum, norm and rounding one after the other", 1 - norms, f"norms, sums and half of the {'conversions' if bf16 else 'copies'} are {norms:.0%} of it", by_pytorch(usual.step, "Join"), "no"),
        variant("without padding, GELU by PyTorch", 1 - gelu, f"GELU is {gelu:.0%} of it", by_pytorch(usual.step, "FeedForward"), "no: it keeps more"),
        variant("without padding, all of this by PyTorch", (1 - softmax) * (1 - norms) * (1 - gelu), "the three before", by_pytorch(usual.step, *OF_PYTORCH), "no"),
        variant("padded, PyTorch's own attention and dropout", packed * (1 - random), f"random numbers take {random:.0%} of its time", found["plain"].step, "no"),
        variant("padded, PyTorch's own attention without dropout in it, our dropout elsewhere", packed, "the same operations", found["attention"].step, "no"),
        variant("padded, questions as long as passages", packed * computed["padded"] / computed["rectangle"], "tokens with padding", found["rectangle"].step, "no"),
        variant("the full table of word embeddings, dense gradients", 1 / (1 - adam + adam * (1 + (dense - sparse) * encoder.dim / rest)), f"what grows with the weights takes {adam:.0%}", found["stream"].step, "above a million rows only"),
        variant("AdamW in loops of operations", 1.0, "less than a hundredth", found["loops"].step, "no"),
    ]  # fmt: skip
    results = measured(rows, rounds)
    for trainer in found.values():
        trainer.feed.close()
    return [{name: value for name, value in row.items() if name != "result"} for row in results]


def padding_of_a_collection() -> dict:
    "What padding would be left when all passages of XQuAD-R are encoded in one call, with the usual lengths."
    encoder, passages = load_encoder("me5-small-q4", device="cpu"), load_benchmark("xquad_r").passages["text"]
    tokens = encoder.tokenize(passages, "passage")
    lengths = np.array([len(text) for text in tokens])
    return {"passages": len(passages), "share": round(float(1 - lengths.sum() / padded_tokens(tokens, length_chunks(lengths, encoder.token_budget))), 4)}


def int8_gain(rounds: int, precision: str) -> float:
    "How many times as fast one layer of weights is in int8."
    layer, vectors, seconds = torch.nn.Sequential(torch.nn.Linear(384, 1536)), torch.rand(2048, 384), []
    for module, how in ((layer, precision), (torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8), "fp32")):
        with autocast(CPU, how):
            seconds.append(fastest(lambda: module(vectors), rounds))
    return seconds[0] / seconds[1]


def int8_products(rounds: int, dtype: torch.dtype) -> float:
    "How many times as fast a product is in int8 as in another type, without rounding and scaling."
    numbers, weights = (torch.randint(-127, 128, (rows, 384), dtype=torch.int8) for rows in (2048, 1536))
    others, bias = (numbers.to(dtype), weights.to(dtype)), torch.zeros(1536, dtype=dtype)
    return fastest(lambda: processor.product(*others, bias), rounds) / fastest(lambda: torch._int_mm(numbers, weights.T), rounds)


def slower_attention(rounds: int, dtype: torch.dtype) -> float:
    "How many times as long a product of attention takes for texts of 61 tokens as for the same number of 64."
    seconds = []
    for length in (61, 64):
        query = torch.rand(288, length, 32).to(dtype)
        seconds.append(fastest(lambda: torch.bmm(query, query.transpose(1, 2)), rounds))
    return seconds[0] / seconds[1]


def slower_gelu(rounds: int) -> float:
    "How many times as long a layer up takes with GELU in a loop of its own, in bf16."
    tokens, weight, bias = torch.rand(2048, 384).bfloat16(), torch.rand(1536, 384).bfloat16(), torch.rand(1536).bfloat16()
    down, nothing = torch.zeros(1, 1536).bfloat16(), torch.zeros(1).bfloat16()
    return fastest(lambda: processor.FeedForward.apply(tokens, weight, bias, down, nothing), rounds) / fastest(lambda: processor.product(tokens, weight, bias, "gelu"), rounds)


def encoding_variants(texts: list[str], rounds: int, peaks: dict[str, float]) -> list[dict]:
    "What was tried for encoding."
    usual, fp32, quantised, compiled, whole = (load_encoder("me5-small-q4", device="cpu", precision=precision, passage_length=LENGTH) for precision in ("auto", "fp32", "fp32", "auto", "fp32"))
    precision = choose_precision("auto", CPU)
    quantised.backbone = torch.ao.quantization.quantize_dynamic(quantised.backbone, {torch.nn.Linear}, dtype=torch.qint8)
    compiled.backbone.compile(dynamic=True)
    whole.backbone.bfloat16()
    tokens = usual.tokenize(texts, "passage", LENGTH)
    lengths = np.array([len(text) for text in tokens])
    chunks = length_chunks(lengths, 2048)

    def padded(encoder) -> np.ndarray:
        "Texts in rectangles, through the network of transformers."
        with torch.inference_mode(), autocast(CPU, choose_precision(encoder.precision, CPU)):
            vectors = [encoder(*encoder.pad([tokens[row] for row in chunk])) for chunk in chunks]
        return torch.cat(vectors).float().numpy()[np.argsort(np.concatenate(chunks))]

    def with_budget(budget: int):
        encoder = load_encoder("me5-small-q4", device="cpu", passage_length=LENGTH)
        encoder.token_budget, encoder.padding_budget = budget, budget // 4
        return lambda: encoder.encode(texts, "passage", progress=False)

    def patched(name: str, value):
        encoder = load_encoder("me5-small-q4", device="cpu", passage_length=LENGTH)  # it is packed anew

        def run() -> np.ndarray:
            with mock.patch.object(processor, name, value):
                return encoder.encode(texts, "passage", progress=False)

        return run

    found = shares(lambda: padded(usual))
    products, elsewhere = share_of(found, "addmm", "aten::mm", "bmm", "attention"), share_of(found, "copy_", "gelu", "aten::add")
    slow = share_of(shares(lambda: padded(fp32)), "addmm", "aten::mm")
    weights, gain, fused = share_of(found, "addmm", "aten::mm"), int8_gain(rounds, precision), share_of(found, "attention")
    saved = lengths.sum() / padded_tokens(tokens, chunks)
    rows = [variant("as it is", 1.0, "", lambda: usual.encode(texts, "passage", progress=False), "yes")]
    if precision == "bf16":
        rows += [
            variant("padded, with the layers of transformers (bf16 by autocast)", saved * (1 - 0.8 * elsewhere), f"padding, and {elsewhere:.0%} of its time are conversions, sums and GELU", lambda: padded(usual), "where packing is not possible"),
            variant("the same with the whole network in bf16", saved * (1 - 0.5 * elsewhere), "half of these", lambda: padded(whole), "no"),
            variant("fp32", 1 / (slow * peaks["bf16"] / peaks["fp32"] + 1 - slow), f"{slow:.0%} of its time are products of weights, {peaks['bf16'] / peaks['fp32']:.1f} times as slow", lambda: fp32.encode(texts, "passage", progress=False), "precision=\"fp32\""),
        ]  # fmt: skip
    else:
        rows.append(variant("padded, with the layers of transformers", saved, "padding", lambda: padded(usual), "where packing is not possible"))
    if has_fast_int8(CPU):
        faster = int8_products(rounds, torch.bfloat16 if precision == "bf16" else torch.float32)
        int8 = load_encoder("me5-small-q4", device="cpu", precision="int8", passage_length=LENGTH)
        rows.append(variant("products of weights in int8", 1 / (1 - weights + weights / faster), f"one product {faster:.1f} times as fast, {weights:.0%} of the time", lambda: int8.encode(texts, "passage", progress=False), 'precision="int8"'))
    packed = shares(rows[0]["run"])
    attention, up = share_of(packed, "bmm"), share_of(packed, "linear") / 3
    if processor.FUSED and precision == "bf16":
        rows.append(variant("GELU in a loop of its own", 1 / (1 + up * (slower_gelu(rounds) - 1)), f"about {up:.0%} of the time is the layer up", patched("FUSED", False), "in training"))
    rows += [
        variant("attention with lengths as they are", 1 / (1 + attention * (slower_attention(rounds, torch.bfloat16 if precision == "bf16" else torch.float32) - 1)), f"products of attention are {attention:.0%} of the time", patched("ROOM", 1), "no"),
        variant("PyTorch's fused attention", 1 - fused, f"at least: {fused:.0%} of the time with padding", by_pytorch(rows[0]["run"], "Attention"), "no"),
        variant("16,384 tokens at a time", 1.0, "", with_budget(16_384), "no"),
        variant("512 tokens at a time", 1.0, "", with_budget(512), "no"),
        variant("torch.compile of the padded network, shapes free", saved / products * (1 - 0.8 * elsewhere), f"at most: {products:.0%} of its time are products", lambda: padded(compiled), "no: needs a C++ compiler"),
        variant("int8 weights, quantised as they run, padded", saved / (1 - weights + weights / gain), f"one layer {gain:.1f} times as fast, {weights:.0%} of the time", lambda: padded(quantised), "no: other vectors"),
    ]  # fmt: skip
    return rows


def tried_in_encoding(texts: list[str], rounds: int, peaks: dict[str, float]) -> list[dict]:
    "The variants of encoding, with texts per second and how near the vectors are to those of the first."
    found = measured(encoding_variants(texts, rounds, peaks), rounds)
    first = found[0]["result"]
    return [
        {name: value for name, value in row.items() if name != "result"} | {"texts per second": round(len(texts) / row["seconds"], 1), "smallest cosine": round(float((first * row["result"]).sum(1).min()), 4)}
        for row in found
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--texts", type=int, default=25, help="passages of each language")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs, texts = complete_pairs(), sample_texts(options.texts)[0]
    peaks = matrix_peaks(options.rounds)
    used = list(peaks)[-1]
    parts, rate = training_parts(pairs, options.steps)
    encoding = tried_in_encoding(texts, options.rounds, peaks)
    encoding_rate = operations_of_products(short_encoder(), texts, "passage") / encoding[0]["seconds"]
    results = {
        "comparisons": [compared(work, "operations per second", found, f"one large product in {used}", peaks[used]) for work, found in (("a training step", rate), ("encoding", encoding_rate))],
        "milliseconds of a step": parts, "batch": BATCH, "precision": used, "operations a second": {"training": round(rate / 1e9, 1), **{f"one large product, {name}": round(peak / 1e9, 1) for name, peak in peaks.items()}},
        "share of the peak": round(rate / peaks[used], 2), "share of the peak in encoding": round(encoding_rate / peaks[used], 2), "training": tried_in_training(pairs, options.rounds, used), "encoding": encoding, "texts": len(texts),
        "padding of a collection": padding_of_a_collection(),
    }  # fmt: skip
    write_result(__file__, results | entries(__file__, ["torch", "transformers"], options), by_precision=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
