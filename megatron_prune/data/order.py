"""A shuffled order without a table: every position is computed from the seed when it is asked for."""

from __future__ import annotations

_MASK64 = (1 << 64) - 1
# The two multipliers and three shifts of SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Its increment: 2**64 divided by the golden ratio, made odd.
_INCREMENT = 0x9E3779B97F4A7C15
# Four rounds make a Feistel network a strong pseudorandom permutation given good round functions (Luby and Rackoff,
# 1988); narrow halves, as small sizes have them, are better off with some more.
_ROUNDS = 6


def mix(*values: int) -> int:
    """Hash integers to 64 bits, the same on every machine and in every process (Python's ``hash`` is not)."""
    state = 0
    for value in values:
        state = (state + _INCREMENT + value) & _MASK64
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK64
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK64
        state ^= state >> 31
    return state


def permute(index: int, size: int, seed: int) -> int:
    """The image of ``index`` under a pseudorandom permutation of ``range(size)``.

    A Feistel network permutes the smallest ``range(4**k)`` that holds ``size``; values outside ``range(size)`` are
    sent through again until one falls inside (cycle walking, at most 4 passes on average), which keeps it a bijection.

    Args:
        index: 0 <= index < size.
        size: at least 1, any integer.
        seed: which permutation.

    Returns:
        An integer in ``range(size)``; memory is constant.
    """
    assert 0 <= index < size, (index, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [mix(seed, size, number) for number in range(_ROUNDS)]
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (mix(key, right) & mask)
        index = (left << half) | right
        if index < size:
            return index
