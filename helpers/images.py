"""Images in, patches out: read folders, encode for a ViT, erase patches, sum pixels over patches."""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from helpers.paths import local_path

IMAGE_MODELS = "use a ViT, DeiT or DINOv2 classifier (with or without registers)"
PATCH_OPERATORS = ("mean", "blur", "noise")
MIN_IMAGES = 5  # a concept of fewer images is refused


def patch_grid(model, size: Sequence[int]) -> tuple[int, int, int]:
    """Return (prefix tokens, rows, columns) of an image (height, width); patches follow row by row.

    The prefix is counted on the model itself: its classification, distillation and register tokens.
    Raises ValueError where the model has no such tokens or no square patches, or the image does not divide
    into them.
    """
    kind, patch = model.config.model_type, getattr(model.config, "patch_size", None)
    if getattr(model.config, "window_size", None):
        raise ValueError(f"{kind} has windowed attention, not one map over all patches; {IMAGE_MODELS}")
    if not isinstance(patch, int):
        raise ValueError(f"{kind} has no single patch_size; {IMAGE_MODELS}")
    embeddings = getattr(model.base_model, "embeddings", None)
    tokens = [
        getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens")
    ]
    if tokens[0] is None:
        raise ValueError(f"{kind} has no classification token; {IMAGE_MODELS}")
    height, width = size
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height} × {width} pixels do not divide into patches of {patch}; resize them"
        )
    return sum(token.shape[-2] for token in tokens if token is not None), height // patch, width // patch


def patch_players(model, inputs) -> torch.Tensor:
    """Return bool (batch, tokens): True for patches, False for the prefix (cls, distillation, registers).

    Raises ValueError as `patch_grid` does.
    """
    pixels = inputs["pixel_values"]
    prefix, rows, columns = patch_grid(model, pixels.shape[-2:])
    return (torch.arange(prefix + rows * columns, device=pixels.device) >= prefix).expand(len(pixels), -1)


def load_images(folder: str | Path, n_images: int | None = None, seed: int = 0) -> dict[str, Image.Image]:
    """Read the images of a folder and its subfolders, {path below the folder: RGB image}, by path.

    `n_images` of them are drawn with `seed`; None, or more than there are, keeps all. Files that are no whole
    image are skipped, with a note. Raises FileNotFoundError for no such folder, ValueError for one without
    images.
    """
    folder = _existing_folder(folder, "images")
    files = _files(folder)
    drawn = np.random.default_rng(seed).permutation(len(files)) if n_images is not None else range(len(files))
    images = _read_images(folder, [files[place] for place in drawn], 1, n_images)
    return {path.relative_to(folder).as_posix(): images[path] for path in sorted(images)}


def load_image_folder(
    folder: str | Path,
    min_images: int = MIN_IMAGES,
    max_images: int | None = None,
    names: Collection[str] | None = None,
) -> dict[str, list[Image.Image]]:
    """Read an ImageFolder tree, folder/<name>/*.jpg, as {name: RGB images}, files by name.

    max_images  keep the first so many images of each name; None keeps all
    names       read these alone, as far as they are there; None reads every name

    Files that are no whole image are skipped, with a note. Raises FileNotFoundError without the folder,
    ValueError without folders in it, where a name has fewer than `min_images` images, or where fewer are
    asked for.
    """
    if max_images is not None and max_images < min_images:
        raise ValueError(
            f"at least {min_images} images of each folder are needed, more than the {max_images} asked for"
        )
    chosen = [path for path in _named_folders(folder) if names is None or path.name in names]
    return {
        path.name: list(_read_images(path, _files(path), min_images, max_images).values()) for path in chosen
    }


def check_folders(folder: str | Path, names: Collection[str], parameter: str, place: str) -> None:
    """Raise ValueError, with the folders that are there, unless `folder` has one for each of the names.

    parameter, place  that give the names and the folder, for the error; other errors as `load_image_folder`
    """
    found = [path.name for path in _named_folders(folder)]
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{parameter} names {', '.join(missing)}, but {place} {str(folder)!r} has no such folder; it has "
            f"{', '.join(found)}: name these in {parameter}, or add what is missing"
        )


def _named_folders(folder: str | Path) -> list[Path]:
    """Return the folders of an ImageFolder tree, by name."""
    folder = _existing_folder(folder, "images as <name>/*.jpg")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(
            f"folder {folder.name!r} holds no folders; arrange images as {folder.name}/<name>/*.jpg"
        )
    return found


def _existing_folder(folder: str | Path, content: str) -> Path:
    path = local_path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"folder {str(path)!r} does not exist; it should hold {content}")
    return path


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder but hidden ones, in the order of their paths."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_images(
    folder: Path, files: Sequence[Path], at_least: int, at_most: int | None
) -> dict[Path, Image.Image]:
    """Return the first `at_most` images among the files; skip, with a note, what is none."""
    images: dict[Path, Image.Image] = {}
    reasons: dict[str, str] = {}
    for path in files:
        if len(images) == at_most:
            break
        try:
            images[path] = read_image(path)
        except ValueError as error:
            reasons[path.name] = str(error)
    names = ", ".join([*list(reasons)[:5], *["..."] * (len(reasons) > 5)])
    skipped = f"{len(reasons)} unreadable files ({names}): {next(iter(reasons.values()), '')}"
    if len(images) < at_least:
        beside = f" beside {skipped}" if reasons else ""
        raise ValueError(
            f"folder {folder.name!r} has {len(images)} images and needs at least {at_least}{beside}"
        )
    if reasons:
        warnings.warn(f"folder {folder.name!r}: skipped {skipped}", stacklevel=3)
    return images


def read_image(path: Path) -> Image.Image:
    """Read one file as RGB, upright, transparency on white. Raises ValueError for no whole 8-bit image."""
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


def input_size(processor) -> int:
    """Return how many pixels a side of the images has that the processor gives to its model.

    Raises ValueError where the processor does not say so.
    """
    size = getattr(processor, "crop_size", None) or processor.size
    sides = {size.get(name) for name in ("height", "width", "shortest_edge")} - {None}
    if len(sides) != 1:
        raise ValueError(f"the image processor gives images of {dict(size)}; set one side in pixels there")
    return sides.pop()


def encode_images(images: Sequence, processor, model):
    """Prepare images (PIL, or uint8 height × width × 3) for `model`: pixel_values (batch, 3, height, width).

    Raises ValueError for one image in place of a list, no images, arrays of another type, or where the
    processor's size does not divide into the model's patches.
    """
    if isinstance(images, Image.Image) or getattr(images, "ndim", 4) == 3:
        raise ValueError("images is one image; give a list of images")
    if not len(images):
        raise ValueError("there is no image to explain")
    for place, image in enumerate(images):
        if not isinstance(image, Image.Image) and getattr(image, "dtype", None) not in (
            np.uint8,
            torch.uint8,
        ):
            found = getattr(image, "dtype", type(image).__name__)
            raise ValueError(
                f"image {place} holds {found}; give PIL images, or uint8 arrays with values 0 to 255"
            )
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
    """Sum pixels' values (batch, channels, height, width) over patches: (batch, tokens), 0 at the prefix."""
    prefix, rows, columns = patch_grid(model, pixel_values.shape[-2:])
    n_pixels = model.config.patch_size**2
    patches = torch.nn.functional.adaptive_avg_pool2d(pixel_values.sum(1), (rows, columns)) * n_pixels
    return torch.nn.functional.pad(patches.flatten(1), (prefix, 0))


def patch_maps(model, inputs, values: torch.Tensor) -> torch.Tensor:
    """Arrange values of tokens (..., batch, tokens) as maps (..., batch, rows, columns), no prefix.

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
