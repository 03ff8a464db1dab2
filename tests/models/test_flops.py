"""The analytic cost against counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from models import AdaptiveTransformer, TransformerConfig, training_flops
from models.flops import attended_pairs


@settings(max_examples=20, deadline=None, database=None)
@given(seq=st.integers(1, 40), reach=st.one_of(st.integers(1, 60).map(float), st.floats(0.01, 60)))
def test_attended_pairs_equals_counting_pairs(seq, reach):
    counted = sum(0 <= q - k < reach for q in range(seq) for k in range(seq))
    assert attended_pairs(seq, torch.tensor(reach, dtype=torch.float64)) == counted


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_cost_falls_with_the_width_and_with_the_span(feed_forward):
    config = TransformerConfig(feed_forward=feed_forward, context=64)

    def cost(width=1.0, span=64.0):
        return training_flops(config, width=width, span=span, batch=4, seq=64)

    widths = [cost(width=w) for w in (0.25, 0.5, 0.75, 1.0)]
    spans = [cost(span=s) for s in (4.0, 8.0, 16.0, 32.0, 55.0)]
    assert widths == sorted(set(widths)) and spans == sorted(set(spans))
    assert cost(span=64.0) == cost(span=56.0)  # with a ramp of 8 nothing is out of reach


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_cost_at_full_width_is_six_times_parameters_times_tokens_and_attention(feed_forward):
    config = TransformerConfig(d_model=64, n_layers=3, context=32, feed_forward=feed_forward)
    model = AdaptiveTransformer(config)
    gains = (2 * 3 + 1) * 64
    in_products = model.count_parameters() - gains - 256 * 64  # the embedding is a look-up
    tokens, causal_pairs = 5 * 32, 5 * 32 * 33 / 2
    attention = 6 * 3 * causal_pairs * 2 * 64  # q.k and weights.v, in three layers
    wanted = 6 * in_products * tokens + attention
    assert training_flops(config, width=1.0, span=32.0, batch=5, seq=32) == pytest.approx(wanted)


def test_a_backward_pass_costs_twice_its_forward_pass():
    """What torch counts in training our layers' products is three times what it counts without."""
    model = AdaptiveTransformer(TransformerConfig(d_model=32, context=16))
    model.initialise([0], [0])
    tokens = torch.zeros(1, 2, 16, dtype=torch.long)
    counted = []
    for learns in (False, True):
        with torch.set_grad_enabled(learns), FlopCounterMode(display=False) as counter:
            logits = model(tokens)
            if learns:
                logits.sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[1] == 3 * counted[0] > 0


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_cost_is_what_torch_counts_in_a_sliced_forward_pass(feed_forward, width):
    config = TransformerConfig(d_model=32, context=16, feed_forward=feed_forward)
    model = AdaptiveTransformer(config)
    model.initialise([0], [0])
    model.set_knobs({"embedding_width": width})
    model.knobs.settle_gates([0])
    tokens = torch.zeros(1, 2, 16, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "bmm" in str(op) or "mm" in str(op))
    pairs_only = training_flops(config, width=width, span=16.0, batch=2, seq=16) / 3 - products
    assert pairs_only == pytest.approx(2 * 2 * 2 * 32 * width * 2 * 16 * 17 / 2)
