"""What a permutation null of a map of layers costs, against permuting whole matrices.

    python benchmarks/permutation_null.py

Processor time of one thread, both ways in one process; the maps are compared, too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time

import numpy as np

from sonde.analysis.arrays import kernels, null


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--slow", type=int, default=10, help="permutations of whole matrices")
    asked = parser.parse_args()
    generator = np.random.default_rng(0)
    n, sizes = asked.examples, [asked.examples]
    grams = [kernels.linear_gram(generator.normal(size=(n, 64))) for _ in range(asked.layers)]
    orders = null.permutations(sizes, asked.permutations)

    started = time.process_time()
    stack = np.stack([kernels.center(gram).ravel() for gram in grams])
    values = null.triangles(stack, sizes)
    maps = null.null_maps(values, values, sizes, orders)
    fast = time.process_time() - started

    started = time.process_time()
    slow_maps = [
        kernels.cka_matrix(grams, [gram[np.ix_(order, order)] for gram in grams])
        for order in orders[: asked.slow]
    ]
    slow = (time.process_time() - started) / len(slow_maps) * len(orders)

    started = time.process_time()
    for _ in range(10):
        values.T @ values
    product = (time.process_time() - started) / 10 * len(orders)

    print(f"{len(orders)} permutations of {asked.layers} x {asked.layers} layers, n = {n}")
    print(f"triangles, centring included: {fast:.1f} s of processor time")
    print(f"whole matrices: {slow:.1f} s, extrapolated from {len(slow_maps)}")
    print(f"ratio: {slow / fast:.0f}; of it the products alone: {product:.1f} s")
    print(f"largest difference: {np.abs(maps[: len(slow_maps)] - slow_maps).max():.1e}")


if __name__ == "__main__":
    main()
