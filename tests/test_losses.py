"""InfoNCE against its formula in float64, written as loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hybrid_ir.losses import info_nce


def slow_info_nce(queries, passages, temperature, negatives=None, groups=None, negative_groups=None):
    total = 0.0
    for i, query in enumerate(queries):
        right = math.exp(float(query @ passages[i]) / temperature)
        below = right
        for j, passage in enumerate(passages):
            if j != i and (groups is None or groups[i] != groups[j]):
                below += math.exp(float(query @ passage) / temperature)
        for j, negative in enumerate(negatives if negatives is not None else []):
            if negative_groups is None or groups[i] != negative_groups[j]:
                below += math.exp(float(query @ negative) / temperature)
        total -= math.log(right / below)
    return total / len(queries)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 5), st.sampled_from([0.02, 0.1, 1.0]), st.booleans(), st.integers(0, 1000))
def test_formula(size, n_negatives, temperature, grouped, seed):
    torch.manual_seed(seed)
    queries, passages = F.normalize(torch.randn(2, size, 7, dtype=torch.float64), dim=-1)
    negatives = F.normalize(torch.randn(n_negatives, 7, dtype=torch.float64), dim=-1) if n_negatives else None
    groups = torch.randint(0, size, (size,)) if grouped else None
    negative_groups = torch.randint(0, size, (n_negatives,)) if grouped and n_negatives else None
    loss = info_nce(queries, passages, temperature, negatives, groups, negative_groups)
    assert math.isclose(loss.item(), slow_info_nce(queries, passages, temperature, negatives, groups, negative_groups), rel_tol=1e-9, abs_tol=1e-12)


def test_symmetric_is_the_mean_of_both_directions():
    torch.manual_seed(0)
    queries, passages = F.normalize(torch.randn(2, 6, 7), dim=-1)
    groups = torch.tensor([0, 0, 1, 2, 3, 4])
    both = info_nce(queries, passages, 0.1, groups=groups, symmetric=True)
    one, other = info_nce(queries, passages, 0.1, groups=groups), info_nce(passages, queries, 0.1, groups=groups)
    assert torch.isclose(both, (one + other) / 2)


def test_masked_candidates_get_no_gradient():
    torch.manual_seed(0)
    queries, passages = F.normalize(torch.randn(2, 4, 7), dim=-1)
    passages.requires_grad_()
    groups = torch.tensor([0, 0, 1, 2])
    info_nce(queries[:1].repeat(4, 1), passages, 0.1, groups=groups).backward()
    with_mask = passages.grad.clone()
    passages.grad = None
    info_nce(queries[:1].repeat(4, 1), passages, 0.1).backward()
    assert not torch.allclose(with_mask, passages.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_score(dtype):
    "Cosines in 8 or 11 bits would move the scores by 0.1 at a temperature of 0.02; float64 stays what it is."
    torch.manual_seed(0)
    queries, passages, negatives = F.normalize(torch.randn(3, 16, 64), dim=-1)
    losses = [info_nce(queries, passages, 0.02, negatives)]
    with torch.autocast("cpu", dtype=dtype):
        losses.append(info_nce(queries, passages, 0.02, negatives))
        assert info_nce(queries.double(), passages.double(), 0.02).dtype == torch.float64
    assert losses[0] == losses[1] and losses[1].dtype == torch.float32


def test_errors():
    vectors, groups, three = torch.eye(3), torch.arange(3), r"\[3\]"
    with pytest.raises(ValueError, match="same shape"):
        info_nce(vectors, vectors[:2], 0.1)
    for temperature in (0, -1, float("nan"), "a", None):
        with pytest.raises(ValueError, match="temperature must be a positive number, not"):
            info_nce(vectors, vectors, temperature)
    for wrong, message in [
        (dict(groups=torch.tensor([0])), rf"groups must have the shape {three}, a number for each query, not \(1,\)"),
        (dict(groups=groups[:, None]), rf"groups must have the shape {three}.*not \(3, 1\)"),
        (dict(negatives=torch.eye(4)), r"negatives must have the shape \[m, 3\].*not \(4, 4\)"),
        (dict(negatives=vectors[0]), r"negatives must have the shape \[m, 3\].*not \(3,\)"),
        (dict(negatives=vectors, groups=groups, negative_groups=groups[:1]), rf"negative_groups must have the shape {three}.*not \(1,\)"),
        (dict(negatives=vectors, negative_groups=groups), "negative_groups need groups"),
        (dict(groups=groups, negative_groups=groups), "negative_groups need negatives"),
    ]:
        with pytest.raises(ValueError, match=message):
            info_nce(vectors, vectors, 0.1, **wrong)
    assert info_nce(vectors, vectors, torch.tensor(0.1)) == info_nce(vectors, vectors, 0.1)  # a temperature that is learned
