"""What is quicker on a processor gives what the usual networks give: attention, dropout, encoding without padding."""

import os
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hybrid_ir import processor
from hybrid_ir.encoders import autocast, choose_precision, load_encoder
from hybrid_ir.pairs import load_pairs
from hybrid_ir.processor import Attention, Dropout, FeedForward, Int8FeedForward, Int8Linear, Join, Linear, PackedBert, attention_by_products, can_be_packed, drop, join_over, quicken_training, rectangles, shared_sizes
from hybrid_ir.training import Towers, set_dropout, train


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


TEXTS = ["one", "two words", "การทดสอบภาษาไทย", "a much longer text " * 30, "one", "и ещё один", "x" * 400]


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_that_of_pytorch(padded):
    torch.manual_seed(0)
    given = [torch.randn(3, 4, 9, 8, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(3, 1, 9, 9)
    mask[1, :, :, 5:] = mask[2, :, :, 1:] = torch.finfo(torch.float32).min
    mask = mask if padded else None
    ours, _ = attention_by_products(torch.nn.Module(), *given, mask)
    usual = F.scaled_dot_product_attention(*given, attn_mask=mask).transpose(1, 2)
    assert torch.allclose(ours, usual, atol=1e-6)
    wish = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, given, wish), torch.autograd.grad(usual, given, wish), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_attention_drops_in_training_only():
    module, given = torch.nn.Module(), [torch.randn(2, 2, 5, 4) for _ in range(3)]
    kept, _ = attention_by_products(module.eval(), *given, None, dropout=0.5)
    dropped, _ = attention_by_products(module.train(), *given, None, dropout=0.5)
    assert torch.equal(kept, attention_by_products(module.train(), *given, None)[0]) and not torch.equal(kept, dropped)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.integers(0, 2**31))
def test_dropout_of_any_size_and_type(size, share, dtype, seed):
    torch.manual_seed(seed)
    values = torch.randn(size).to(dtype) + 10
    torch.manual_seed(seed)
    dropped = drop(values, share)
    torch.manual_seed(seed)
    assert torch.equal(drop(values, share), dropped)  # the same seed, the same places
    kept = dropped != 0
    assert dropped.dtype == dtype and dropped.shape == values.shape
    assert torch.allclose(dropped[kept].double(), values[kept].double() / (1 - share), rtol=1e-2)
    assert abs(float((~kept).double().mean()) - share) < 5 * (max(share * (1 - share), 1e-9) / max(size, 1)) ** 0.5 + 1e-3 if size else True


def test_places_of_dropout_are_independent():
    torch.manual_seed(0)
    first, second = drop(torch.ones(400, 500), 0.5) != 0, drop(torch.ones(400, 500), 0.5) != 0
    n = first.numel()
    for one, other in ((first, second), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first[:, 4:], first[:, :-4])):
        agreement = float((one == other).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / n**0.5 + 1e-3


def test_dropout_passes_the_gradient_of_what_was_kept():
    values = torch.randn(50, 7, requires_grad=True)
    dropped = drop(values, 0.3)
    dropped.sum().backward()
    assert torch.equal(values.grad != 0, dropped != 0) and torch.allclose(values.grad[dropped != 0], torch.tensor(1 / 0.7))


def test_dropout_falls_on_the_same_places_when_a_part_is_computed_again():
    layer, values = Dropout(0.4).train(), torch.randn(30, 11, requires_grad=True)
    dropped = checkpoint(layer, values, use_reentrant=False)
    dropped.sum().backward()
    assert torch.equal(values.grad != 0, dropped != 0)


def test_a_network_keeps_its_mode_and_its_gradient(folder):
    encoder = padded_encoder(folder)
    tokens = encoder.tokenize(TEXTS, "passage")

    def gradient():
        encoder.zero_grad()
        (encoder.embed_tokens(tokens) * torch.linspace(-1, 1, encoder.dim)).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None])

    usual = gradient()
    quicken_training(encoder.backbone)
    quicken_training(encoder.backbone)  # a second time changes nothing
    assert encoder.backbone.config._attn_implementation == "products"
    assert {type(module) for module in encoder.modules() if isinstance(module, torch.nn.Dropout)} == {Dropout}
    assert not any(module.training for module in encoder.modules())
    assert (gradient() - usual).norm() < 1e-5 * usual.norm()


def test_training_gives_the_attention_back(folder):
    encoder = load_encoder(str(folder), device="cpu", precision="fp32", query_length=16, passage_length=16)
    train(encoder, load_pairs("sample", languages=["de", "en"]), batch_size=4, steps=2, heldout=0, progress=False)
    assert encoder.backbone.config._attn_implementation == "sdpa"


def padded_encoder(folder, **options):
    "An encoder whose texts go through the network of transformers in float32, with padding."
    encoder = load_encoder(str(folder), device="cpu", precision="fp32", **options)
    assert encoder.packs()
    encoder.packs = lambda: False
    return encoder


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16, not fused"])
def test_packed_vectors_are_those_of_the_network(folder, pooling, precision):
    encoder, error = load_encoder(str(folder), device="cpu", precision=precision[:4], pooling=pooling), 1e-6 if precision == "fp32" else 5e-4
    with mock.patch.object(processor, "FUSED", "not" not in precision and processor.FUSED), mock.patch.object(encoder, "pad", side_effect=AssertionError("no padding is needed")):
        packed = encoder.encode(TEXTS, "passage")
    usual = padded_encoder(folder, pooling=pooling).encode(TEXTS, "passage")
    assert (packed * usual).sum(1).min() > 1 - error and np.abs(np.linalg.norm(packed, axis=1) - 1).max() < 1e-5
    assert np.array_equal(packed[0], packed[4])


SIZES = st.integers(1, 40), st.integers(2, 70), st.integers(1, 30), st.sampled_from([0.0, 1e-20, 1.0, 1e20]), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31)


def rounded(part: torch.Tensor) -> torch.Tensor:
    "Rows of float64 numbers as whole multiples of a step, at most 127."
    step = part.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (part / step).round() * step


@settings(max_examples=40, deadline=None)
@given(*SIZES)
def test_a_layer_of_int8_is_the_product_of_rounded_numbers(rows, dim, out, size, dtype, seed):
    "Beside the same rounding by PyTorch in float64, with columns of very different size. (With a single column, PyTorch 2.13 multiplies wrongly where the processor has VNNI; no network has one.)"
    torch.manual_seed(seed)
    numbers = (torch.randn(rows, dim) * torch.logspace(-2, 2, dim) * size).to(dtype)
    weight, bias = torch.randn(out, dim).to(dtype), (torch.randn(out) * size).to(dtype)
    sizes = shared_sizes(numbers, weight)
    found = Int8Linear(weight, bias, sizes)(numbers)
    usual = rounded(numbers.double() / sizes) @ rounded(weight.double() * sizes).T + bias.double()
    assert found.dtype == dtype
    assert ((found - usual).abs().amax(1) <= 0.015 * usual.abs().amax(1) + 1e-30).all()  # bfloat16, and numbers between two steps


@settings(max_examples=40, deadline=None)
@given(*SIZES[:3], st.integers(0, 20), *SIZES[4:])
def test_int8_with_gelu_rounds_all_columns_but_those_apart(rows, dim, out, apart, dtype, seed):
    torch.manual_seed(seed)
    inner = 40
    numbers, (up, down), biases = torch.randn(rows, dim), (torch.randn(inner, dim).to(dtype), torch.randn(out, inner).to(dtype)), (torch.randn(inner).to(dtype), torch.randn(out).to(dtype))
    up[:apart] *= 30
    found = Int8FeedForward(Int8Linear(up, biases[0], torch.ones(dim)), Int8Linear(down, biases[1], torch.ones(inner), apart))(numbers)
    values = F.gelu(rounded(numbers.double()) @ rounded(up.double()).T + biases[0].double())
    weight = torch.cat([down[:, :apart].double(), rounded(down[:, apart:].double())], 1)
    usual = values @ weight.T + biases[1].double()
    step = (values[:, apart:].amax(1, keepdim=True).clamp(min=0) + 0.17) / 252
    wrong = 0.6 * step * down.double().abs().sum(1) + (0.01 if dtype == torch.bfloat16 else 1e-5) * (values.abs() @ down.double().abs().T + 1)  # half a step for each column
    assert found.dtype == dtype and ((found - usual).abs() <= wrong).all()


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_with_gelu_stays_finite(size, dtype):
    torch.manual_seed(0)
    numbers, up, down = torch.randn(9, 12) * torch.logspace(-2, 2, 12) * size, torch.randn(40, 12).to(dtype), torch.randn(5, 40).to(dtype)
    layer = Int8FeedForward(Int8Linear(up, torch.zeros(40), shared_sizes(numbers, up)), Int8Linear(down, torch.zeros(5), torch.ones(40), 4))
    found, usual = layer(numbers).double(), F.gelu(numbers.double() @ up.double().T) @ down.double().T
    assert torch.isfinite(found).all() and ((found - usual).abs() <= 0.04 * usual.abs().amax(1, keepdim=True) + 0.1).all()


def test_a_layer_of_int8_with_columns_of_zeros():
    layer = Int8Linear(torch.zeros(3, 5), torch.ones(3), torch.ones(5))
    assert torch.equal(layer(torch.zeros(2, 5)), torch.ones(2, 3)) and torch.equal(layer(torch.randn(2, 5)), torch.ones(2, 3))
    assert shared_sizes(torch.zeros(2, 5), torch.zeros(3, 5)).tolist() == [1.0] * 5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_vectors_in_int8_are_nearly_those_of_the_network(folder, pooling, rest, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True, "avx512_bf16": rest == "bf16"}, raising=False)
    other, int8 = (load_encoder(str(folder), device="cpu", precision=precision, pooling=pooling) for precision in (rest, "int8"))
    usual, half, found = (encoder.encode(TEXTS, "passage") for encoder in (padded_encoder(folder, pooling=pooling), other, int8))
    assert (found * usual).sum(1).min() > 0.999 and not np.array_equal(found, half)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert (found * np.concatenate([int8.encode([text], "passage") for text in TEXTS])).sum(1).min() > 0.9995  # company does not matter
    with torch.no_grad(), autocast(int8.device, "int8"):
        assert (int8.embed_tokens(int8.tokenize(TEXTS, "passage")).numpy() * found).sum(1).min() > 0.9999
    with autocast(int8.device, "int8"):  # with gradients, nothing is in int8
        vectors = int8.embed_tokens(int8.tokenize(TEXTS, "passage"))
    assert vectors.requires_grad and (vectors.detach().numpy() * half).sum(1).min() > 0.9999


def test_real_weights_in_int8():
    "Columns of very different size, as networks have them after training."
    texts = [f"{word} {text[:100]}" for text in TEXTS[:3] for word in ("Why", "पर")]
    usual, found = (load_encoder("me5-small-q4", device="cpu", precision=precision).encode(texts) for precision in ("fp32", "int8"))
    assert (found * usual).sum(1).min() > 0.9995


def test_what_cannot_be_in_int8_says_so(folder):
    with pytest.raises(ValueError, match="use-multilingual-v3.*int8.*valid: auto, fp32, bf16"):
        load_encoder("use-multilingual-v3", device="cpu", precision="int8")
    with pytest.raises(ValueError, match="int8.*for the device cpu, not cuda; valid there: auto, fp32, bf16"):
        choose_precision("int8", torch.device("cuda"))
    encoder = load_encoder(str(folder), device="cpu", precision="int8")
    with pytest.raises(ValueError, match="int8.*encoding only.*auto, fp32, bf16"):
        train(encoder, load_pairs("sample", languages=["de", "en"]), batch_size=4, steps=2, heldout=0, progress=False)


@pytest.mark.parametrize("fast", [True, False])
def test_int8_warns_where_it_is_slow(folder, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": fast}, raising=False)
    with pytest.warns(UserWarning, match="slower than in 'fp32'") if not fast else nullcontext():
        load_encoder(str(folder), device="cpu", precision="int8")


def test_company_and_order_do_not_matter(folder):
    encoder = load_encoder(str(folder), device="cpu", precision="bf16")
    together = encoder.encode(TEXTS)
    assert (together * np.concatenate([encoder.encode([text]) for text in TEXTS])).sum(1).min() > 0.9995
    assert (together[::-1] * encoder.encode(TEXTS[::-1])).sum(1).min() > 0.9995


def test_what_cannot_be_packed_is_padded(folder):
    encoder = load_encoder(str(folder), device="cpu", precision="bf16")
    encoder.backbone.config.hidden_act = "relu"
    assert not can_be_packed(encoder.backbone)
    with mock.patch.object(PackedBert, "__init__", side_effect=AssertionError("not to be packed")):
        assert encoder.encode(TEXTS).shape == (len(TEXTS), encoder.dim)
    assert not can_be_packed(load_encoder("use-multilingual-v3", device="cpu").backbone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_that_of_pytorch_for_every_bfloat16(dtype):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers, rounding = numbers[numbers.abs() < 1e4].to(dtype), 0.004 if dtype == torch.bfloat16 else 3e-6
    values, again, slopes = torch.empty_like(numbers), torch.empty_like(numbers), torch.ones_like(numbers)
    processor.on_rows(processor.gelu, 1, len(numbers), processor.bits_of(numbers), processor.bits_of(values))
    processor.on_rows(processor.gelu_back, 1, len(numbers), *map(processor.bits_of, (numbers, slopes, again)))
    exact = numbers.float().requires_grad_()
    usual = F.gelu(exact)
    (usual_slopes,) = torch.autograd.grad(usual.sum(), exact)
    assert torch.equal(values, again)
    assert torch.allclose(values.float(), usual, rtol=rounding, atol=2e-6)
    assert torch.allclose(slopes.float(), usual_slopes, rtol=rounding, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 9), st.sampled_from([2, 16]), st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_attention_of_rectangles_is_that_of_pytorch(lengths, others, head_width, spread, dtype, seed):
    torch.manual_seed(seed)
    heads, width, n = 2, 2 * head_width, sum(lengths)
    projected = (torch.randn(n + others, 3 * width) * spread).to(dtype).requires_grad_()
    exact = projected.detach()[:n].float().requires_grad_()
    parts = [part.view(len(part), 3, heads, head_width).permute(1, 2, 0, 3) for part in exact.split(lengths)]
    usual = torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1).reshape(-1, width) for part in parts])
    found, wish = Attention.apply(projected, rectangles(np.array(lengths)), heads, 0.0), torch.randn(n + others, width)
    (gradient,), (usual_gradient,) = (torch.autograd.grad((values * wish[: len(values)]).sum(), source) for values, source in ((found, projected), (usual, exact)))
    rounding = 0.02 + 0.01 * spread if dtype == torch.bfloat16 else 1e-5 * (1 + spread)  # scores are of that type
    assert (found[:n] - usual).norm() < rounding * usual.norm() and not found[n:].any()
    assert (gradient[:n] - usual_gradient).norm() < 3 * rounding * usual_gradient.norm() + (1e-3 if dtype == torch.bfloat16 else 1e-6) and not gradient[n:].any()


def parts_of_a_layer(share: float, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    "What attention, the feed-forward part and the join of a layer make of 300 texts, with their gradients."
    torch.manual_seed(seed)
    projected, tokens, weights = torch.randn(6000, 48), torch.randn(6000, 16), [torch.randn(shape) for shape in ((64, 16), (64,), (16, 64), (16,))]
    given = [part.to(dtype).requires_grad_() for part in (projected, tokens, *weights)] + [part.requires_grad_() for part in (torch.randn(6000, 16), torch.randn(16), torch.randn(16))]
    attended = Attention.apply(given[0], rectangles(np.repeat([25, 35], 100)), 2, share)
    rounding = dtype != torch.float32
    hidden, rounded = Join.apply(attended + FeedForward.apply(*given[1:6]), *given[6:], 1e-5, share, rounding)
    wish = torch.randn(6000, 16)
    return [hidden, rounded, *torch.autograd.grad(((hidden + rounded if rounding else hidden) * wish).sum(), given)]


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(share, dtype):
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with mock.patch.object(processor, "workers", side_effect=AssertionError("one thread needs no others")):
            alone = parts_of_a_layer(share, dtype, 0)
        torch.set_num_threads(3)
        with mock.patch.object(processor, "workers", side_effect=processor.workers) as asked:
            together = parts_of_a_layer(share, dtype, 0)
        assert asked.called
    finally:
        torch.set_num_threads(usual)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2)
    assert torch.allclose(alone[0], together[0], atol=1e-4)


def test_dropped_attention_and_joins_have_the_gradient_of_the_masks_they_drew():
    "A function whose masks depend on the seed alone is compared with its difference quotient."
    torch.manual_seed(0)
    projected, around = torch.randn(30, 48).bfloat16(), torch.randn(30, 16)
    gain, offset, wish = torch.rand(16) + 0.5, torch.randn(16), torch.randn(30, 16)

    def value(projected, around):
        torch.manual_seed(1)
        made = Attention.apply(projected, rectangles(np.array([17, 13])), 2, 0.3)
        return (Join.apply(made, around, gain, offset, 1e-5, 0.3, False)[0] * wish).sum()

    given = projected.clone().requires_grad_(), around.clone().requires_grad_()
    gradients = torch.autograd.grad(value(*given), given)
    direction = torch.randn(30, 16)
    slope = (value(projected, around + 1e-2 * direction) - value(projected, around - 1e-2 * direction)) / 2e-2
    assert abs(slope - (gradients[1] * direction).sum()) < 0.02 * slope.abs() + 0.05
    direction = torch.randn(30, 48)
    slope = (value((projected + 0.2 * direction).bfloat16(), around) - value((projected - 0.2 * direction).bfloat16(), around)) / 0.4
    assert abs(slope - (gradients[0] * direction).sum()) < 0.1 * gradients[0].float().norm() * direction.norm() / 10


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_join_without_gradients_takes_the_place_of_what_goes_around(dtype, error):
    torch.manual_seed(0)
    made, around, gain, offset = torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype), torch.rand(8), torch.randn(8)
    usual = F.layer_norm(made.float() + around.float(), (8,), gain, offset)
    before = around.clone()
    hidden, _ = Join.apply(made, around, gain, offset, 1e-5, 0.0, False)
    assert torch.allclose(hidden.float(), usual, atol=error) and torch.equal(around, before)  # the way back may need it
    found = join_over(made, around, gain, offset, 1e-5)
    assert found is around and torch.allclose(found.float(), usual, atol=error)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_linear_layer_has_the_gradient_of_pytorch(dtype, error):
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((9, 8), (5, 8), (5,))]
    wish = torch.randn(9, 5)
    for one, other in zip(*(torch.autograd.grad((layer(*given) * wish).sum(), given) for layer in (Linear.apply, F.linear)), strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=error, atol=error)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_gradients_are_those_of_the_network(folder, pooling):
    def gradient(precision, portions=False):
        encoder = padded_encoder(folder, pooling=pooling) if precision is None else load_encoder(str(folder), device="cpu", precision=precision, pooling=pooling)
        tokens, wish = encoder.tokenize(TEXTS, "passage"), torch.linspace(-1, 1, encoder.dim)
        with autocast(encoder.device, encoder.precision):
            assert encoder.packs() == (precision is not None)
            if portions:
                vectors = Towers(encoder)(tokens, mini_batch_size=1)
            else:
                vectors = encoder.embed_tokens(tokens)
            (vectors * wish * torch.arange(len(TEXTS))[:, None]).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None])

    exact = gradient(None)
    for precision, error, of_portions in (("fp32", 1e-5, 1e-5), ("bf16", 0.03, 0.02)):
        packed, in_portions = gradient(precision), gradient(precision, portions=True)
        assert exact.shape == packed.shape and (packed - exact).norm() < error * exact.norm()
        assert (packed - in_portions).norm() < of_portions * exact.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_of_packed_texts_follows_the_seed_and_the_mode(folder, precision):
    encoder = load_encoder(str(folder), device="cpu", precision=precision)
    tokens = encoder.tokenize(TEXTS, "passage")

    def vectors(seed, training):
        torch.manual_seed(seed)
        encoder.train(training)
        with autocast(encoder.device, precision):
            return encoder.embed_tokens(tokens).detach()

    assert torch.equal(vectors(0, True), vectors(0, True)) and not torch.equal(vectors(0, True), vectors(1, True))
    assert torch.equal(vectors(0, False), vectors(1, False))
    mean = torch.stack([vectors(seed, True) for seed in range(100)]).mean(0)
    assert (F.normalize(mean, dim=-1) * vectors(0, False)).sum(1).min() > 0.99  # what is dropped is made up for
    set_dropout(encoder, 0.0)
    assert torch.equal(vectors(0, True), vectors(1, False))


def test_gradients_of_many_portions_are_added_up_in_float32(folder):
    "A hundred portions in bfloat16 give a gradient that is as near to that of float32 as one pass does."
    found = {}
    for precision, portions in (("fp32", None), ("bf16", None), ("bf16", 1)):
        encoder = padded_encoder(folder) if precision == "fp32" else load_encoder(str(folder), device="cpu", precision=precision)
        set_dropout(encoder, 0.0)
        tokens = encoder.tokenize([f"{text[:40]} {number}" for number in range(40) for text in TEXTS[:5]], "passage")
        with autocast(encoder.device, precision):
            assert encoder.packs() == (precision == "bf16")
            (Towers(encoder).train()(tokens, mini_batch_size=portions) * torch.linspace(-1, 1, encoder.dim)).sum().backward()
        found[precision, portions] = torch.cat([parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None])
    exact = found["fp32", None]
    once, often = ((found["bf16", portions] - exact).norm() / exact.norm() for portions in (None, 1))
    assert 0 < once < 0.05 and often < 1.25 * once, (once, often)


# Imports every module, forks, and lets the child compute with torch's threads: that hangs where the parent had started them.
FORK = """
import importlib, os, pkgutil, hybrid_ir
for module in pkgutil.iter_modules(hybrid_ir.__path__):
    importlib.import_module(f"hybrid_ir.{module.name}")
import torch
if process := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
torch.set_num_threads(2)
os._exit(0 if (torch.ones(2**20) * 2).exp().sum() > 0 else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_fork_after_the_import_can_use_torch():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2"})
