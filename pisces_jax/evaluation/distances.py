"""How far sets of pictures are apart, and how much the pictures of one prompt differ; arrays in, numbers out."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

Features = Float[np.ndarray, "N D"]


def frechet(a: Features, b: Features) -> float:
    """The squared Fréchet distance of two Gaussians with the means and covariances of `a` and `b` (Heusel et al. 2017,
    arXiv 1706.08500, there of Inception's features): |μ_a − μ_b|² + tr(A + B − 2 (A B)^½).

    It is too large for few pictures: compare distances of sets of the same sizes.
    """
    mean = np.sum((a.mean(0, np.float64) - b.mean(0, np.float64)) ** 2)
    A, B = (np.cov(x.astype(np.float64), rowvar=False).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(np.maximum(values, 0))  # A = root rootᵀ, and A B has the eigenvalues of rootᵀ B root
    product = np.linalg.eigvalsh(root.T @ B @ root)
    return float(mean + np.trace(A) + np.trace(B) - 2 * np.sqrt(np.maximum(product, 0)).sum())


def nearest(
    images: UInt8[np.ndarray, "N S S 3"], known: UInt8[np.ndarray, "K S S 3"], block: int = 4096
) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """The number of the nearest of `known`, and its distance: root mean square difference of pixels in 0..1."""
    a = _flat(images)
    best, at = np.full(len(a), np.inf), np.zeros(len(a), int)
    for first in range(0, len(known), block):
        b = _flat(known[first : first + block])
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        here = squares.argmin(1)
        value = squares[np.arange(len(a)), here]
        at, best = np.where(value < best, first + here, at), np.minimum(value, best)
    # Of the nearest ones exactly: the sums above cancel where the distance is small.
    exact = [np.mean((x - _flat(known[i : i + 1])[0]) ** 2) for x, i in zip(a, at, strict=True)]
    return at, np.sqrt(np.array(exact))


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def pairs(groups: Sequence[Hashable]) -> Int[np.ndarray, "P 2"]:
    """All pairs of members of the same group."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    found = [(a, b) for same in members.values() for k, a in enumerate(same) for b in same[k + 1 :]]
    return np.array(found, int).reshape(-1, 2)


def apart(images: UInt8[np.ndarray, "N S S 3"], features: Features, chosen: Int[np.ndarray, "P 2"]) -> dict[str, float]:
    """Means over pairs: root mean square difference of pixels in 0..1, and distance of features."""
    pixels = [
        np.sqrt(np.mean((images[a].astype(np.float32) - images[b].astype(np.float32)) ** 2)) / 255 for a, b in chosen
    ]
    return {
        "pixels": float(np.mean(pixels)),
        "features": float(np.mean(np.linalg.norm(features[chosen[:, 0]] - features[chosen[:, 1]], axis=1))),
    }


def mean_and_error(values: Float[np.ndarray, "N"], groups: Sequence[Hashable]) -> tuple[float, float]:
    """The mean, and its standard error over groups of values that belong together, such as a prompt's pictures.

    With one value a group it is that of a share, √(p (1 − p) / (N − 1)), where values are 0 and 1.
    """
    names, number = np.unique(np.array(groups).astype(str), return_inverse=True)
    size = np.bincount(number)
    mean = float(np.mean(values))
    residual = np.bincount(number, weights=np.asarray(values, float) - mean)
    if len(names) < 2:
        return mean, float("nan")
    # Of a ratio of sums over groups, which may differ in size.
    scale = len(names) / (len(names) - 1)
    return mean, float(np.sqrt(scale * np.sum(residual**2)) / size.sum())


def bootstrap(of: Callable[[np.ndarray], float], groups: Sequence[Hashable], rounds: int = 50, seed: int = 0) -> float:
    """The standard error of `of(numbers)` by drawing whole groups with replacement."""
    rng = np.random.default_rng(seed)
    names, number = np.unique(np.array(groups).astype(str), return_inverse=True)
    members = [np.flatnonzero(number == g) for g in range(len(names))]
    values = [of(np.concatenate([members[g] for g in rng.integers(0, len(names), len(names))])) for _ in range(rounds)]
    return float(np.std(values, ddof=1))
