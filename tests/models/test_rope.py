"""Rotary embedding against references written from the definition."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.rotary import Rope, build_rotation, rotation_names
from models.rotary.base import rotate_pairs


def rope(bases, head_dim=8, context=24, dtype=torch.float64):
    module = build_rotation("rope", n_replicas=len(bases), head_dim=head_dim, context=context)
    module.refresh(torch.tensor([math.log(b) for b in bases], dtype=dtype))
    return module


def vectors(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotated_by_complex_numbers(vector, position, base):
    """Python's own complex numbers, pair by pair."""
    out = []
    for i in range(0, len(vector), 2):
        turn = cmath.exp(1j * position * base ** (-i / len(vector)))
        z = complex(vector[i], vector[i + 1]) * turn
        out += [z.real, z.imag]
    return out


def rotation_matrix(position, base, head_dim):
    matrix = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for i in range(0, head_dim, 2):
        a = position * base ** (-i / head_dim)
        block = [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]
        matrix[i : i + 2, i : i + 2] = torch.tensor(block, dtype=torch.float64)
    return matrix


@pytest.mark.parametrize("base", [4.0, 500.0, 10_000.0, 1e6])
def test_rope_equals_complex_arithmetic(base):
    x = vectors(1, 1, 24, 2, 8)
    out = rope([base])(x)
    for m in (0, 1, 7, 23):
        for head in range(2):
            wanted = rotated_by_complex_numbers(x[0, 0, m, head].tolist(), m, base)
            torch.testing.assert_close(
                out[0, 0, m, head], torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0
            )


def test_rope_equals_rotation_matrices():
    x = vectors(2, 3, 24, 2, 8)
    out = rope([50.0, 10_000.0])(x)
    for row, base in enumerate((50.0, 10_000.0)):
        for m in (0, 5, 23):
            wanted = x[row, :, m] @ rotation_matrix(m, base, 8).T
            torch.testing.assert_close(out[row, :, m], wanted, atol=1e-12, rtol=0)


def test_a_small_positive_angle_turns_counter_clockwise():
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 2, 1, 2)
    turned = rope([10.0], head_dim=2, context=2)(x)[0, 0, 1, 0]
    assert turned.tolist() == pytest.approx([math.cos(1), math.sin(1)], abs=1e-12)


def test_position_zero_is_left_bit_for_bit():
    x = vectors(2, 3, 5, 2, 8)
    assert torch.equal(rope([7.0, 1e5])(x)[:, :, 0], x[:, :, 0])


@settings(max_examples=20, deadline=None, database=None)
@given(
    base=st.floats(2, 1e6),
    distance=st.integers(0, 20),
    shift=st.integers(0, 40),
    seed=st.integers(0, 999),
)
def test_norms_are_kept_and_logits_depend_on_the_distance_only(base, distance, shift, seed):
    q, k = vectors(2, 8, seed=seed)
    table = rope([base], context=64)
    stacked = torch.stack((q, k)).expand(1, 1, 64, 2, 8)
    turned = table(stacked)[0, 0]
    assert torch.allclose(turned.norm(dim=-1), stacked[0, 0].norm(dim=-1), atol=1e-12)
    logit = turned[distance + shift, 0] @ turned[shift, 1]
    assert logit.item() == pytest.approx((turned[distance, 0] @ turned[0, 1]).item(), abs=1e-9)


def test_logits_do_depend_on_the_distance():
    q, k = vectors(2, 8)
    turned = rope([100.0])(torch.stack((q, k)).expand(1, 1, 24, 2, 8))[0, 0]
    logits = turned[:, 0] @ turned[0, 1]
    assert logits.diff().abs().min() > 1e-4


def test_bfloat16_is_rotated_in_float32_and_comes_back_as_bfloat16():
    context = 2048
    x = vectors(1, 1, context, 2, 8).bfloat16()
    out = rope([10_000.0], context=context, dtype=torch.float32)(x)
    assert out.dtype == torch.bfloat16
    exact = rope([10_000.0], context=context)(x.double())
    # half a unit in the last place of bfloat16, and no phase lost at position 2047
    assert (out.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_tables_stay_in_float32_when_the_values_are_bfloat16():
    module = rope([10_000.0], dtype=torch.bfloat16)
    assert module.rotation.dtype == torch.float32


def test_rotate_pairs_has_the_right_gradient():
    x = vectors(3, 5, 6).requires_grad_()
    angles = vectors(5, 3, seed=1)
    turn = torch.polar(torch.ones_like(angles), angles)
    assert torch.autograd.gradcheck(lambda x: rotate_pairs(x, turn), (x,))


@settings(max_examples=15, deadline=None, database=None)
@given(bases=st.lists(st.floats(2, 1e6), min_size=1, max_size=4))
def test_each_replica_turns_by_its_own_base(bases):
    x = vectors(len(bases), 2, 6, 2, 8)
    together = rope(bases)(x)
    for row, base in enumerate(bases):
        assert torch.equal(together[row : row + 1], rope([base])(x[row : row + 1]))


def test_a_change_of_base_refreshes_the_tables_in_place():
    module = rope([100.0, 100.0])
    table = module.rotation
    x = vectors(2, 1, 8, 2, 8)
    module.refresh(torch.tensor([math.log(100.0), math.log(9.0)], dtype=torch.float64))
    assert module.rotation is table
    assert torch.equal(module(x), rope([100.0, 9.0])(x))


def test_an_unknown_rotation_is_refused_with_the_nearest_name():
    assert "rope" in rotation_names()
    assert isinstance(build_rotation("rope", n_replicas=1, head_dim=4, context=4), Rope)
    with pytest.raises(ValueError, match=r"Unknown rotation 'roep'.*Known: .*rope.*mean 'rope'"):
        build_rotation("roep", n_replicas=1, head_dim=4, context=4)
