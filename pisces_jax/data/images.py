"""Pictures from files or bytes to square `uint8` RGB arrays."""

import dataclasses
import io
import os
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from pisces_jax.utils.errors import UserError

# Larger pictures are refused before they are decoded (a small file can claim any size): 128 megapixels, above
# any photograph of these data sets.
MAX_PIXELS = 128 * 1024 * 1024
# Of the longer to the shorter side: to resize a picture of one row until that row is wide enough takes all memory.
MAX_RATIO = 100
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


class UnreadablePicture(UserError):
    """A picture that cannot be decoded; the message names it. Packing masks such a picture and counts it."""

    reason = "a picture cannot be decoded"


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """A picture as it lies in its file: its bytes, or what reads them. Calling it decodes it.

    `name` is what an error calls it.
    """

    data: bytes | Callable[[], bytes]
    name: str

    def __call__(self) -> UInt8[np.ndarray, "H W 3"]:
        """RGB."""
        return np.asarray(self.open())

    def open(self, at_least: int = 0) -> Image.Image:
        """As PIL's RGB image; see `open_image`."""
        return open_image(self.data() if callable(self.data) else self.data, self.name, at_least)


def load_image(source: str | os.PathLike | bytes, name: str = "", at_least: int = 0) -> UInt8[np.ndarray, "H W 3"]:
    """`open_image` as an array."""
    return np.asarray(open_image(source, name, at_least))


def open_image(source: str | os.PathLike | bytes, name: str = "", at_least: int = 0) -> Image.Image:
    """Decodes a picture to RGB, upright by its EXIF orientation, transparency laid over white.

    `name` is what an error calls the picture; a path names itself. With `at_least`, a JPEG is decoded at the smallest
    of 1/8, 1/4, 1/2 and 1 of its size whose sides both are that long: libjpeg-turbo leaves out the frequencies that
    resizing would, which is faster and not exact to the pixel.
    Raises `UnreadablePicture` for whatever is missing, truncated, no picture, or above `MAX_PIXELS` or `MAX_RATIO`.
    """
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own, lower, warning about large pictures; damaged EXIF
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadablePicture(
                        f"picture {name} is {image.width} x {image.height}, above the limit of "
                        f"{MAX_PIXELS // 2**20} megapixels: make it smaller or remove it"
                    )
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise UnreadablePicture(
                        f"picture {name} is {image.width} x {image.height}, longer than {MAX_RATIO} times its width: "
                        "cut or remove it"
                    )
                if at_least and image.format == "JPEG":
                    # PIL's draft looks at the smaller of both ratios, whatever way the picture lies.
                    image.draft(None, (at_least, at_least))
                image.load()  # some formats have their EXIF after the picture
                turn, rgb = _UPRIGHT.get(_orientation(image)), _rgb(image)
                return rgb if turn is None else rgb.transpose(turn)
    except UnreadablePicture:
        raise
    # Damaged files make PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadablePicture(f"picture {name} cannot be read ({error}): replace or remove it") from error


def _orientation(image: Image.Image) -> int:
    """From the EXIF, and nothing else of it: PIL's own `exif_transpose` fails where another tag is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture without its EXIF is a picture
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB."""
    # PIL opens 16-bit grey as "I;16", but that of PNM files as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Converting to 8 bits clips instead of scaling.
        values = np.asarray(image, np.float64)
        image = Image.fromarray(np.clip(values / 257, 0, 255).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its grey values are neither of 8 nor of 16 bits, and which is white is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(
    image: UInt8[np.ndarray, "H W 3"] | Image.Image, size: int, stretch: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
    """Bicubic resize of the short side to `size`, then the middle square, as CLIP's preprocessing does; with `stretch`
    of both sides to `size`, as SigLIP's does. Unchanged if it is that size already. `image` is RGB.
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if height == width == size:
        return np.asarray(image)
    pixels = image if isinstance(image, Image.Image) else Image.fromarray(image)
    short = min(height, width)
    # The long side is rounded down, as the reference does: rounding another way shifts the crop. Nor is only the square
    # computed (resize's `box`): Pillow turns rows and columns round by the sizes, and rounds in between.
    new = (size, size) if stretch else (size * width // short, size * height // short)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    resized = pixels.resize(new, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
