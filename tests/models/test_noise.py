"""Dropout noise: hashed, fair, and a matter of seed, step and place only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Noise, hashed_integers
from models.noise import BYTE_VALUES, NoisePool, keep_mask, mix_bits

int64s = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def pool():
    return NoisePool(64)


def splitmix64(state):
    """One output of SplitMix64, in Python's whole numbers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@settings(max_examples=20, deadline=None, database=None)
@given(value=int64s)
def test_mix_bits_equals_splitmix64_in_whole_numbers(value):
    assert mix_bits(torch.tensor(value)).item() % 2**64 == splitmix64(value % 2**64)


@pytest.mark.parametrize("bound", [7, 10, 64, 100])
@pytest.mark.parametrize("moving", [0, 1, 2])
def test_hashed_integers_are_uniform_whichever_key_moves(bound, moving):
    n = 20_000
    keys = [torch.full((n,), 5), torch.full((n,), 9), torch.full((n,), 2)]
    keys[moving] = torch.arange(n)
    counts = torch.bincount(hashed_integers(bound, *keys), minlength=bound).double()
    chi_square = ((counts - n / bound) ** 2 / (n / bound)).sum().item()
    # mean bound - 1, deviation sqrt(2 (bound - 1)); six deviations up
    assert len(counts) == bound
    assert chi_square < bound - 1 + 6 * (2 * (bound - 1)) ** 0.5 + 6


def test_successive_hashes_are_uncorrelated():
    values = hashed_integers(1 << 30, torch.tensor(3), torch.arange(20_000)).double()
    assert torch.corrcoef(torch.stack((values[1:], values[:-1])))[0, 1].abs() < 0.04


@settings(max_examples=20, deadline=None, database=None)
@given(bound=st.integers(1, 2**62), keys=st.lists(int64s, min_size=1, max_size=4))
def test_hashed_integers_are_deterministic_and_in_range(bound, keys):
    tensors = [torch.tensor(key) for key in keys]
    first = hashed_integers(bound, *tensors)
    assert 0 <= first.item() < bound
    assert torch.equal(first, hashed_integers(bound, *tensors))


def test_hashed_integers_differ_by_each_key_and_by_their_order():
    def hashed(*keys):
        return hashed_integers(1 << 62, *map(torch.tensor, keys)).item()

    assert len({hashed(1, 2, 3), hashed(2, 2, 3), hashed(1, 3, 3), hashed(1, 2, 4)}) == 4
    assert len({hashed(1, 2, 3), hashed(3, 2, 1), hashed(2, 1, 3)}) == 3


def test_noise_differs_by_seed_step_and_place_and_is_read_again_alike(pool):
    def read(seed, step):
        return pool.read(Noise(torch.tensor([seed]), torch.tensor([step])), 3)[0]

    windows = torch.cat((read(1, 0), read(2, 0), read(1, 1)))
    same = (windows[:, None] == windows[None]).all(-1)
    assert torch.equal(same, torch.eye(9, dtype=torch.bool))
    assert torch.equal(read(1, 0), read(1, 0))


def test_replicas_with_the_same_seed_and_step_share_noise_whatever_their_row(pool):
    noise = pool.read(Noise(torch.tensor([4, 8, 4, 4]), torch.tensor([6, 6, 6, 7])), 5)
    alone = pool.read(Noise(torch.tensor([4]), torch.tensor([6])), 5)
    assert torch.equal(noise[0], noise[2]) and torch.equal(noise[0], alone[0])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[3])


def test_two_pools_of_one_size_hold_the_same_bytes(pool):
    noise = Noise(torch.arange(3), torch.arange(3))
    assert torch.equal(pool.read(noise, 2), NoisePool(64).read(noise, 2))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.6, 0.95])
def test_keep_mask_drops_a_share_p_and_has_expectation_one(p):
    every_byte = torch.arange(BYTE_VALUES, dtype=torch.uint8)[None]
    mask = keep_mask(every_byte, torch.tensor([p]), torch.float64)[0]
    assert (mask == 0).double().mean().item() == pytest.approx(p, abs=0.5 / BYTE_VALUES + 1e-6)
    assert mask.mean().item() == pytest.approx(1, abs=1e-6)
    assert len(mask[mask > 0].unique()) == 1


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_noise_from_the_pool_drops_a_share_p(pool, p):
    raw = pool.read(Noise(torch.arange(400), torch.zeros(400, dtype=torch.long)), 1)
    mask = keep_mask(raw, torch.full((400,), p), torch.float32)
    assert (mask == 0).float().mean().item() == pytest.approx(p, abs=0.02)
    assert mask.mean().item() == pytest.approx(1, abs=0.04)


def test_no_dropout_gives_exactly_one_beside_a_replica_that_drops():
    raw = torch.randint(0, 256, (2, 3, 100), dtype=torch.uint8)
    mask = keep_mask(raw, torch.tensor([0.0, 0.5]), torch.float32)
    assert torch.equal(mask[0], torch.ones(3, 100))
    assert (mask[1] == 0).any()


@settings(max_examples=20, deadline=None, database=None)
@given(low=st.floats(0, 0.95), high=st.floats(0, 0.95))
def test_more_dropout_drops_a_superset(low, high):
    low, high = sorted((low, high))
    raw = torch.arange(BYTE_VALUES, dtype=torch.uint8)[None]
    dropped = [keep_mask(raw, torch.tensor([p]), torch.float32) == 0 for p in (low, high)]
    assert bool((dropped[0] <= dropped[1]).all())
