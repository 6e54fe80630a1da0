"""A detector of the shapes world's objects that needs no network.

It fits each of the six shapes to every blob by least squares. A detection's score says how much of the picture around
it the fitted shape explains, so it is high for what the world draws and for nothing else.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from pisces_jax.evaluation.geneval import Detection
from pisces_jax.evaluation.relations import Box
from pisces_jax.shapes_world.scene import CANVAS, COLORS, GROUND_LEVEL, SHAPES, SIZES, coverage

Blob = tuple[np.ndarray, ...]
"""rows and columns of its pixels"""

_NAMES = tuple(COLORS)
_PALETTE = np.array([COLORS[name] for name in _NAMES], np.float32)

# Lengths and areas are in canvas units of 32, whatever the picture's size.
_FIT_SIZES = (SIZES[0] - 1.0, SIZES[1] + 2.0)
_LEAST_AREA = 8.0  # the smallest shape covers 50
_MARGIN = 2.0  # ground around a blob that the fitted shape must leave free
_STEP = 0.25  # of the numerical derivatives
_MOST_NOISE = 8.0  # standard deviation, in levels, that counts as noise and does not lower a score
_BLURS = (0.0, 0.3, 0.5)  # sigma of the Gaussian blur that a picture may have
_ROUNDS, _ROUNDS_FOR_ALL = 7, 2  # after _ROUNDS_FOR_ALL only the three best shapes are fitted further
_SETTLED = 0.02  # a smaller step ends the fit
_GOOD = 0.97  # share above which no other start is tried
_MOST_BLOBS = 16  # GenEval keeps at most 16 of a class

# True shapes, even blurred by 0.5 px and noisy, leave at most 0.02 of the energy unexplained, and at most 0.4 of what
# the next best shape leaves. Half shapes, blobs and rounded squares leave more.
_HALF_SURE, _SHARPNESS = 0.965, 0.005  # the share that scores 0.5; this much more scores 0.73
_CLEAR, _UNCLEAR = 0.45, 0.85  # unexplained energy over the next best shape's: below, the score is full; above, 0
_COLOR_NEAR, _COLOR_FAR = 40.0, 90.0  # distance from the named colour: below, the score is full; above, 0


@dataclasses.dataclass
class _Fit:
    """Shape `label` at `x`, `y`, of side `size`, blurred over `soft`, all in pixels; its colour is ground + `rise`."""

    label: str
    x: float
    y: float
    size: float
    soft: float
    rise: Float[np.ndarray, "3"]
    share: float = 0.0  # of the window's energy, without the noise's, that is explained
    lead: float = 1.0  # unexplained energy over that of the next best shape


class ShapesDetector:
    """Finds the shapes world's objects in pictures of any size, square or not.

    1. The ground is the median of the greyish pixels.
    2. Each pixel is explained as a mixture of ground and one of the ten colours; connected solid pixels of one colour
       form a blob.
    3. All six shapes are fitted to each blob (place, size, colour) by Gauss-Newton, then once more with the other
       objects' fits subtracted.
    4. The score comes from the share of the picture around the blob that the best shape explains, its lead over the
       next best, and how near its colour is to a named one.
    """

    labels = SHAPES

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[Detection]:
        scale = min(image.shape[:2]) / CANVAS
        ground, noise = _find_ground(image)
        # A fit sees ground beyond the edge: the world cuts no shape off, and a shape that is cut off is not right.
        pad = math.ceil(_MARGIN * scale)
        above = np.pad(image.astype(np.float32) - ground, ((pad, pad), (pad, pad), (0, 0)))
        blobs = _find_blobs(*_unmix(above, ground), least_area=_LEAST_AREA * scale**2)[:_MOST_BLOBS]
        owner = np.full(above.shape[:2], -1)
        for i, blob in enumerate(blobs):
            owner[blob] = i
        windows = [_window(blob, pad) for blob in blobs]
        fitter = _Fitter(noise, scale)
        fits, crowded = [], []
        for i, (blob, window) in enumerate(zip(blobs, windows, strict=True)):
            others = (owner[window] != i) & (owner[window] != -1)
            crowded.append(bool(others.any()))
            fits.append(fitter.first_fit(above[window] * ~others[..., None], window, blob))
        found = []
        for fit, window, has_others in zip(fits, windows, crowded, strict=True):
            others = [other for other in fits if other is not fit and _meet(window, other)]
            if others or has_others:
                drawn = sum(_template(other, window)[..., None] * other.rise for other in others)
                fit = fitter.fit(above[window] - drawn, window, fit, rounds=2)
            found.append(_detection(fit, ground, pad))
        found.sort(key=lambda detection: -detection.score)
        kept: list[Detection] = []
        for detection in found:
            if not any(_same_place(detection.box, other.box) for other in kept):
                kept.append(detection)
        return kept


def _find_ground(image: UInt8[np.ndarray, "H W 3"]) -> tuple[Float[np.ndarray, "3"], float]:
    """The ground's colour and the noise's variance, summed over channels.

    They are the median of the pixels near the greys that the ground may have (of all pixels if these are few), and the
    variance that follows from their median absolute deviation.
    """
    pixels = image.reshape(-1, 3).astype(np.float32)
    least, most = pixels.min(1), pixels.max(1)
    grey = (least > GROUND_LEVEL[0] - 20) & (most < GROUND_LEVEL[1] + 20) & (most - least < 36)
    chosen = pixels[grey] if grey.mean() > 0.1 else pixels
    ground = np.median(chosen, axis=0)
    deviation = np.minimum(1.4826 * np.median(np.abs(chosen - ground), axis=0), _MOST_NOISE)
    return ground, float((deviation * deviation).sum())


def _unmix(
    above: Float[np.ndarray, "H W 3"], ground: Float[np.ndarray, "3"]
) -> tuple[Int[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
    """The colour that, mixed with ground, comes nearest to each pixel, and whether it is more than half of the mix."""
    rises = _PALETTE - ground
    norms = (rises * rises).sum(1)
    along = above @ rises.T
    part = np.clip(along / norms, 0, 1.1)
    error = part * part * norms - 2 * part * along  # plus |above|^2, the same for all colours
    color = error.argmin(-1)
    return color, np.take_along_axis(part, color[..., None], -1)[..., 0] > 0.5


def _find_blobs(color: Int[np.ndarray, "H W"], solid: Bool[np.ndarray, "H W"], least_area: float) -> list[Blob]:
    """Each set of solid pixels of one colour that share edges, largest first."""
    blobs = []
    for one in np.unique(color[solid]):
        labels, _ = ndimage.label(solid & (color == one))
        areas = np.bincount(labels.ravel())
        blobs += [np.nonzero(labels == i) for i in range(1, len(areas)) if areas[i] >= least_area]
    # Of blobs of one size, the one that reaches furthest down comes first, then furthest right.
    blobs.sort(key=lambda blob: (blob[0].size, blob[0][-1], blob[1][-1]), reverse=True)
    return blobs


def _window(blob: Blob, margin: int) -> tuple[slice, slice]:
    rows, columns = (slice(int(places.min()) - margin, int(places.max()) + 1 + margin) for places in blob)
    return rows, columns


def _starts(blob: Blob, scale: float) -> Iterator[_Fit]:
    """Where fits start: at the blob's box, and at its centre of mass, which stray pixels hardly move."""
    (y0, x0), (y1, x1) = np.min(blob, axis=1), np.max(blob, axis=1) + 1
    mean_y, mean_x = np.mean(blob, axis=1) + 0.5
    for x, y, size in (
        ((x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0)),
        (mean_x, mean_y, 1.3 * math.sqrt(blob[0].size)),
    ):
        size = min(max(size, _FIT_SIZES[0] * scale), _FIT_SIZES[1] * scale)
        yield _Fit("", float(x), float(y), float(size), math.sqrt(1 + scale**2), np.zeros(3))


class _Fitter:
    """Fits shapes to windows of one picture, with noise of this variance in each pixel."""

    def __init__(self, noise: float, scale: float):
        self.noise, self.scale = noise, scale
        self.sizes = [size * scale for size in _FIT_SIZES]
        # A box of side sqrt(1 + 12 sigma^2) has the variance of a pixel's box and a Gaussian of that sigma.
        self.softs = [math.sqrt(1 + 12 * (sigma * scale) ** 2) for sigma in _BLURS]

    def first_fit(self, seen: Float[np.ndarray, "h w 3"], window: tuple[slice, slice], blob: Blob) -> _Fit:
        """The best fit from the blob's box and, unless that one is good, from its centre of mass."""
        fits = []
        for start in _starts(blob, self.scale):
            fits.append(self.fit(seen, window, start))
            if fits[-1].share > _GOOD:
                break
        return max(fits, key=lambda fit: fit.share)

    def fit(
        self, seen: Float[np.ndarray, "h w 3"], window: tuple[slice, slice], start: _Fit, rounds: int = _ROUNDS
    ) -> _Fit:
        """The shape that explains most of `seen` in this window.

        For a template t the best rise of colour is `u = t.seen / t.t`, which explains the share
        `|t.seen|^2 / (t.t |seen|^2)`. Gauss-Newton fits (x, y, size, strength) to the picture's component along u, for
        all shapes at once.
        """
        pixels = seen.reshape(-1, 3)
        energy = float((pixels * pixels).sum()) + 1e-6
        columns, rows = _centres(window)
        step = _STEP * self.scale
        nudges = np.eye(4, 3, -1, dtype=np.float32)  # none, x, y, size
        shapes = np.arange(len(SHAPES))
        at = np.tile(np.array([start.x, start.y, start.size], np.float32), (len(shapes), 1))
        best_at, best_gain, change = at.copy(), np.zeros(len(shapes), np.float32), np.zeros_like(at)
        for i in range(rounds + 1):
            step = -step  # coverage has kinks; this looks at them from both sides in turn
            templates = np.stack(
                [
                    _soft(SHAPES[k], columns - p[:, :1], rows - p[:, 1:2], p[:, 2, None, None], start.soft)
                    for k, p in zip(shapes, at[:, None] + step * nudges, strict=True)
                ]
            ).reshape(len(shapes), 4, -1)
            base = templates[:, 0]
            along = base @ pixels  # [shapes, 3]
            gain = (along * along).sum(1) / ((base * base).sum(1) + 1e-6)
            better = (gain > best_gain)[:, None]
            best_at, best_gain = np.where(better, at, best_at), np.maximum(gain, best_gain)
            lead = int(best_gain.argmax())
            settled = i > _ROUNDS_FOR_ALL and np.abs(change[lead]).max() < _SETTLED * self.scale
            if i == rounds or settled:
                break
            residual = (along @ pixels.T) / (gain[:, None] + 1e-6) - base
            slopes = np.concatenate([(templates[:, 1:] - base[:, None]) / step, base[:, None]], axis=1)
            normal = slopes @ slopes.transpose(0, 2, 1) + 1e-3 * np.eye(4, dtype=np.float32)
            newton = np.linalg.solve(normal, slopes @ residual[..., None])[:, :3, 0]
            # Where the last step was too long, go back and try half.
            change = np.where(better, np.clip(newton, -self.scale, self.scale), change / 2)
            at = best_at + change
            at[:, 2] = at[:, 2].clip(self.sizes[0], self.sizes[1])
            if i == _ROUNDS_FOR_ALL:
                order = np.argsort(-best_gain)[:3]
                shapes, at, change = shapes[order], at[order], change[order]
                best_at, best_gain = best_at[order], best_gain[order]
        noise = self.noise * len(pixels)

        def finish(k: int, soft: float) -> _Fit:
            x, y, size = map(float, best_at[k])
            template = _soft(SHAPES[shapes[k]], columns - x, rows - y, size, soft).ravel()
            square = float(template @ template) + 1e-6
            along = template @ pixels
            unexplained = max(energy - float(along @ along) / square - noise, 0.0)
            share = 1 - unexplained / max(energy - noise, 1e-6)
            return _Fit(SHAPES[shapes[k]], x, y, size, soft, along / square, share)

        best = max((finish(lead, soft) for soft in self.softs), key=lambda fit: fit.share)
        fits = [best] + [finish(k, best.soft) for k in range(len(shapes)) if k != lead]
        fits.sort(key=lambda fit: -fit.share)
        fits[0].lead = (1 - fits[0].share) / max(1 - fits[1].share, 1e-6)
        return fits[0]


def _centres(window: tuple[slice, slice]) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, " h"]]:
    rows, columns = (np.arange(part.start, part.stop, dtype=np.float32) + 0.5 for part in window)
    return columns, rows


def _soft(shape: str, x: np.ndarray, y: np.ndarray, size: float | np.ndarray, soft: float) -> np.ndarray:
    """`coverage`, blurred: that of pixels `soft` wide instead of 1."""
    return coverage(shape, x / soft, y / soft, size / soft)


def _template(fit: _Fit, window: tuple[slice, slice]) -> Float[np.ndarray, "h w"]:
    columns, rows = _centres(window)
    return _soft(fit.label, columns - fit.x, rows - fit.y, fit.size, fit.soft)


def _meet(window: tuple[slice, slice], fit: _Fit) -> bool:
    """Whether the fitted shape reaches into the window."""
    reach = (fit.size + fit.soft) / 2
    return all(
        part.start < centre + reach and centre - reach < part.stop
        for part, centre in zip(window, (fit.y, fit.x), strict=True)
    )


def _detection(fit: _Fit, ground: Float[np.ndarray, "3"], pad: int) -> Detection:
    distances = np.linalg.norm(_PALETTE - (ground + fit.rise), axis=1)
    nearest = int(distances.argmin())
    fits = 1 / (1 + math.exp((_HALF_SURE - fit.share) / _SHARPNESS))
    clear = min(max((_UNCLEAR - fit.lead) / (_UNCLEAR - _CLEAR), 0), 1)
    colored = min(max((_COLOR_FAR - distances[nearest]) / (_COLOR_FAR - _COLOR_NEAR), 0), 1)
    half = fit.size / 2
    x, y = fit.x - pad, fit.y - pad
    box = (x - half, y - half, x + half, y + half)
    return Detection(fit.label, box, float(fits * clear * colored), _NAMES[nearest])


def _same_place(a: Box, b: Box) -> bool:
    """Whether two boxes share more than 0.3 of their union, as two objects of this world never do."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return False
    shared = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared > 0.3 * (areas - shared)
