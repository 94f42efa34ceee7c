"""Search for the circulants behind `hadamard_data.safetensors`; needed only to make that file again.

``python -m mqbench.kernels.hadamard_search hadamard_data.safetensors`` rewrites it in about a minute on one core.

A Goethals-Seidel array of order 4 n needs four +-1 sequences of length n whose periodic autocorrelations cancel at
every non-zero shift. Asking each sequence to be constant on the orbits of a group of multipliers modulo n leaves a few
thousand candidates at most; two pairs that cancel are then found by sorting the sums of a linear hash of their
autocorrelations.
"""

from __future__ import annotations

import sys
from math import gcd

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

MULTIPLIERS: dict[int, tuple[int, ...]] = {
    23: (22,),
    29: (28,),
    39: (29,),
    43: (4,),
    65: (36,),
    73: (2,),
    93: (2,),
    119: (2,),
}
"""Circulant length -> generators of its multiplier group, for the orders 4 n up to 512 that this search reaches."""


def find_rows(length: int, generators: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.int8]:
    """Find the first rows of four circulants for the Goethals-Seidel array.

    Args:
        length: Circulant length n.
        generators: Units modulo n; each sequence is constant on the orbits of the group they generate.
        seed: Seed of the hash; it decides nothing but which matches are looked at first.

    Returns:
        Rows of +1 and -1, shape (4, n), dtype int8.

    Raises:
        ValueError: When this multiplier group admits no solution.
    """
    sequences, correlations = _candidates(length, generators)
    weights = np.random.default_rng(seed).integers(-(2**62), 2**62, length - 1)
    hashes = (correlations * weights).sum(axis=1)
    first, second = np.triu_indices(len(sequences))
    sums = hashes[first] + hashes[second]
    order = np.argsort(sums, kind="stable")
    found = np.minimum(np.searchsorted(sums[order], -sums), len(sums) - 1)
    for pair in np.flatnonzero(sums[order[found]] == -sums):
        other = order[found[pair]]
        chosen = [first[pair], second[pair], first[other], second[other]]
        if not correlations[chosen].sum(axis=0).any():
            return sequences[chosen].astype(np.int8)
    raise ValueError(f"no Goethals-Seidel rows of length {length} are invariant under the multipliers {generators}")


def _candidates(length: int, generators: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Invariant sequences (M, n) with distinct autocorrelations (M, n - 1) and no power above the total of 4 n."""
    orbits = _orbits(length, generators)
    signs = 2 * (np.arange(2 ** len(orbits))[:, None] >> np.arange(len(orbits)) & 1) - 1
    sequences = np.ones((len(signs), length), dtype=np.int64)
    for column, orbit in enumerate(orbits):
        sequences[:, orbit] = signs[:, [column]]
    power = np.abs(np.fft.fft(sequences, axis=1)) ** 2
    possible = (power <= 4 * length + 1e-6).all(axis=1)
    correlations = np.rint(np.fft.ifft(power[possible], axis=1).real).astype(np.int64)[:, 1:]
    correlations, kept = np.unique(correlations, axis=0, return_index=True)
    return sequences[possible][kept], correlations


def _orbits(length: int, generators: tuple[int, ...]) -> list[list[int]]:
    """Orbits of the multiplier group on 1 .. length - 1, each sorted, in order of their smallest member."""
    if any(gcd(generator, length) != 1 for generator in generators):
        raise ValueError(f"multipliers {generators} must be coprime to {length}")
    orbits: list[list[int]] = []
    unseen = set(range(1, length))
    while unseen:
        orbit = {min(unseen)}
        while grown := {member * g % length for member in orbit for g in generators} - orbit:
            orbit |= grown
        unseen -= orbit
        orbits.append(sorted(orbit))
    return orbits


def main(path: str) -> None:
    """Search every length of `MULTIPLIERS` and write order -> rows, shape (4, n), to a safetensors file."""
    rows = {str(4 * length): find_rows(length, generators) for length, generators in MULTIPLIERS.items()}
    save_file(rows, path)


if __name__ == "__main__":
    main(sys.argv[1])
