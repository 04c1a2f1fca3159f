"""Pictures of any size and kind as the patches of a ViT-UHD."""

import base64
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.utils import httpx  # whichever of its versions there is, as transformers imports it
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from mllm_vision.images import load_image, upright_rgb
from mllm_vision.towers.vit_uhd.configuration import ViTUHDConfig

__all__ = ["ViTUHDImageProcessor", "fitted_size"]


class ViTUHDImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings of the processor that a call may override."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int


class ViTUHDImageProcessor(PilBackend):
    """Pictures as packed patches, resized as little as the tower's grid and the bounds on their pixels allow.

    Takes files, URLs, base64, PIL images (of any mode, turned as their EXIF says, white where transparent) and arrays
    or tensors: integers of 8 or 16 bits, or floats, which as elsewhere in transformers are brightness in 0..255, or in
    0..1 with ``do_rescale=False``. (Pipelines of transformers open files themselves, and clip 16 bits; give them PIL
    images.) Returns ``pixel_values`` (L, 3, p, p) of all images in order, each row-major, and
    ``image_sizes`` (B, 2), their heights and widths in pixels.

    Args:
        patch_size: Side p of a patch in pixels.
        merge_size: Patches along a side of the square that becomes one token: 2 to the power of the tower's mergers.
        min_pixels: Fewest pixels that a picture is encoded with (the authors' code: 512 x 512).
        max_pixels: Most pixels (the authors' training: 1560 x 1560), at least twice as many.
        **kwargs: As for every image processor: ``image_mean``, ``image_std``, ``do_resize``, ...
    """

    do_resize = True
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    patch_size = 10
    merge_size = 4
    min_pixels = 512**2
    max_pixels = 1560**2
    valid_kwargs = ViTUHDImageProcessorKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]  # which processors add to theirs

    @classmethod
    def for_tower(cls, config: ViTUHDConfig, **settings: Any) -> "ViTUHDImageProcessor":
        """The processor whose grids the tower with this config takes; ``settings`` are the other arguments."""
        return cls(patch_size=config.patch_size, merge_size=config.merge_size, **settings)

    def token_count(self, height: int, width: int) -> int:
        """Tokens that the tower makes of a picture of so many pixels.

        Raises:
            ValueError: a picture too long and thin to encode.
        """
        return self.get_number_of_image_patches(height, width) // self.merge_size**2

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> int:
        """Patches of a picture of so many pixels, the rows that it has of ``pixel_values``.

        Args:
            height: Of the picture.
            width: Of the picture.
            images_kwargs: Settings of the call that are other than the processor's own.

        Raises:
            ValueError: a picture too long and thin to encode.
        """
        names = ("patch_size", "merge_size", "min_pixels", "max_pixels")
        side, merge, least, most = (images_kwargs.get(name) or getattr(self, name) for name in names)
        height, width = fitted_size(height, width, side * merge, least, most)
        return height // side * (width // side)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Whatever a string names as a picture, with all its bits; grey arrays with a channel."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str | Path):
            # As a file may be; which shapes are too long and thin to encode is for `fitted_size` to say.
            return load_image(_source(image_url_or_urls), most_aspect=math.inf)
        if getattr(image_url_or_urls, "ndim", None) == 2:
            return image_url_or_urls[None]
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self, image: ImageInput, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> np.ndarray:
        """One picture as RGB (3, H, W): 8 bits, or the floats that were given.

        Raises:
            ValueError: floats that would be rescaled twice, or pixels that are no brightness at all.
        """
        if not isinstance(image, Image.Image):
            pixels = _array(image) if isinstance(image, torch.Tensor) else image
            layout = input_data_format or infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
            pixels = np.moveaxis(pixels, 0, -1) if layout == ChannelDimension.FIRST else pixels  # (H, W, channels)
            if np.issubdtype(pixels.dtype, np.floating):
                return np.moveaxis(_rgb_floats(pixels, kwargs["do_rescale"]), -1, 0)
            image = _picture(pixels)
        return np.moveaxis(np.asarray(upright_rgb(image)), -1, 0)

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> np.ndarray:
        """One picture (3, H, W) at another size: bytes as the base class does, floats as floats, in their range."""
        if not np.issubdtype(image.dtype, np.floating):
            return super().resize(image, size, resample, **kwargs)
        # The base class would make bytes of them first, of which it finds too few levels in 0 and 1 alone.
        channels = [Image.fromarray(np.ascontiguousarray(channel, np.float32)) for channel in image]
        resized = [np.asarray(channel.resize((size.width, size.height), resample)) for channel in channels]
        return np.stack(resized).clip(image.min(), image.max())

    def _validate_preprocess_kwargs(self, do_resize: bool | None = None, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)  # which would ask for a fixed size where we resize

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        patch_size: int,
        merge_size: int,
        min_pixels: int,
        max_pixels: int,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("got no images; a pack needs at least one")
        unit, patches, sizes = patch_size * merge_size, [], []
        for image in images:
            height, width = image.shape[1:]
            if do_resize:
                height, width = fitted_size(height, width, unit, min_pixels, max_pixels)
                image = self.resize(image, SizeDict(height=height, width=width), resample)
            elif height % unit or width % unit:
                raise ValueError(
                    f"without resizing, both sides must be multiples of {unit} (patch_size x merge_size), got "
                    f"{height} x {width} pixels"
                )
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            patches.append(patchify(image, patch_size))
            sizes.append((height, width))
        data = {"pixel_values": np.concatenate(patches).astype(np.float32), "image_sizes": np.array(sizes)}
        return BatchFeature(data, tensor_type=return_tensors)


def _source(named: str | Path) -> str | Path | bytes:
    """The file that a string or path names, or what is at a URL or in base64, with or without ``data:image/...``.

    Raises:
        ValueError: a string that is none of these.
    """
    text = str(named)
    if text.startswith(("http://", "https://")):
        return httpx.get(text, follow_redirects=True).raise_for_status().content
    if os.path.exists(text):
        return named
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:image/") else text, validate=True)
    except ValueError:
        raise ValueError(f"{text[:80]!r} is no file, no URL and no base64; check the path") from None


def _array(image: torch.Tensor) -> np.ndarray:
    """The tensor as numpy has it, which knows no bfloat16."""
    image = image.detach().cpu()
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy()


def _picture(pixels: np.ndarray) -> Image.Image:
    """Integers (H, W, channels) of 8 or 16 bits as a picture of 8."""
    pixels = pixels // 257 if pixels.dtype == np.uint16 else pixels  # 65535 = 257 * 255
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"pixels must be integers in 0..255, uint16 or floats, got {pixels.dtype} in {pixels.min()}..{pixels.max()}"
        )
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _rgb_floats(pixels: np.ndarray, rescaled_later: bool) -> np.ndarray:
    """Floats (H, W, 1 or 3) as (H, W, 3)."""
    if pixels.shape[2] == 4:
        raise ValueError("floats with transparency are not supported; give 8 bits a channel, or RGB")
    if not np.isfinite(pixels).all():
        raise ValueError("got floats that are no brightness (NaN or infinite); check what made them")
    if rescaled_later and 0 < pixels.max() <= 1:
        raise ValueError(f"got floats up to {pixels.max():.3g}, which are rescaled already; set do_rescale to False")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def patchify(image: np.ndarray, side: int) -> np.ndarray:
    """The patches (H * W, 3, side, side) of an image (3, H * side, W * side), row-major."""
    channels, height, width = image.shape
    cells = image.reshape(channels, height // side, side, width // side, side)
    return cells.transpose(1, 3, 0, 2, 4).reshape(-1, channels, side, side)


def fitted_size(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to resize a picture to: multiples of ``unit``, with ``min_pixels`` to ``max_pixels`` pixels.

    The picture is scaled as a whole, as little as the bounds allow and at least until its shorter side is one unit;
    then each side goes to the next multiple below or above it, whichever pair keeps the ratio best.

    Raises:
        ValueError: bounds between which some pictures have no size, or a picture that is empty or too long and thin.
    """
    if min(height, width) < 1:
        raise ValueError(f"a picture needs pixels, got {height} x {width}")
    if max_pixels < max(2 * min_pixels, unit**2):
        raise ValueError(
            f"max_pixels must be at least twice min_pixels and {unit} x {unit}, got {max_pixels} and {min_pixels}"
        )
    if max(height, width) * unit**2 > min(height, width) * max_pixels:
        raise ValueError(
            f"a picture of {height} x {width} pixels is too long and thin: one side may be at most "
            f"{max_pixels // unit**2} times the other; crop it, or raise max_pixels"
        )
    pixels = height * width
    scale = math.sqrt(min(max(pixels, min_pixels), max_pixels) / pixels)
    scale = max(scale, unit / min(height, width))
    exact = [side * scale / unit for side in (height, width)]  # in units
    candidates = [
        (down, right)
        for down in {max(1, math.floor(exact[0])), math.ceil(exact[0])}
        for right in {max(1, math.floor(exact[1])), math.ceil(exact[1])}
        if min_pixels <= down * right * unit**2 <= max_pixels
    ]

    def distortion(cells: tuple[int, int]) -> tuple[float, float]:
        ratio = abs(math.log(cells[0] * width / (cells[1] * height)))
        return round(ratio, 9), abs(cells[0] - exact[0]) + abs(cells[1] - exact[1])

    down, right = min(candidates, key=distortion)
    return down * unit, right * unit
