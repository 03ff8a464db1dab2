"""What a rotation can and cannot add: each line of the table in docs/rotations.md, in float64.

Logits of one head between tokens with features `x`, projected by `w_q` and `w_k`, then turned
by plain RoPE. "No-op": the logits stay. "Re-parametrisation": they change, but other projections
give the same. "New": no projections do, shown on logits that plain RoPE cannot have.
"""

import pytest
import torch

from models import AdaptiveTransformer, TransformerConfig
from models.loss import cross_entropy
from models.rotary import LayerTurn, Rotary, RotationConfig, Shape
from models.rotary.orthogonal import random_rotation
from models.rotary.pairs import rotate_pairs

DIM, SEQ, FEATURES = 8, 40, 10
EXACT = {"atol": 1e-11, "rtol": 0}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(SEQ, FEATURES, seed=1)
W_Q, W_K = normal(FEATURES, DIM, seed=2), normal(FEATURES, DIM, seed=3)
W_V, W_O = normal(FEATURES, DIM, seed=4), normal(DIM, FEATURES, seed=5)
R = random_rotation(1, DIM, torch.Generator().manual_seed(6))[0]


def turns(base=100.0):
    positions = torch.arange(SEQ, dtype=torch.float64)[:, None]
    angles = positions * base ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    return torch.polar(torch.ones_like(angles), angles)


def rope(x):
    return rotate_pairs(x, turns())


def phase(x, angles):
    return rotate_pairs(x, torch.polar(torch.ones(DIM // 2, dtype=torch.float64), angles))


def in_planes():
    """An orthogonal matrix that turns within RoPE's own planes only."""
    angles = normal(DIM // 2, seed=7)
    return phase(torch.eye(DIM, dtype=torch.float64), angles)


def logits(q, k):
    return q @ k.T


PLAIN = logits(rope(X @ W_Q), rope(X @ W_K))
ANGLES = normal(DIM // 2, seed=8)

NO_OPS = {
    "one orthogonal R on both, after RoPE": logits(rope(X @ W_Q) @ R, rope(X @ W_K) @ R),
    "a rotation inside the RoPE planes": logits(
        rope(X @ W_Q @ in_planes()), rope(X @ W_K @ in_planes())
    ),
    "a phase shared by q and k": logits(rope(phase(X @ W_Q, ANGLES)), rope(phase(X @ W_K, ANGLES))),
}


@pytest.mark.parametrize("construction", NO_OPS)
def test_it_changes_no_logit(construction):
    torch.testing.assert_close(NO_OPS[construction], PLAIN, **EXACT)


REPARAMETRISATIONS = {
    "one orthogonal R on both, before RoPE": (
        logits(rope(X @ W_Q @ R), rope(X @ W_K @ R)),
        (W_Q @ R, W_K @ R),
    ),
    "conjugation R^T RoPE R": (
        logits(rope(X @ W_Q @ R.T) @ R, rope(X @ W_K @ R.T) @ R),
        (W_Q @ R.T, W_K @ R.T),
    ),
    "key-only phase": (
        logits(rope(X @ W_Q), rope(phase(X @ W_K, ANGLES))),
        (W_Q, phase(W_K, ANGLES)),
    ),
    "logit temperature": (logits(rope(1.7 * X @ W_Q), rope(X @ W_K)), (1.7 * W_Q, W_K)),
}


@pytest.mark.parametrize("construction", REPARAMETRISATIONS)
def test_it_changes_logits_but_other_projections_give_the_same(construction):
    changed, (w_q, w_k) = REPARAMETRISATIONS[construction]
    assert (changed - PLAIN).abs().max() > 0.1
    torch.testing.assert_close(logits(rope(X @ w_q), rope(X @ w_k)), changed, **EXACT)


def test_a_position_independent_rotation_of_values_is_absorbed_by_the_output_projection():
    weights = torch.softmax(PLAIN, dim=-1)
    rotated = weights @ (X @ W_V @ R) @ W_O
    absorbed = weights @ (X @ W_V) @ (R @ W_O)
    assert (rotated - weights @ (X @ W_V) @ W_O).abs().max() > 0.1
    torch.testing.assert_close(rotated, absorbed, **EXACT)


@pytest.mark.parametrize(
    "outer", [lambda x: rope(rope(x) @ R), lambda x: rope(rope(x) @ R) @ R.T], ids=["mixed", "back"]
)
def test_two_passes_with_a_mixing_between_are_no_longer_relative(outer):
    q = normal(DIM, seed=9).expand(SEQ, -1)
    k = normal(DIM, seed=10).expand(SEQ, -1)
    diagonal = logits(outer(q), outer(k)).diagonal(-1)
    assert (diagonal - diagonal[0]).abs().max() > 0.1


def test_turning_the_residual_stream_is_no_longer_relative():
    """x_m turned before any projection: q_m . k_n depends on m and n, not on m - n."""
    x = rotate_pairs(normal(DIM, seed=9).expand(SEQ, -1), turns())
    diagonal = logits(x @ normal(DIM, DIM, seed=11), x @ normal(DIM, DIM, seed=12)).diagonal(-1)
    assert (diagonal - diagonal[0]).abs().max() > 0.1


# What adds power, on the project's own rotations --------------------------------------------


def rotary_logits(config, q, k, angles=None):
    """Logits of one head of our rotation, its parameters disturbed."""
    shape = Shape(
        n_replicas=1,
        n_layers=1,
        n_heads=1,
        d_model=DIM,
        head_dim=DIM,
        context=SEQ,
        dtype=torch.float64,
    )
    module = Rotary(config, shape)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.5 * draw)
    module.refresh(torch.full((1,), 100.0, dtype=torch.float64).log(), torch.ones(1))
    whole = module.prepare(SEQ, torch.ones(1, dtype=torch.float64))
    turn = LayerTurn(whole, 0, 1, angles, config.polar)
    qk = torch.stack((q, k), dim=1)[None, None, :, :, None]
    q, k = turn.queries_keys(qk)[0, 0, :, :, 0].unbind(1)
    out = logits(q, k)
    if whole.by_distance is not None:
        distance = torch.arange(SEQ)[:, None] - torch.arange(SEQ)
        out = out + whole.by_distance[0, 0, 0][distance.clamp(min=0)]
    return out.tril()


def projected_rope_basis():
    """With the same vector q = k everywhere, plain RoPE's logit at distance d is a sum of
    cos(d w_i) and sin(d w_i): the rows of this matrix span all that any projections can reach.
    """
    d = torch.arange(SEQ, dtype=torch.float64)
    w = 100.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    return torch.cat((torch.cos(d[:, None] * w), torch.sin(d[:, None] * w)), dim=1)


@pytest.mark.parametrize(
    "config",
    [
        RotationConfig(learn_frequencies=True),
        RotationConfig(learn_position_scale=True),
        RotationConfig(polar=True),
        RotationConfig(base_factors=(30.0,)),
        RotationConfig(scaling="linear"),
        RotationConfig(xpos=True),
        RotationConfig(bias="t5"),
        RotationConfig(bias="alibi"),
        RotationConfig(bias="kerple"),
        RotationConfig(bias="fire"),
    ],
    ids=lambda config: ", ".join(f"{k}={v}" for k, v in config.changes().items()),
)
def test_it_reaches_logits_that_no_projections_give_plain_rope(config):
    q = normal(DIM, seed=9).expand(SEQ, -1)
    k = normal(DIM, seed=10).expand(SEQ, -1)
    by_distance = rotary_logits(config, q, k)[:, 0]
    basis = projected_rope_basis()
    plain = rotary_logits(RotationConfig(), q, k)[:, 0]
    fitted = basis @ torch.linalg.lstsq(basis, plain).solution
    torch.testing.assert_close(fitted, plain, atol=1e-9, rtol=0)
    fitted = basis @ torch.linalg.lstsq(basis, by_distance).solution
    assert (fitted - by_distance).abs().max() > 1e-3


def test_accumulated_angles_depend_on_the_tokens_in_between():
    """Same query, same key, same distance: other tokens between them, another logit."""
    q, k = normal(SEQ, DIM, seed=9), normal(SEQ, DIM, seed=10)
    angles = normal(1, 1, SEQ, 1, DIM // 2, seed=11).cumsum(2)
    other = angles.clone()
    other[:, :, 4:] += 0.5  # the increment of token 4 alone
    config = RotationConfig()
    before, after = (rotary_logits(config, q, k, each) for each in (angles, other))
    changed = (before - after).abs() > 1e-9
    for m in range(SEQ):
        for n in range(m + 1):
            assert changed[m, n] == (n < 4 <= m)


def test_value_rotation_makes_the_output_depend_on_the_distance():
    config = TransformerConfig(vocab_size=9, d_model=8, n_heads=4, n_layers=1, context=SEQ)
    plain = AdaptiveTransformer(config, 1, dtype=torch.float64)
    rotated = AdaptiveTransformer(
        TransformerConfig(**{**config.to_dict(), "rotation": "value"}), 1, dtype=torch.float64
    )
    for model in (plain, rotated):
        model.initialise([0], [3])
        with torch.no_grad():
            model.blocks[0]["qkv"][:, :, :16] = 0  # uniform attention: order cannot matter
    tokens = torch.randint(0, 9, (1, 1, SEQ), generator=torch.Generator().manual_seed(0))
    swapped = tokens.clone()
    swapped[..., [2, 3]] = tokens[..., [3, 2]]
    assert tokens[0, 0, 2] != tokens[0, 0, 3]
    last = [(m(tokens)[:, :, -1] - m(swapped)[:, :, -1]).abs().max() for m in (plain, rotated)]
    assert last[0] < 1e-12 < 1e-4 < last[1]


# In the model: a no-op gets no gradient -------------------------------------------------------


@pytest.mark.parametrize("place", ["in the planes", "after RoPE"])
def test_no_ops_get_no_gradient(place):
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(DIM // 2, generator=generator, dtype=torch.float64, requires_grad=True)
    skew = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    if place == "in the planes":
        parameter = angles
        scores = logits(rope(phase(X @ W_Q, angles)), rope(phase(X @ W_K, angles)))
    else:
        parameter = skew
        r = torch.linalg.matrix_exp(skew - skew.T)
        scores = logits(rope(X @ W_Q) @ r, rope(X @ W_K) @ r)
    target = torch.arange(SEQ)[None]
    loss = cross_entropy(scores[None, None], target[None])
    loss.sum().backward()
    assert parameter.grad.abs().max() <= 1e-12


@pytest.mark.parametrize("rotation", ["givens", "butterfly", "cayley", "exp", "householder"])
def test_a_reparametrisation_reaches_the_logits_of_other_projections(rotation):
    """Plain RoPE with the folded projections has the same logits: no new function."""
    config = TransformerConfig(vocab_size=9, d_model=16, n_heads=4, context=SEQ, rotation=rotation)
    model = AdaptiveTransformer(config, 1, dtype=torch.float64)
    model.initialise([0], [3])
    with torch.no_grad():
        for parameter in model.rotation.parameters():
            parameter.add_(normal(*parameter.shape, seed=2) * 0.3)
    tokens = torch.randint(0, 9, (1, 2, SEQ), generator=torch.Generator().manual_seed(0))
    wanted = model(tokens)
    model.fold_rotations_()
    plain = AdaptiveTransformer(
        TransformerConfig(**{**config.to_dict(), "rotation": "rope"}), 1, dtype=torch.float64
    )
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(tokens), wanted, atol=1e-10, rtol=0)
