"""Image files, brought to one size, channel count and depth.

Enter: paths. Leave: images (C, H, W) of uint8 or uint16, and masks (H, W) of 0 and 1. What is wrong with one
image is a `BadImage`, whose kind the preparation counts, so that a thousand broken files make one message.
Pixels are taken as stored: orientation tags of JPEG files are not applied, and no window or rescaling is
invented.
"""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

from cfssl.data.npz import DAMAGE, npz_headers, read_npz, reason
from cfssl.errors import UserError

ADVICE = {
    "cannot be read": "repair or replace these files, or leave their rows out with `where`",
    "differ in size": "set `size: [height, width]` to resize all images",
    "differ in channels": "set `channels` to 1 or 3",
    "have a channel count that is neither 1 nor 3": "convert them to grey or RGB",
    "differ in depth": "convert all images to 8 or all to 16 bits",
    "have pixels that cannot be stored": "expected 8 or 16 bit unsigned integers, or finite numbers from 0 "
    "to 1",
    "have a mask that is no mask": "expected 0 and one other value, in the size of the image",
}
NOT_READ = (".dcm", ".nii", ".nii.gz")  # images all the same: in a folder they must not be passed over
MOST_PIXELS = 1 << 28  # of a TIFF; more is a damaged header, which would ask for all memory

# What the decoders raise on damaged files. They are written for whole ones and stumble in any way.
UNREADABLE = (*DAMAGE, AttributeError, AssertionError, Image.DecompressionBombError, cv2.error)


class BadImage(Exception):
    """What is wrong with one image: `kind` is a key of `ADVICE`, `detail` names what was found."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def read_image(path: Path) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) in the file's own depth.

    Raises `BadImage`, or `UserError` for a suffix nobody reads.
    """
    read = reader_for(path)
    try:
        pixels = read(path)
    except UNREADABLE as error:
        raise BadImage("cannot be read", reason(error)) from None
    if pixels.ndim == 3 and pixels.shape[2] == 4 and pixels.dtype.kind in "ui":
        opaque = (pixels[..., 3] == np.iinfo(pixels.dtype).max).all()
        return pixels[..., :3] if opaque else pixels  # an opaque alpha channel says nothing
    return pixels


def suffix_of(path: Path) -> str:
    """The suffix in lower case; `.nii.gz` counts as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def reader_for(path: Path) -> Callable[[Path], np.ndarray]:
    """The reader of a file's suffix.

    Raises `UserError` where there is none.
    """
    suffix = suffix_of(path)
    if suffix in READERS:
        return READERS[suffix]
    if suffix in NOT_READ:
        raise UserError(
            f"{path} is a {suffix} file, which this version does not read; convert the images to 16-bit PNG "
            "or TIFF."
        )
    raise UserError(
        f"{path} has the suffix {suffix or '(none)'!r}, which is not read; use one of {', '.join(READERS)}."
    )


def _read_png(path: Path) -> np.ndarray:
    content = path.read_bytes()
    Image.open(
        io.BytesIO(content)
    ).verify()  # checksums of the chunks: a truncated file must not become a half-grey image
    return _decode(content)  # cv2 keeps 16-bit RGB, Pillow would reduce it to 8


def _read_jpeg(path: Path) -> np.ndarray:
    with Image.open(path) as image:  # Pillow refuses truncated files, cv2 fills them with grey
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"colour mode {image.mode}")
        return np.asarray(image)


def _read_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        if len(file.pages) != 1:
            raise ValueError(f"{len(file.pages)} pages, expected one image")
        page = file.pages[0].aspage()
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise ValueError("palette colours")
        if page.size > MOST_PIXELS:
            raise ValueError(f"shape {page.shape}, more than {MOST_PIXELS} values")
        if page.compression in (tifffile.COMPRESSION.LZW, tifffile.COMPRESSION.JPEG) and not inverted:
            content = path.read_bytes()  # tifffile needs a further package for these two
            Image.open(io.BytesIO(content)).load()  # refuses damage, for which cv2 returns half an image
            return _decode(content)  # cv2 keeps 16-bit RGB
        pixels = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
    return np.iinfo(pixels.dtype).max - pixels if inverted else pixels


def _read_npz(path: Path) -> np.ndarray:
    names = list(npz_headers(path))
    if len(names) != 1:
        raise ValueError(f"{len(names)} arrays, expected one image")
    return read_npz(path, names[0])


def _decode(content: bytes) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("damaged or unknown encoding")
    if pixels.ndim == 3:  # cv2 orders colours blue, green, red
        pixels = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]
    return pixels


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".png": _read_png,
    ".jpg": _read_jpeg,
    ".jpeg": _read_jpeg,
    ".tif": _read_tiff,
    ".tiff": _read_tiff,
    ".npz": _read_npz,
}


def standardise(
    pixels: np.ndarray, size: tuple[int, int] | None = None, channels: int | None = None
) -> np.ndarray:
    """An image (H, W) or (H, W, C) as contiguous (C, H, W) of uint8 or uint16.

    Numbers from 0 to 1 become uint16. `size` (height, width) resizes, the aspect ratio with it: by area
    where a side shrinks, linearly where it grows. `channels` 1 turns colours to luminance (ITU-R BT.601), 3
    repeats grey. Raises `BadImage`.
    """
    if pixels.ndim not in (2, 3):
        raise BadImage("cannot be read", f"{pixels.ndim} dimensions")
    if not pixels.size:
        raise BadImage("cannot be read", f"no pixels in shape {pixels.shape}")
    pixels = _stored(pixels)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] not in (1, 3):
        raise BadImage("have a channel count that is neither 1 nor 3", f"{pixels.shape[2]} channels")
    if channels == 1 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)[..., None]
    elif channels == 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if size is not None:
        pixels = _resized(pixels, size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def standardise_mask(
    pixels: np.ndarray, size: tuple[int, int] | None, expected: tuple[int, int]
) -> np.ndarray:
    """A mask (H, W) with 0 and at most one other value as (H, W) uint8 of 0 and 1; resized, a pixel is in
    where half of it is.

    expected: (H, W) of the image it belongs to, after resizing. Raises `BadImage`.
    """
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise BadImage("have a mask that is no mask", f"shape {pixels.shape}")
    inside = pixels != 0
    if len(np.unique(pixels[inside])) > 1:
        raise BadImage("have a mask that is no mask", f"{len(np.unique(pixels))} different values")
    if size is not None:
        inside = _resized(inside.astype(np.float32)[..., None], size)[..., 0] >= 0.5
    if inside.shape != expected:
        raise BadImage("have a mask that is no mask", f"size {inside.shape[0]}×{inside.shape[1]}")
    return inside.astype(np.uint8)


def _stored(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    kind = "have pixels that cannot be stored"
    if pixels.dtype.kind != "f":
        raise BadImage(kind, f"type {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise BadImage(kind, "NaN or infinite")
    if pixels.min() < 0 or pixels.max() > 1:
        raise BadImage(kind, f"from {pixels.min():.4g} to {pixels.max():.4g}")
    return np.round(pixels.astype(np.float64) * 65535).astype(np.uint16)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) to (size, C): shrink by area first, then grow linearly, so that neither aliases."""
    height, width = size
    smaller = (min(height, pixels.shape[0]), min(width, pixels.shape[1]))
    for target, method in ((smaller, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)):
        if target != pixels.shape[:2]:
            pixels = cv2.resize(np.ascontiguousarray(pixels), target[::-1], interpolation=method)
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return pixels
