"""Attention with a soft span: two executions against one plain reference."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import (
    EXPLICIT_UP_TO,
    SharedSpan,
    banded_attention,
    causal_distance,
    masked_attention,
    span_log_weight,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(seq, *, replicas=2, batch=2, heads=3, head_dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, replicas, batch, heads, seq, head_dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in (q, k, v)]


def reference(q, k, v, span, ramp):
    """Query by query, weighing exp(logit) by m(d) outside of any softmax."""
    out = torch.zeros_like(v)
    for i in range(q.shape[-2]):
        total, weighed = 0.0, 0.0
        for j in range(i + 1):
            m = min(1.0, max(0.0, (span + ramp - (i - j)) / ramp))
            e = m * torch.exp((q[..., i, :] * k[..., j, :]).sum(-1) / math.sqrt(q.shape[-1]))
            total = total + e
            weighed = weighed + e[..., None] * v[..., j, :]
        out[..., i, :] = weighed / total[..., None]
    return out


def bias(seq, spans, ramp, dtype=torch.float64):
    distance = causal_distance(seq, device=torch.device("cpu"), dtype=dtype)
    return span_log_weight(distance, torch.tensor(spans, dtype=dtype), ramp)[:, None]


def gradients(out, inputs):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), inputs)


def assert_same(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("span", "ramp"), [(1.0, 1.0), (2.0, 1.5), (3.7, 2.0), (9.0, 4.0), (13.0, 1.0)]
)
def test_both_executions_equal_a_loop_over_queries_and_keys(span, ramp):
    q, k, v = (x.detach() for x in draw(13))
    wanted = reference(q, k, v, span, ramp)
    assert_same([masked_attention(q, k, v, bias(13, [span] * 2, ramp))], [wanted], 1e-10)
    assert_same([banded_attention(q, k, v, SharedSpan.of(span, ramp), ramp)], [wanted], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("seq", "span", "ramp"),
    [
        (37, 3.0, 2.0),  # 8 chunks of 5, the last one of 2
        (37, 2.3, 1.4),  # chunks of ceil(3.7)
        (41, 1.0, 1.0),  # the narrowest band
        (40, 6.0, 4.0),  # whole chunks
        (40, 30.0, 4.0),  # no band, the edge shows
        (40, 40.0, 5.0),  # no edge in sight
        (EXPLICIT_UP_TO + 21, 11.0, 3.0),  # the fused masked path
        (EXPLICIT_UP_TO + 21, 120.0, 16.0),
    ],
)
def test_banded_attention_equals_masked_attention_in_values_and_gradients(seq, span, ramp, dtype):
    inputs = draw(seq, dtype=dtype)
    masked = masked_attention(*inputs, bias(seq, [span] * 2, ramp, dtype))
    banded = banded_attention(*inputs, SharedSpan.of(span, ramp), ramp)
    assert_same([banded], [masked], TOLERANCE[dtype])
    assert_same(gradients(banded, inputs), gradients(masked, inputs), TOLERANCE[dtype])


@settings(max_examples=20, deadline=None, database=None)
@given(
    seq=st.integers(1, 40), span=st.floats(1, 40), ramp=st.floats(0.3, 9), seed=st.integers(0, 99)
)
def test_banded_equals_masked_for_any_length_span_and_ramp(seq, span, ramp, seed):
    span = min(span, float(seq))
    q, k, v = (x.detach() for x in draw(seq, heads=1, seed=seed))
    masked = masked_attention(q, k, v, bias(seq, [span] * 2, ramp))
    assert_same([banded_attention(q, k, v, SharedSpan.of(span, ramp), ramp)], [masked], 1e-9)


@pytest.mark.parametrize("bias_heads", [1, 3])
def test_gradients_are_those_of_differences_for_the_bias_too(bias_heads):
    inputs = draw(4, batch=2, head_dim=2)
    relative = torch.randn(2, bias_heads, 4, 4, dtype=torch.float64).requires_grad_()

    def out(q, k, v, relative):
        return masked_attention(q, k, v, bias(4, [2.0, 3.5], 2.0) + relative)

    assert torch.autograd.gradcheck(out, (*inputs, relative))


def test_gradients_of_a_band_are_those_of_differences():
    inputs = draw(80, replicas=1, batch=1, heads=1, head_dim=1)
    assert torch.autograd.gradcheck(
        lambda *qkv: banded_attention(*qkv, SharedSpan.of(5.0, 3.0), 3.0), inputs
    )


def test_the_fused_masked_path_equals_the_explicit_one(monkeypatch):
    inputs = draw(EXPLICIT_UP_TO + 5)
    mask = bias(EXPLICIT_UP_TO + 5, [20.0, 90.0], 7.0)
    fused = masked_attention(*inputs, mask)
    monkeypatch.setattr("models.attention.EXPLICIT_UP_TO", 10_000)
    explicit = masked_attention(*inputs, mask)
    assert_same([fused], [explicit], 1e-10)
    assert_same(gradients(fused, inputs), gradients(explicit, inputs), 1e-10)


@pytest.mark.parametrize("seq", [12, EXPLICIT_UP_TO + 1])
def test_each_replica_has_its_own_span(seq):
    q, k, v = (x.detach() for x in draw(seq))
    both = masked_attention(q, k, v, bias(seq, [2.0, 9.0], 2.0))
    for row, span in enumerate((2.0, 9.0)):
        single = [x[row : row + 1] for x in (q, k, v)]
        alone = masked_attention(*single, bias(seq, [span], 2.0))
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-12, rtol=1e-12)


def test_the_ramp_weighs_one_up_to_the_span_then_falls_linearly_to_zero():
    weight = bias(12, [4.0], 3.0)[0, 0].exp()[-1].flip(0)  # by distance
    wanted = [1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0, 0]
    torch.testing.assert_close(weight, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("execution", ["masked", "banded"])
def test_attention_is_continuous_in_the_span(execution):
    q, k, v = (x.detach() for x in draw(24, replicas=1))

    def attend(span):
        if execution == "masked":
            return masked_attention(q, k, v, bias(24, [span], 3.0))
        return banded_attention(q, k, v, SharedSpan.of(span, 3.0), 3.0)

    def largest_change(step):
        outs = [attend(span) for span in torch.arange(1, 24, step, dtype=torch.float64).tolist()]
        return max((a - b).abs().max().item() for a, b in pairwise(outs))

    assert largest_change(0.02) < 0.6 * largest_change(0.04)  # a jump would not get smaller
    for span in (5.0, 9.0, 20.0, 23.0):  # where keys enter and where the path switches
        assert (attend(span + 1e-7) - attend(span - 1e-7)).abs().max() < 1e-5


@pytest.mark.parametrize("span", [2.0, 11.0, 20.0])
def test_no_gradient_reaches_the_future_or_beyond_the_span(span):
    for execution in ("masked", "banded"):
        q, k, v = draw(20, replicas=1)
        if execution == "masked":
            out = masked_attention(q, k, v, bias(20, [span], 2.0))
        else:
            out = banded_attention(q, k, v, SharedSpan.of(span, 2.0), 2.0)
        (grad,) = torch.autograd.grad(out[..., 12, :].sum(), v)
        reached = grad.abs().sum(dim=(0, 1, 2, 4)) > 0
        positions = torch.arange(20)
        wanted = (positions <= 12) & (12 - positions < span + 2.0)
        assert torch.equal(reached, wanted)
