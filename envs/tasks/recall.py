"""The task `recall`: values asked for by their keys, and random stretches that come again.

Both have one notion of distance: the *gap*, in tokens, from the token at hand back to where the
same token stood before. The answer is the token that followed it there.
"""

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray as Array

from envs.tasks.splits import split_generator

N_KEYS, N_VALUES, N_FILLERS = 8, 8, 4
VOCABULARY = N_KEYS + N_VALUES + N_FILLERS
_FIRST_VALUE, _FIRST_FILLER = N_KEYS, N_KEYS + N_VALUES
_RECALL, _INDUCTION, _MIXTURE = 0x2EC, 0x1ED, 0x31C
_ATTEMPTS = 200
_LONG = 6  # periods in numbers of tokens: in longer ones hardly any token comes once


def associative_recall(
    seed: int,
    n: int,
    seq: int,
    gaps: tuple[int, int],
    *,
    n_pairs: int = 4,
    split: str = "train",
) -> tuple[Int64[Array, "{n} {seq}+1"], Bool[Array, "{n} {seq}"]]:
    """Pairs of a key and a value, among fillers; each key comes again and asks for its value.

    Multi-query associative recall (arXiv 2312.04927) with the length of the dependency as a
    parameter. Tokens lie in slots of two; a sequence holds `n_pairs` pairs with different keys,
    and for each of them, one gap later, the same key and value again. All other slots are
    fillers, so that a longer sequence is longer and not fuller. Only the answers count.

    Args:
        seed: The same seed gives the same tokens.
        n: Sequences.
        seq: Tokens that are read; one more is returned.
        gaps: Least and greatest gap in tokens; the even numbers between are equally likely, as
            far as there is room for all pairs.
        n_pairs: Pairs per sequence.
        split: `"train"` or `"test"`.

    Returns:
        Tokens, and whether the token after each position counts.

    Raises:
        ValueError: If the pairs do not fit; the message names the numbers.
    """
    n_slots = (seq + 1) // 2
    low, high = (gaps[0] + 1) // 2, gaps[1] // 2
    if not 1 <= low <= high < n_slots:
        raise ValueError(
            f"gaps must hold an even number from 2 to {2 * n_slots - 2} in {seq} tokens, got {gaps}"
        )
    if not 1 <= n_pairs <= min(N_KEYS, n_slots // 2):
        raise ValueError(
            f"n_pairs must be from 1 to {min(N_KEYS, n_slots // 2)} in {seq} tokens, got {n_pairs}"
        )
    rng = split_generator(seed, split, _RECALL)
    tokens = rng.integers(_FIRST_FILLER, VOCABULARY, (n, seq + 1))
    counted = np.zeros((n, seq), dtype=bool)
    keys = rng.permuted(np.tile(np.arange(N_KEYS), (n, 1)), axis=1)[:, :n_pairs]
    values = rng.integers(_FIRST_VALUE, _FIRST_FILLER, (n, n_pairs))
    rows, free = np.arange(n), np.ones((n, n_slots), dtype=bool)
    for pair in range(n_pairs):
        first, second = _place(free, low, high, rng)
        for slot in (first, second):
            free[rows, slot] = False
            tokens[rows, 2 * slot] = keys[:, pair]
            tokens[rows, 2 * slot + 1] = values[:, pair]
        counted[rows, 2 * second] = True
    return tokens, counted


def _place(
    free: Bool[Array, "n slot"], low: int, high: int, rng: np.random.Generator
) -> tuple[Int64[Array, " n"], Int64[Array, " n"]]:
    """Two free slots of every sequence, `low` to `high` slots apart."""
    n, n_slots = free.shape
    first, gap = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    waiting = np.arange(n)
    for _ in range(_ATTEMPTS):
        gap[waiting] = rng.integers(low, high + 1, len(waiting))
        later = np.arange(n_slots) + gap[waiting, None]
        fits = free[waiting] & (later < n_slots)
        fits &= np.take_along_axis(free[waiting], np.minimum(later, n_slots - 1), axis=1)
        first[waiting] = (rng.random(fits.shape) * fits).argmax(axis=1)
        waiting = waiting[~fits[np.arange(len(waiting)), first[waiting]]]
        if len(waiting) == 0:
            return first, first + gap
    raise ValueError(
        f"The pairs do not fit: {n_slots} slots of two tokens leave no room for a gap of "
        f"{2 * low} to {2 * high} tokens. Ask for fewer pairs or for longer sequences"
    )


def induction(
    seed: int, n: int, seq: int, gaps: tuple[int, int], *, split: str = "train"
) -> tuple[Int64[Array, "{n} {seq}+1"], Bool[Array, "{n} {seq}"]]:
    """Random keys and values that come again and again with a period drawn from `gaps`.

    What counts is the token after one that its period holds once, from the second period on.

    Args:
        seed: The same seed gives the same tokens.
        n: Sequences.
        seq: Tokens that are read; one more is returned.
        gaps: Least and greatest period in tokens, each between equally likely.
        split: `"train"` or `"test"`.

    Returns:
        Tokens, and whether the token after each position counts.

    Raises:
        ValueError: If the periods do not fit.
    """
    if not 1 <= gaps[0] <= gaps[1] < seq:
        raise ValueError(f"gaps must be from 1 to {seq - 1} for {seq} tokens, got {gaps}")
    rng = split_generator(seed, split, _INDUCTION)
    tokens = np.zeros((n, seq + 1), dtype=np.int64)
    counted = np.zeros((n, seq), dtype=bool)
    waiting = np.arange(n)
    likely = gaps[1] <= _LONG * _FIRST_FILLER
    for _ in range(_ATTEMPTS if likely else 0):  # a sequence of which nothing counts is drawn again
        tokens[waiting], counted[waiting] = _repeated(rng, len(waiting), seq, gaps)
        waiting = waiting[~counted[waiting].any(axis=1)]
    if len(waiting):
        tokens[waiting], counted[waiting] = _repeated(rng, len(waiting), seq, gaps, sure=True)
    return tokens, counted


def _repeated(
    rng: np.random.Generator, n: int, seq: int, gaps: tuple[int, int], *, sure: bool = False
) -> tuple[Int64[Array, "{n} {seq}+1"], Bool[Array, "{n} {seq}"]]:
    """Sequences that come again; `sure` that something counts, if need be by a token held once."""
    period = rng.integers(gaps[0], gaps[1] + 1, (n, 1))
    place = np.arange(seq + 1)
    drawn = rng.integers(0, _FIRST_FILLER, (n, seq + 1))
    if sure:
        once = rng.integers(0, _FIRST_FILLER, (n, 1))
        other = (once + rng.integers(1, _FIRST_FILLER, drawn.shape)) % _FIRST_FILLER
        there = rng.integers(0, np.minimum(period, seq - period))  # it is read a second time
        drawn = np.where(place == there, once, np.where(drawn == once, other, drawn))
    tokens = np.take_along_axis(drawn, place % period, axis=1)
    own = np.arange(n)[:, None] * VOCABULARY + tokens  # tells the sequences' tokens apart
    held = np.bincount(own[place < period], minlength=n * VOCABULARY)
    return tokens, (place[:-1] >= period) & (held[own[:, :-1]] == 1)


def recall_sequences(
    seed: int,
    n: int,
    seq: int,
    gaps: tuple[int, int],
    *,
    n_pairs: int = 4,
    induction_share: float = 0.5,
    split: str = "train",
) -> tuple[Int64[Array, "{n} {seq}+1"], Bool[Array, "{n} {seq}"]]:
    """Associative recall with induction mixed in, sequence by sequence.

    Induction asks for the same circuit and counts more targets per sequence, so small models
    find it soon enough to learn recall in few steps.

    Args:
        seed: The same seed gives the same tokens.
        n: Sequences.
        seq: Tokens that are read; one more is returned.
        gaps: Least and greatest gap in tokens.
        n_pairs: Pairs per sequence of associative recall.
        induction_share: Share of the sequences that are induction.
        split: `"train"` or `"test"`.

    Returns:
        Tokens, and whether the token after each position counts.
    """
    chosen = split_generator(seed, split, _MIXTURE).random(n) < induction_share
    tokens, counted = associative_recall(seed, n, seq, gaps, n_pairs=n_pairs, split=split)
    if chosen.any():
        repeated, repeats = induction(seed, n, seq, gaps, split=split)
        tokens[chosen], counted[chosen] = repeated[chosen], repeats[chosen]
    return tokens, counted
