"""Sign-flip tests of paired differences, exact for few units, corrected over a family by the greatest statistic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.statistics.arrays import BLOCK_BYTES, Floats, count_reaching

# A flipped sum that equals the observed one is rounded differently by the matrix product (about 1e-15 of a
# statistic scaled to variance 1). Statistics closer than this count as equal, as they do in exact arithmetic.
_TIE = 1e-10
# Pairs that a test takes where others have as many: with fewer no p can be below .05, yet a t is so often infinite when
# flipped that it would decide the family's greatest.
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class Patterns:
    """The sign patterns that units are flipped by: all 2^n when these are no more than B + 1, else B random ones."""

    units: int
    permutations: int
    seed: int

    @property
    def exact(self) -> bool:
        """Whether all 2^n patterns are enumerated."""
        return self.units < 63 and 2**self.units <= self.permutations + 1

    @property
    def count(self) -> int:
        """Patterns behind a p-value, the observed one included."""
        return 2**self.units if self.exact else self.permutations + 1

    @property
    def floor(self) -> float:
        """Least p-value attainable: an enumeration holds the observed pattern and its mirror image; 1 without units."""
        return min(1.0, (2 if self.exact else 1) / self.count)

    def blocks(self, rows: int) -> Iterator[Floats]:
        """±1 [pattern, unit], at most `rows` patterns at a time; the patterns do not depend on `rows`."""
        return self._all_signs(rows) if self.exact else self._random_signs(rows)

    def p(self, reached: NDArray[np.intp]) -> Floats:
        """p-values from how many of the patterns in `blocks` reach the observed statistic."""
        observed = 0 if self.exact else 1  # an enumeration holds the observed pattern already
        result: Floats = (reached + observed) / self.count
        return result

    def _all_signs(self, rows: int) -> Iterator[Floats]:
        for start in range(0, self.count, rows):
            codes = np.arange(start, min(start + rows, self.count))
            yield np.where((codes[:, None] >> np.arange(self.units)) & 1, -1.0, 1.0)

    def _random_signs(self, rows: int) -> Iterator[Floats]:
        generator = np.random.default_rng(self.seed)
        words = -(-self.units // 64)
        for start in range(0, self.permutations, rows):
            size = (min(rows, self.permutations - start), words)
            # Whole 64-bit draws, so that a pattern starts on a draw of its own; little-endian, so that machines agree.
            drawn = generator.integers(0, 2**64, size=size, dtype=np.uint64).astype("<u8")
            signs = np.unpackbits(drawn.view(np.uint8), axis=1, count=self.units).astype(np.float64)
            signs *= 2  # in place: ten times as fast as a choice between 1 and −1, and a tenth of the whole test
            signs -= 1
            yield signs


@dataclass(frozen=True)
class SignFlip:
    """p-values [test], of each test by itself and adjusted over the family, and the patterns behind them."""

    p: Floats
    p_max_t: Floats
    patterns: Patterns


def sign_flip(
    differences: Floats, *, permutations: int = 9999, seed: int = 0, block_bytes: int = BLOCK_BYTES
) -> SignFlip:
    """Two-sided sign-flip test of every column of [unit, test], with max-T over all columns; NaN is a missing pair.

    Under the null hypothesis a unit's differences could as well have had the opposite sign, all of them together:
    a flip multiplies a whole row by −1, which keeps the dependence between the tests. A pattern's statistic is the
    greatest |t| over the family; p_max_t is the share of patterns whose statistic reaches a test's own |t|.
    That controls the family-wise error under any dependence, provided that the differences are symmetric about zero
    under the null hypothesis: as the mean differences of training runs or classes may be taken to be, and as those of
    an outcome that is 0 or 1 are. Those of metrics over images are not: `bootstrap_max_t` is for them.

    A column's Σd² does not change under flips, so t² = (n−1) r² / (n − r²) with r = Σ s·d / √Σd²: one matrix product
    of signs and normalised differences gives every statistic of a block of flips. r is bounded by √n, also where t
    is infinite, hence comparisons are made on r with equal counts and tied values count as equal.

    A test takes part with at least 2 pairs, and no fewer than 6 or the most that any has, whichever is less; the others
    have no p. Units without any value are none.

    Source:
        Westfall and Young (1993), Resampling-based multiple testing; Nichols and Holmes (2002), Human Brain Mapping
        15:1–25; (b + 1)/(B + 1): Phipson and Smyth (2010), doi:10.2202/1544-6115.1585.
    """
    n_tests = differences.shape[1]
    valid = ~np.isnan(differences)
    pairs = valid.sum(axis=0)
    tested = enough_to_flip(pairs)
    units = valid[:, tested].any(axis=1)
    p, p_max_t = np.full((2, n_tests), np.nan)
    patterns = Patterns(int(units.sum()), permutations, seed)
    if not tested.any():
        return SignFlip(p, p_max_t, patterns)

    z = normalised(differences[np.ix_(units, tested)])
    counts = pairs[tested]
    balanced = bool((counts == counts[0]).all())
    observed = np.abs(z.sum(axis=0))
    threshold = np.maximum(observed - _TIE * (1 + observed), 0)

    rows = max(1, block_bytes // (8 * (z.shape[0] + 2 * z.shape[1])))
    reached = np.zeros(z.shape[1], dtype=np.intp)
    greatest = []
    for signs in patterns.blocks(rows):
        r = np.abs(signs @ z)
        reached += (r >= threshold).sum(axis=0)
        # With equal n, t grows with r: the greatest r is the greatest t and no division is needed.
        greatest.append((r if balanced else t_squared(r, counts)).max(axis=1))
    limit = threshold if balanced else t_squared(threshold, counts)
    p[tested], p_max_t[tested] = patterns.p(reached), patterns.p(count_reaching(greatest, limit))
    return SignFlip(p, p_max_t, patterns)


def enough_to_flip(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tests, of so many pairs, take part in a family whose signs are flipped."""
    return np.asarray(pairs >= max(2, min(FEWEST_PAIRS, pairs.max(initial=0))))


def normalised(differences: Floats) -> Floats:
    """Columns divided by their root sum of squares; 0 for missing values and for columns of zeros."""
    d = np.nan_to_num(differences, nan=0.0)
    greatest = np.abs(d).max(axis=0)
    d /= np.where(greatest > 0, greatest, 1)  # first, so that squares neither overflow nor vanish
    norm = np.sqrt(np.einsum("ij,ij->j", d, d))
    d /= np.where(norm > 0, norm, 1)
    return d


def t_squared(r: Floats, counts: NDArray[np.int64]) -> Floats:
    """t² of r = Σ s·d / √Σd² for tests of `counts` pairs; infinite where all flipped differences are equal."""
    r2 = r * r
    with np.errstate(divide="ignore"):
        result: Floats = (counts - 1) * r2 / np.maximum(counts - r2, 0)
    return result
