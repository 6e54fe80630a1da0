"""The shapes detector: right on what the world draws, unsure of everything else."""

import collections
import os
import random

import numpy as np
import pytest

from pisces_jax.shapes_world.detector import ShapesDetector, _find_blobs
from pisces_jax.shapes_world.scene import COLORS, SHAPES, render, sample_scene

# All 10,000 clean and 2,000 spoilt pictures take minutes on two busy cores.
CLEAN, SPOILT = (10_000, 2_000) if os.environ.get("PISCES_LONG_TESTS") else (600, 300)


def blurred(image, sigma):
    """A Gaussian blur of `sigma` pixels, edges repeated."""
    reach = int(4 * sigma) + 1
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    image = np.pad(image.astype(float), ((reach, reach), (reach, reach), (0, 0)), "edge")
    for axis in (0, 1):
        image = np.apply_along_axis(lambda line: np.convolve(line, weights, "valid"), axis, image)
    return image


def as_picture(image):
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def share_right(count, size, spoil):
    """Share of pictures in which just the true objects are found, each within half a canvas unit, above 0.9."""
    detector, right, misses = ShapesDetector(), 0, []
    for i in range(count):
        scene = sample_scene(random.Random(f"detect/{size}/{i}"), "held_out" if i % 2 else "train")
        picture = render(scene, size)
        if spoil:
            noise = np.random.default_rng(i).normal(0, 6, picture.shape)
            picture = as_picture(blurred(picture, 0.5 * size / 32) + noise)
        scale = size / 32
        found = detector.detect(picture)
        matched = collections.Counter()
        for d in found:
            for k, o in enumerate(scene.objects):
                near = np.abs(np.array(d.box) / scale - o.box).max() < 0.5
                matched[k] += near and d.score > 0.9 and (d.label, d.color) == (o.shape, o.color)
        good = len(found) == len(scene.objects) == sum(matched.values()) and max(matched.values()) == 1
        right += good
        if not good:
            misses.append(i)
    print(f"{right}/{count} at {size}; wrong: {misses}")
    return right / count


def test_exact_on_the_worlds_pictures():
    assert share_right(CLEAN, 32, spoil=False) >= 0.995


def test_nearly_exact_on_blurred_and_noisy_pictures():
    assert share_right(SPOILT, 32, spoil=True) >= 0.99


@pytest.mark.parametrize("spoil", [False, True])
def test_other_sizes(spoil):
    assert share_right(25, 64, spoil) == 1
    assert share_right(10, 48, spoil) == 1


def test_blobs_are_what_flood_filling_finds():
    """Also their order, where several are of one size: first the one whose last pixel comes last."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        color, solid = rng.integers(0, 3, (12, 15)), rng.random((12, 15)) < 0.8
        waiting, blobs = {tuple(place) for place in np.argwhere(solid)}, []
        while waiting:
            blob = edge = {max(waiting)}
            while edge:
                near = {(r + dr, c + dc) for r, c in edge for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0))}
                edge = {p for p in near & waiting - blob if color[p] == color[min(blob)]}
                blob = blob | edge
            waiting -= blob
            blobs.append(sorted(blob))
        expected = sorted((blob for blob in blobs if len(blob) >= 3), key=len, reverse=True)
        assert [list(zip(*map(list, blob), strict=True)) for blob in _find_blobs(color, solid, 2.5)] == expected


def test_nothing_is_found_in_nothing():
    detector, noise = ShapesDetector(), np.random.default_rng(0)
    assert detector.detect(np.full((32, 32, 3), 130, np.uint8)) == []
    assert detector.detect(as_picture(130 + noise.normal(0, 8, (32, 32, 3)))) == []
    for level in (0, 255):
        assert detector.detect(np.full((32, 32, 3), level, np.uint8)) == []
    random_picture = noise.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert all(d.score < 0.3 for d in detector.detect(random_picture))


# Pictures of things that are no shapes, or not one


def inside(shape, x, y):
    """Whether points are in a shape of half side 1 at the origin."""
    return {
        "circle": x * x + y * y < 1,
        "square": np.maximum(abs(x), abs(y)) < 1,
        "triangle": (abs(x) < (y + 1) / 2) & (y < 1),
        "diamond": abs(x) + abs(y) < 1,
        "cross": (np.maximum(abs(x), abs(y)) < 1) & (np.minimum(abs(x), abs(y)) < 0.36),
        "ring": (x * x + y * y < 1) & (x * x + y * y > 0.25),
    }[shape]


def painted(mask, seed, color=None, sigma=0.0):
    """A picture of what `mask(x, y)` says, half side 1, of some size, place and colour."""
    rng = random.Random(seed)
    x0, y0, half = rng.uniform(13, 19), rng.uniform(13, 19), rng.uniform(4.5, 7.0)
    color = color or rng.choice(list(COLORS))
    fine = 8
    at = (np.arange(32 * fine) + 0.5) / fine
    covered = mask((at[None] - x0) / half, (at[:, None] - y0) / half)
    covered = covered.reshape(32, fine, 32, fine).mean((1, 3))[..., None]
    image = 128 + covered * (np.array(COLORS[color]) - 128.0)
    return as_picture(blurred(image, sigma) if sigma else image)


def best_scores(mask, count=12, **how):
    found = [ShapesDetector().detect(painted(mask, seed, **how)) for seed in range(count)]
    return np.array([max((d.score for d in each), default=0.0) for each in found])


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_shapes_pass_the_same_test(shape):
    assert best_scores(lambda x, y: inside(shape, x, y)).min() > 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_half_shapes_are_no_shapes(shape):
    assert best_scores(lambda x, y: inside(shape, x, y) & (x < 0)).max() < 0.3
    assert best_scores(lambda x, y: inside(shape, x, y) & (x < 0), sigma=0.5).max() < 0.3
    three_quarters = best_scores(lambda x, y: inside(shape, x, y) & ~((x > 0) & (y > 0)))
    assert three_quarters.max() < 0.3


@pytest.mark.parametrize("pair", [("circle", "circle"), ("square", "circle"), ("ring", "ring"), ("cross", "square"),
                                  ("diamond", "diamond"), ("triangle", "triangle")])  # fmt: skip
def test_merged_shapes_are_not_one(pair):
    def merged(x, y):
        return inside(pair[0], x + 0.6, y) | inside(pair[1], x - 0.6, y)

    assert best_scores(merged).max() < 0.3


WRONG = {
    "flat ellipse": lambda x, y: x**2 + (y / 0.7) ** 2 < 1,
    "bar": lambda x, y: (abs(x) < 1) & (abs(y) < 0.6),
    "triangle upside down": lambda x, y: inside("triangle", x, -y),
    "thin ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.64),
    "frame": lambda x, y: inside("square", x, y) & ~inside("square", 2 * x, 2 * y),
    "letter L": lambda x, y: inside("square", x, y) & ~((x > -0.2) & (y < 0.2)),
    "letter T": lambda x, y: inside("square", x, y) & ((y < -0.4) | (abs(x) < 0.3)),
    "crescent": lambda x, y: inside("circle", x, y) & ~inside("circle", x - 0.6, y),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_shapes_are_none_of_the_six(name):
    assert best_scores(WRONG[name]).max() < 0.3


@pytest.mark.parametrize("name, most", [("rounded square", 1), ("ellipse", 0.9)])
def test_nearly_a_shape_is_not_sure(name, most):
    masks = {"rounded square": lambda x, y: x**4 + y**4 < 1, "ellipse": lambda x, y: x**2 + (y / 0.8) ** 2 < 1}
    assert np.median(best_scores(masks[name])) < 0.6
    assert best_scores(masks[name]).max() < most


@pytest.mark.parametrize("width", [0.5, 0.8])
def test_blobs_are_no_shapes(width):
    def blob(x, y):
        return np.exp(-(x * x + y * y) / (2 * width**2))

    assert best_scores(blob).max() < 0.3


@pytest.mark.parametrize("shape", ["cross", "ring", "diamond", "triangle"])
def test_much_blurred_shapes_are_not_sure(shape):
    assert best_scores(lambda x, y: inside(shape, x, y), sigma=1.5).max() < 0.9
    assert np.median(best_scores(lambda x, y: inside(shape, x, y), sigma=1.5)) < 0.5


def test_two_coloured_shapes_are_not_sure():
    left = painted(lambda x, y: inside("circle", x, y) & (x < 0), 1, "red")
    both = painted(lambda x, y: inside("circle", x, y), 1, "blue")
    both[left[..., 0] > 150] = left[left[..., 0] > 150]
    assert all(d.score < 0.3 for d in ShapesDetector().detect(both))


def test_cut_off_shapes_are_not_sure():
    picture = painted(lambda x, y: inside("circle", x, y), 2, "red")
    rows = np.flatnonzero((picture[..., 0] > 170).any(1))
    cut = np.concatenate([picture[rows.mean().astype(int) :], np.full((int(rows.mean()), 32, 3), 128, np.uint8)])
    assert cut.shape == picture.shape
    assert all(d.score < 0.3 for d in ShapesDetector().detect(cut))
