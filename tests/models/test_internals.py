"""Signals from inside a model, against what is known by hand."""

import math

import pytest
import torch

from models import AdaptiveTransformer, TransformerConfig
from models.internals import Watch, noise_scale

SHAPE = TransformerConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=4, context=12)


def made(n=2, config=SHAPE, **changes):
    model = AdaptiveTransformer(config, n, dtype=torch.float64, **changes)
    model.initialise(list(range(n)), list(range(n)))
    return model


def some_tokens(n, batch=3, seq=12):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 11, (1, batch, seq), generator=generator).expand(n, batch, seq)


def weights_of(model, tokens):
    """Attention weights of the first layer and first head of a model without rotation."""
    x = model.embedding[0][tokens[0]]
    x = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    q, k, _ = (x @ model.blocks[0]["qkv"][0]).unflatten(-1, (3, 4, 4)).unbind(2)
    logits = q[:, :, 0] @ k[:, :, 0].transpose(1, 2) / math.sqrt(4)
    future = torch.ones(12, 12).triu(1).bool()
    return torch.softmax(logits.masked_fill(future, -torch.inf), -1)


def test_the_entropy_of_attention_is_that_of_its_weights_over_the_largest_possible():
    shape = TransformerConfig(
        vocab_size=11, d_model=16, n_layers=1, n_heads=4, context=12, rotation="nope"
    )
    model = made(1, shape)
    with torch.no_grad():  # all four heads alike
        for part in model.blocks[0]["qkv"][0].unflatten(1, (3, 4, 4)).unbind(1)[:2]:
            part[:, 1:] = part[:, :1]
    weights = weights_of(model, some_tokens(1))[:, 1:]
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    expected = (entropy / torch.arange(2.0, 13.0).log()).mean()
    found = model.internal_signals(some_tokens(1))["attention_entropy"]
    torch.testing.assert_close(found[0], expected.detach().double(), rtol=1e-6, atol=0)


def test_attention_without_queries_looks_everywhere_alike():
    model = made()
    with torch.no_grad():
        model.blocks[0]["qkv"][1, :, :16] = 0
        model.blocks[1]["qkv"][1, :, :16] = 0
    entropy = model.internal_signals(some_tokens(2))["attention_entropy"]
    assert entropy[1] == pytest.approx(1.0) and 0.3 < entropy[0] < 0.99


def test_units_that_never_answer_are_dormant():
    model = made()
    with torch.no_grad():
        model.blocks[0]["ffn_in"][1, :, :32] = 0  # half of the 64 units of one of two layers
    assert model.internal_signals(some_tokens(2))["dormant_fraction"].tolist() == [0.0, 0.25]


def test_the_stable_rank_is_the_squared_norms_ratio():
    left, _ = torch.linalg.qr(
        torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    x = left * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    watch = Watch()
    watch.attention(
        torch.zeros(2, 1, 1, 2, 1),
        torch.zeros(2, 1, 1, 2, 1),
        torch.zeros(2, 1, 2, 2),
        1,
        torch.ones(2, 1),
    )
    watch.hidden(torch.ones(2, 4, 3), torch.ones(2, 1, 3))
    watch.final(torch.stack((x, x * torch.nan)))
    rank = watch.signals()["stable_rank"]
    assert rank[0] == pytest.approx(14 / 9) and rank[1].isnan()


def test_a_replica_is_read_as_if_it_were_alone_and_in_either_execution():
    model = made(3)
    model.set_knobs({"attention_span": [12.0, 5.0, 8.0], "embedding_width": [1.0, 0.5, 0.75]})
    model.knobs.settle_gates([0, 1, 2])
    together = model.internal_signals(some_tokens(3))
    for row in range(3):
        alone = made(1)
        assert alone.sliced
        for name, value in model.state_dict().items():
            alone.state_dict()[name].copy_(value[row : row + 1])
        alone.refresh()
        found = alone.internal_signals(some_tokens(1))
        for name, value in together.items():
            torch.testing.assert_close(found[name][0], value[row], rtol=1e-9, atol=0)


def test_the_noise_scale_is_what_two_halves_disagree_about():
    same = [torch.tensor([[3.0, 4.0]])]
    assert noise_scale(same, same).tolist() == [0.0]
    first, second = [torch.tensor([[2.0, 1.0]]), None], [torch.tensor([[2.0, -1.0]]), None]
    # |halves|^2 = 5, |whole|^2 = 4: signal 3, noise 1.
    assert noise_scale(first, second).tolist() == pytest.approx([1 / 3])
    opposite = [torch.tensor([[-3.0, -4.0]])]
    assert noise_scale(same, opposite).tolist() == pytest.approx([100.0])
