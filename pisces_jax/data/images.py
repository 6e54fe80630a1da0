"""Pictures from files or bytes to square `uint8` RGB arrays."""

import dataclasses
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from pisces_jax.utils.errors import UserError, cut
from pisces_jax.utils.files import SNIFFED, sniff

# A small file can claim any size, so larger pictures are refused before they are decoded. No photograph of the usual
# data sets is above 128 megapixels.
MAX_PIXELS = 128 * 1024 * 1024
# Of these formats alone. Others are seldom pictures, and EPS would be handed to Ghostscript, a program of its own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_SLOW = ("JPEG2000", "AVIF")  # to decode: a fourth of the limit
_CHEAP = ("RGB", "L", "P", "1", "CMYK", "YCbCr")  # modes; others, which take more to convert, have half the limit
_STRIP = 2**22  # pixels that are converted at a time
# Of the longer to the shorter side: resizing by the short side of a picture with a single row would take all memory.
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
_BITS, _PHOTOMETRIC = ExifTags.Base.BitsPerSample, ExifTags.Base.PhotometricInterpretation  # tags of TIFF too
_WHITE_IS_ZERO = 0


class UnreadablePicture(UserError):
    """A picture that cannot be decoded; the message names it. Packing masks and counts such a picture."""

    reason = "a picture cannot be decoded"


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """A picture as its file holds it: `data` is its bytes or a function that reads them. Calling it decodes it.

    Errors call it by `name`.
    """

    data: bytes | Callable[[], bytes]
    name: str

    def __call__(self) -> UInt8[np.ndarray, "H W 3"]:
        """As an RGB array."""
        return np.asarray(self.open())

    def open(self, at_least: int = 0) -> Image.Image:
        """As an RGB image of PIL; see `open_image`."""
        return open_image(self.data() if callable(self.data) else self.data, self.name, at_least)


@dataclasses.dataclass(frozen=True)
class View:
    """A square or oblong window of a picture, mirrored or not.

    `share` is that of both sides that the window keeps, `left` and `top` where it lies: 0 to 1 of what is left over.
    """

    image: np.ndarray | Callable[[], np.ndarray]
    mirrored: bool
    share: float
    left: float
    top: float

    def __call__(self) -> UInt8[np.ndarray, "H W 3"]:
        whole = self.image() if callable(self.image) else self.image
        height, width = (max(1, round(self.share * side)) for side in whole.shape[:2])
        y, x = round(self.top * (whole.shape[0] - height)), round(self.left * (whole.shape[1] - width))
        window = whole[y : y + height, x : x + width]
        return np.ascontiguousarray(window[:, ::-1] if self.mirrored else window)


def load_image(source: str | os.PathLike | bytes, name: str = "", at_least: int = 0) -> UInt8[np.ndarray, "H W 3"]:
    """`open_image` as an array."""
    return np.asarray(open_image(source, name, at_least))


def open_image(source: str | os.PathLike | bytes, name: str = "", at_least: int = 0) -> Image.Image:
    """Decodes a picture to RGB: turned upright by its EXIF orientation, and on white where it is transparent.

    Errors call the picture by `name`, or else by its path. With `at_least`, a JPEG is decoded at the smallest of 1/8,
    1/4, 1/2 and 1 of its size at which both sides have at least so many pixels: libjpeg-turbo then skips the
    frequencies that resizing would drop, which is faster but not exact to the pixel.

    Raises:
        UnreadablePicture: the file is missing, truncated, not a picture of `FORMATS`, or above `MAX_RATIO` or
            `MAX_PIXELS` (a half or a fourth of it where decoding is costly).
    """
    name = cut(name or (f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large pictures, at a lower limit, and of damaged EXIF
            try:
                return _decode(io.BytesIO(source) if isinstance(source, bytes) else source, name, at_least)
            except ValueError:
                data = source if isinstance(source, bytes) else Path(source).read_bytes()
                if not data.startswith(_PNG):
                    raise
                return _decode(io.BytesIO(_without_notes(data)), name, at_least)
    except UnreadablePicture:
        raise
    # Damaged files make PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        meaning = sniff(source[:SNIFFED] if isinstance(source, bytes) else _beginning(source))
        unknown = isinstance(error, UnidentifiedImageError)  # whose words would show an address in memory
        reason = f"it is {meaning}" if meaning else "its format is unknown" if unknown else cut(error)
        raise UnreadablePicture(f"picture {name} cannot be read ({reason}): replace or remove it") from error


def _decode(file: Any, name: str, at_least: int) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        limit = MAX_PIXELS // (4 if image.format in _SLOW else 1 if image.mode in _CHEAP else 2)
        if image.width * image.height > limit:
            raise UnreadablePicture(
                f"picture {name} is {image.width} x {image.height}, above the limit of "
                f"{limit // 2**20} megapixels: make it smaller or remove it"
            )
        if max(image.size) > MAX_RATIO * min(image.size):
            raise UnreadablePicture(
                f"picture {name} is {image.width} x {image.height}, longer than {MAX_RATIO} times its width: "
                "crop or remove it"
            )
        if at_least and image.format == "JPEG":
            # PIL's draft takes the smaller of both ratios, for upright and for wide pictures.
            image.draft(None, (at_least, at_least))
        image.load()  # some formats have their EXIF after the picture
        turn, rgb = _UPRIGHT.get(_orientation(image)), _rgb(image)
    del image  # it may be as large as the result
    return rgb if turn is None else rgb.transpose(turn)


def _beginning(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(SNIFFED)
    except OSError:
        return b""


_PNG = b"\x89PNG\r\n\x1a\n"
_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_SMALL_NOTE = 1000  # bytes, which unpack to less than PIL's limit of a megabyte


def _without_notes(data: bytes) -> bytes:
    """A PNG without the long texts and colour profiles for which PIL would refuse the whole picture."""
    kept, at = [data[: len(_PNG)]], len(_PNG)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunk = data[at : at + length + 12]
        if chunk[4:8] not in _NOTES or length <= _SMALL_NOTE:
            kept.append(chunk)
        at += len(chunk)
    return b"".join(kept)


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data, 1 to 8. PIL's own `exif_transpose` fails if any other tag is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data; the picture itself may still be fine
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Converts from any PIL mode."""
    # PIL opens 16-bit grey as "I;16", but that of PNM files as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Converting to 8 bits clips instead of scaling, and forgets which grey is transparent.
        tags, clear = getattr(image, "tag_v2", {}), image.info.get("transparency")
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
        inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO  # PIL inverts only pictures of 8 bits

        def grey(strip: Image.Image) -> Image.Image:
            values = np.asarray(strip, np.float64)
            scaled = np.clip(values / (white / 255), 0, 255).round()
            if inverted:
                scaled = 255 - scaled
            if isinstance(clear, int):
                scaled[values == clear] = 255  # on white
            return Image.fromarray(scaled.astype(np.uint8))

        return _in_strips(image, grey, "L").convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its grey values have neither 8 nor 16 bits, so that it is not known which of them is white")
    if image.has_transparency_data:

        def on_white(strip: Image.Image) -> Image.Image:
            strip = strip.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip).convert("RGB")

        return _in_strips(image, on_white, "RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image], mode: str) -> Image.Image:
    """`convert` of a picture, strip by strip: its intermediate results stay small."""
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return convert(image)
    made = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        made.paste(convert(image.crop(box)), box[:2])
    return made


def fit(
    image: UInt8[np.ndarray, "H W 3"] | Image.Image, size: int, stretch: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes the short side to `size` (bicubic) and crops the middle square, as CLIP's preprocessing does; with
    `stretch`, resizes both sides to `size`, as SigLIP's does. An RGB image of that size is returned as it is.
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if height == width == size:
        return np.asarray(image)
    pixels = image if isinstance(image, Image.Image) else Image.fromarray(image)
    short = min(height, width)
    # The long side is rounded down as in the reference, since rounding in another way shifts the crop. The square alone
    # (resize's `box`) would give other values: Pillow chooses the order of rows and columns by the sizes, and rounds
    # in between.
    new = (size, size) if stretch else (size * width // short, size * height // short)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    resized = pixels.resize(new, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def png(image: Image.Image | np.ndarray) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, "PNG", optimize=True)
    return out.getvalue()
