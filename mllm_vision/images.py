"""Image files as RGB pictures, whatever the file holds. What no model can look at is an error that says why."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT = 200
"""Longest over shortest side. A stock processor that makes the short side 336 pixels needs 270 MB at this aspect."""

BACKGROUND = (255, 255, 255)
"""What a transparent picture is laid on."""

# What Pillow's decoders raise on damaged data.
_DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error)


def load_image(source: str | Path | bytes, *, most_aspect: float = MAX_ASPECT) -> Image.Image:
    """The picture in a file: RGB of 8 bits, upright as its EXIF says, white where transparent, the first frame.

    Args:
        source: The file's path, or what is in it.
        most_aspect: Longest over shortest side that whoever asks can do with.

    Raises:
        ValueError: no such file, no image, a damaged or cut-off one, more pixels than Pillow agrees to decode, a side
            more than ``most_aspect`` times the other, or brightness without a defined range.
        PermissionError: the file may not be read.
    """
    name = f"picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(
            f"{name} is {'a folder, not an image' if Path(source).is_dir() else 'no file'}; check the path"
        )
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
    except PermissionError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image, or one of a format that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} would unpack to too large a picture ({error}); shrink it first") from error
    except _DAMAGED as error:
        raise ValueError(f"{name} is damaged or cut off ({error}); get or save it again") from error
    if max(image.size) > most_aspect * min(image.size):
        raise ValueError(
            f"{name} is {image.width} x {image.height} pixels, but one side may be at most {most_aspect} times the "
            "other, because a model's processor scales by the shorter one; crop or pad it"
        )
    return upright_rgb(image, name)


def upright_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A picture in RGB of 8 bits, upright as its EXIF says, white where transparent; errors call it ``name``.

    Raises:
        ValueError: brightness without a defined range.
    """
    if image.mode == "F":
        raise ValueError(f"{name} has brightness in floats of no defined range; save it with 8 or 16 bits a channel")
    return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; unreadable EXIF says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED:
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip at 255 instead of scaling; 65535 = 257 * 255.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")
