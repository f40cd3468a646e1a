"""Numpy's generators, many side by side: what `numpy_generator` draws for each of many clients, by array operations.

Making a `numpy.random.Generator` and asking it for a few numbers takes 20 microseconds, so a million clients with a
generator each would take 20 s. Here each operation is one on arrays with an element per client. Numpy guarantees the
streams of its `SeedSequence` and `PCG64` (NEP 19), which are

- O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms for Random Number Generation",
  2014: a 128-bit linear congruential generator, of whose state 64 bits are output (XSL-RR);
- O'Neill, "Developing a seed_seq Alternative", 2015: the hash that makes its state from a seed.

Bounded integers are drawn as by Lemire, "Fast Random Integer Generation in an Interval", ACM TOMACS 2019, subsets as by
Floyd (Bentley, "Programming Pearls: A Sample of Brilliance", CACM 1987), and permutations as by Fisher and Yates; all
as numpy does it, and the tests compare each with numpy.
"""

from __future__ import annotations

import numpy as np

from fedlabel.data.ragged import Ragged
from fedlabel.seeding import derive_seeds, numpy_generator

HALF = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint32(16)
LEFT, RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
"""SeedSequence's, with which it mixes two words."""
MULTIPLIER = (np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645))
"""Of PCG64, high and low half."""
AT_ONCE = 1 << 14
"""Streams that are advanced together: their states stay in the cache."""
MOST_STEPS = 64
"""Numbers of a stream that are drawn side by side. Who needs more has so many samples that a generator costs little."""
FLOYD = 10_000
"""Elements; of more, numpy may choose in another way than Floyd's."""

Pair = tuple[np.ndarray, np.ndarray]
"""High and low half of 128-bit integers, each (m,) uint64."""


class Streams:
    """Random numbers of m generators; stream i draws what `numpy.random.default_rng(seeds[i])` does.

    Args:
        seeds: (m,) uint64.
    """

    def __init__(self, seeds: np.ndarray) -> None:
        high, low, more_high, more_low = _seed_words(seeds)
        one, last = np.uint64(1), np.uint64(63)
        self._increment = (more_high << one | more_low >> last, more_low << one | one)
        self._state = _add(self._increment, (high, low))
        everyone = np.arange(len(seeds))
        self._step(everyone)
        self._spare = np.zeros(len(seeds), dtype=np.uint64)
        """The second half of the last 64 bits."""
        self._has_spare = np.zeros(len(seeds), dtype=bool)

    def up_to(self, of: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Returns a uniform integer in [0, most] of each of some streams.

        Args:
            of: (k,) integers, different streams.
            most: (k,) int64, at least 0 and below 2**32 - 1; where it is 0, nothing is drawn.
        """
        drawn = np.zeros(len(of), dtype=np.int64)
        drawing = np.flatnonzero(most)
        span = most[drawing].astype(np.uint64) + np.uint64(1)
        product = self._next32(of[drawing]) * span
        # So many of the 2**32 values would be one too many for some of the results.
        rejected = (np.uint64(1 << 32) - span) % span
        while len(again := np.flatnonzero((product & LOW) < rejected)):
            product[again] = self._next32(of[drawing[again]]) * span[again]
        drawn[drawing] = product >> HALF
        return drawn

    def within(self, of: np.ndarray, most: np.ndarray) -> np.ndarray:
        """As `up_to`, by the other of numpy's two ways (with which it shuffles): as many bits as `most` has, drawn
        until they are no more; `most` must be at least 1.
        """
        mask = most.astype(np.uint64)
        for shift in (1, 2, 4, 8, 16):
            mask |= mask >> np.uint64(shift)
        drawn = (self._next32(of) & mask).astype(np.int64)
        while len(again := np.flatnonzero(drawn > most)):
            drawn[again] = self._next32(of[again]) & mask[again]
        return drawn

    def _next32(self, of: np.ndarray) -> np.ndarray:
        """Returns the next 32 bits, as uint64: half of the next 64 bits, the low one first."""
        spare = self._has_spare[of]
        value = self._spare[of]
        fresh = of[~spare]
        bits = self._next64(fresh)
        value[~spare], self._spare[fresh] = bits & LOW, bits >> HALF
        self._has_spare[of] = ~spare
        return value

    def _next64(self, of: np.ndarray) -> np.ndarray:
        self._step(of)
        high, low = self._state[0][of], self._state[1][of]
        mixed, turn = high ^ low, high >> np.uint64(58)
        return mixed >> turn | mixed << (-turn & np.uint64(63))

    def _step(self, of: np.ndarray) -> None:
        state = _multiply((self._state[0][of], self._state[1][of]), MULTIPLIER)
        self._state[0][of], self._state[1][of] = _add(state, (self._increment[0][of], self._increment[1][of]))


# ------------------------------------------------------------------------------------------- choices and permutations


def choose(parts: Ragged, counts: np.ndarray, names: np.ndarray, root: int, *scope: str | int) -> np.ndarray:
    """Chooses rows of each part without repetition.

    Args:
        parts: m parts.
        counts: (m,) int64, how many rows of each.
        names: (m,) integers, e.g. clients, each of which has a generator of its own.
        root: the experiment's seed.
        scope: what the numbers are for.

    Returns:
        (counts.sum(),) int64, in any order: of part k those that `numpy_generator(root, *scope, names[k])` chooses by
        `choice(parts[k], counts[k], replace=False)`.
    """
    lengths = parts.lengths
    whole = counts == lengths
    chosen = [parts.rows[np.repeat(whole, lengths)]]
    drawn = ~whole & (counts > 0)
    side_by_side = np.flatnonzero(drawn & (counts <= MOST_STEPS) & (lengths <= FLOYD))
    order = side_by_side[np.argsort(-counts[side_by_side], kind="stable")]  # those that still draw are the first ones
    for of in _pieces(order):
        streams = Streams(derive_seeds(root, *scope, last=names[of]))
        chosen.append(parts.rows[_floyd(streams, lengths[of], counts[of]) + np.repeat(parts.offsets[of], counts[of])])
    for k in np.flatnonzero(drawn & ((counts > MOST_STEPS) | (lengths > FLOYD))).tolist():
        rng = numpy_generator(root, *scope, int(names[k]))
        chosen.append(rng.choice(parts[k], counts[k], replace=False))
    return np.concatenate(chosen)


def _floyd(streams: Streams, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns (counts.sum(),) int64 positions in [0, size), stream by stream; `counts` must not rise."""
    chosen = np.full((len(counts), int(counts.max(initial=0))), -1)
    for step in range(chosen.shape[1]):
        drawing = np.arange(np.searchsorted(-counts, -step))  # whose count is larger
        last = sizes[drawing] - counts[drawing] + step
        value = streams.up_to(drawing, last)
        repeated = (chosen[drawing, :step] == value[:, None]).any(1)
        chosen[drawing, step] = np.where(repeated, last, value)
    return chosen[chosen >= 0]


def permute(parts: Ragged, names: np.ndarray, root: int, *scope: str | int) -> Ragged:
    """Returns the rows of each part in random order; arguments as for `choose`.

    Part k is `numpy_generator(root, *scope, names[k]).permutation(parts[k])`.
    """
    lengths, rows = parts.lengths, parts.rows.copy()
    side_by_side = np.flatnonzero((lengths > 1) & (lengths <= MOST_STEPS))
    order = side_by_side[np.argsort(-lengths[side_by_side], kind="stable")]
    for of in _pieces(order):
        streams = Streams(derive_seeds(root, *scope, last=names[of]))
        place = np.repeat(parts.offsets[of], lengths[of]) + _fisher_yates(streams, lengths[of])
        rows[parts.places(of)] = parts.rows[place]
    for k in np.flatnonzero(lengths > MOST_STEPS).tolist():
        rows[parts.offsets[k] : parts.offsets[k + 1]] = numpy_generator(root, *scope, int(names[k])).permutation(
            parts[k]
        )
    return Ragged(rows, parts.offsets)


def _fisher_yates(streams: Streams, sizes: np.ndarray) -> np.ndarray:
    """Returns (sizes.sum(),) int64, a permutation of [0, size) of each stream; `sizes` must not rise."""
    order = np.tile(np.arange(int(sizes.max(initial=0))), (len(sizes), 1))
    inside = order < sizes[:, None]
    for step in range(order.shape[1] - 1):
        drawing = np.arange(np.searchsorted(-sizes, -step - 1))  # where more than one is left
        last = sizes[drawing] - 1 - step
        chosen = streams.within(drawing, last)
        order[drawing, last], order[drawing, chosen] = order[drawing, chosen], order[drawing, last]
    return order[inside]


def _pieces(order: np.ndarray) -> list[np.ndarray]:
    return [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]


# ---------------------------------------------------------------------------------------------- seeds, 128-bit integers


def _seed_words(seeds: np.ndarray) -> list[np.ndarray]:
    """Returns four arrays (m,) uint64: `SeedSequence(seed).generate_state(4, numpy.uint64)` of each seed."""
    entropy = [(seeds & LOW).astype(np.uint32), (seeds >> HALF).astype(np.uint32)]
    nothing = np.zeros(len(seeds), dtype=np.uint32)
    hashed = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word) for word in (*entropy, nothing, nothing)]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed: np.ndarray = pool[target] * LEFT - hashed(pool[source]) * RIGHT
                pool[target] = mixed ^ mixed >> HALF_WORD
    hashed = _Hash(0x8B51F9DD, 0x58F38DED)
    words = [hashed(pool[place % 4]).astype(np.uint64) for place in range(8)]
    return [low | high << HALF for low, high in zip(words[::2], words[1::2], strict=True)]


class _Hash:
    """SeedSequence's hash, whose constant changes with every call."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, word: np.ndarray) -> np.ndarray:
        word = word ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & 0xFFFFFFFF
        word *= np.uint32(self._constant)
        word ^= word >> HALF_WORD
        return word


def _add(first: Pair, second: Pair) -> Pair:
    low = first[1] + second[1]
    return first[0] + second[0] + (low < second[1]), low


def _multiply(first: Pair, second: tuple[np.uint64, np.uint64]) -> Pair:
    """Returns products modulo 2**128."""
    a, b = first[1] & LOW, first[1] >> HALF
    c, d = second[1] & LOW, second[1] >> HALF
    middle = a * d + (a * c >> HALF)
    other = b * c + (middle & LOW)
    carried = b * d + (middle >> HALF) + (other >> HALF)
    return first[0] * second[1] + first[1] * second[0] + carried, first[1] * second[1]
