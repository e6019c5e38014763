"""Images in, patches out: read a folder, encode for a ViT, erase patches, and bring pixels to patches and
back.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from helpers.models import patch_grid
from helpers.places import local_path

PATCH_OPERATORS = ("mean", "blur", "noise")


def load_images(folder: str | Path, n_images: int | None = None, seed: int = 0) -> dict[str, Image.Image]:
    """Read the images of a folder and its subfolders, {path below the folder: RGB image}, in order of their
    paths.

    `n_images` files are drawn with `seed`; None, or more than there are, keeps all. Hidden files are passed
    over. Greyscale, palette and transparent images become RGB (transparency on white), upright as their
    camera says. Raises FileNotFoundError for no such folder, ValueError for an empty one or a file that is no
    whole 8-bit image.
    """
    folder = local_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} does not exist")
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise ValueError(f"image folder {str(folder)!r} holds no files; put JPEG or PNG images there")
    if n_images is not None and n_images < len(names):
        names = [
            names[i] for i in sorted(np.random.default_rng(seed).choice(len(names), n_images, replace=False))
        ]
    return {name.as_posix(): read_image(folder / name) for name in names}


def read_image(path: Path) -> Image.Image:
    """Read one image file as RGB, upright, transparency on white. Raises ValueError for anything but a whole
    8-bit image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path.name!r} is not a whole image that Pillow can read ({error}); replace or remove it"
        ) from error
    if upright.mode[0] in "IF":
        raise ValueError(f"{path.name!r} has {upright.mode} pixels; save it with 8 bits a channel")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def encode_images(images: Sequence, processor, model):
    """Prepare images (PIL, or uint8 arrays of height × width × 3) for `model`: pixel_values (batch, 3,
    height, width).

    Raises ValueError for no images, or where the processor's size does not divide into the model's patches.
    """
    if not len(images):
        raise ValueError("there is no image to explain")
    inputs = processor(list(images), return_tensors="pt").to(model.device, model.dtype)
    patch_grid(model, inputs["pixel_values"].shape[-2:])
    return inputs


def seen_images(inputs, processor) -> np.ndarray:
    """Return what the model sees, resized and cropped, for drawing: (batch, height, width, 3) in [0, 1]."""
    pixels = inputs["pixel_values"].float().cpu()
    if processor.do_normalize:
        mean, std = (
            torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        pixels = pixels * std + mean
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def erase_patches(
    model, pixels: torch.Tensor, keep: torch.Tensor, colour=None, operator: str = "mean"
) -> dict:
    """Return the inputs of images (count, channels, height, width) with each patch outside `keep` replaced.

    keep is bool (count, tokens); what it says of the prefix tokens does not matter, for they have no pixels.
    """
    prefix, rows, columns = patch_grid(model, pixels.shape[-2:])
    stays = keep[:, prefix:].reshape(-1, 1, rows, columns)
    stays = (
        torch.nn.functional.interpolate(stays.to(pixels.dtype), scale_factor=model.config.patch_size) > 0.5
    )
    replacement = replacement_pixels(pixels, colour, operator, model.config.patch_size)
    return {"pixel_values": torch.where(stays, pixels, replacement)}


def replacement_pixels(
    pixels: torch.Tensor, colour=None, operator: str = "mean", width: float = 8
) -> torch.Tensor:
    """Return what stands in for erased pixels, shaped as the images (count, channels, height, width).

    "mean" or "mask"  one colour (channels,) in the units of pixel_values; None is 0, the mean that processors
    subtract
    "blur"            the image itself under a Gaussian blur whose standard deviation is `width` pixels
    "noise"           that colour plus normal noise of each image's own spread, the same field in every call
    """
    if operator == "blur":
        return _blur(pixels, width)
    colour = torch.zeros(pixels.shape[1]) if colour is None else torch.as_tensor(colour)
    plain = colour.to(pixels)[:, None, None].expand_as(pixels)
    if operator == "noise":
        field = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(0)).to(pixels)
        return plain + field * pixels.std((-2, -1), keepdim=True)
    return plain


def sum_over_patches(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Sum a value of each pixel (batch, channels, height, width) over patches: (batch, tokens), zero at the
    prefix.
    """
    prefix, rows, columns = patch_grid(model, pixel_values.shape[-2:])
    n_pixels = model.config.patch_size**2
    patches = torch.nn.functional.adaptive_avg_pool2d(pixel_values.sum(1), (rows, columns)) * n_pixels
    return torch.nn.functional.pad(patches.flatten(1), (prefix, 0))


def patch_maps(model, inputs, values: torch.Tensor) -> torch.Tensor:
    """Arrange values of tokens (..., batch, tokens) as maps of the image (..., batch, rows, columns), no
    prefix.

    Raises ValueError where the values are not one a token of these images.
    """
    prefix, rows, columns = patch_grid(model, inputs["pixel_values"].shape[-2:])
    if values.shape[-1] != prefix + rows * columns:
        raise ValueError(
            f"values of {values.shape[-1]} tokens do not fit images of {prefix + rows * columns}"
        )
    return values[..., prefix:].unflatten(-1, (rows, columns))


def _blur(pixels: torch.Tensor, width: float) -> torch.Tensor:
    """Blur along rows, then along columns; beyond the border the edge goes on."""
    radius = int(3 * width)
    offsets = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = (-(offsets**2) / (2 * width**2)).exp()
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, -1)
    padded = torch.nn.functional.pad(pixels, (radius,) * 4, mode="replicate")
    along_rows = torch.nn.functional.conv2d(padded, kernel[:, :, None, :], groups=pixels.shape[1])
    return torch.nn.functional.conv2d(along_rows, kernel[:, :, :, None], groups=pixels.shape[1])
