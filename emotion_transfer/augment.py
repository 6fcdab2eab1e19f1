"""Random augmentation: drawn on the CPU as a function of the position, applied in batches."""

# %% [markdown]
# #### Augmentation in two halves
#
# The usual way augments one image at a time on the CPU, and starves a fast GPU. Here *drawing*
# makes a few numbers for each image, and *applying* changes the pixels of the whole batch at once,
# wherever they lie. These are the numbers:

# %%
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emotion_toolbox.pixels import (
    ColourJitter, Floats, between, blur_some, channel_constants, check_pixels, check_uniforms,
    chunks, colour_factors, crop_sizes, erase_boxes, jitter_colours, random_boxes, send_to,
)  # fmt: skip
from emotion_transfer.config import EnhancedConfig, train_size


@dataclass(frozen=True)
class Augmentation:
    """What is done to each of B images; every tensor lies on the CPU."""

    theta: Tensor  # float32 [B, 2, 3], from output to input coordinates, both in [-1, 1]
    colour: Tensor  # float32 [B, 4], factors of brightness, contrast and saturation; hue shift
    blur: Tensor  # float32 [B], a Gaussian's sigma in pixels of the output; 0 does not blur
    erase: Tensor  # int64 [B, 4], left, top, right, bottom in pixels of the output; or empty


# %% [markdown]
# They come from uniform random numbers. Each image owns one row of them, whose columns have names,
# and the row is a function of the seed, the epoch and the image's position (`draw_uniforms??` shows
# how): a run that was killed and goes on draws what it would have drawn.

# %%
AUGMENT_COLUMNS = (
    *("crop_x", "crop_y", "flip", "rotation", "brightness", "contrast", "saturation", "hue"),
    *("blur", "blur_sigma", "erase", "erase_area", "erase_ratio", "erase_x", "erase_y"),
)
CROP_TRIES, CROP_RATIO = 10, 4 / 3  # aspect ratios from 3:4 to 4:3
AUGMENT_DRAWS = len(AUGMENT_COLUMNS) + 2 * CROP_TRIES
BLUR_SIGMA = (0.5, 1.5)  # pixels
ERASE_AREA, ERASE_RATIO = (0.02, 0.2), (0.3, 3.3)  # 0.33 of an image, as usual, can hide all of it


# %% [markdown]
# A crop has a random area and aspect ratio, as torchvision's `RandomResizedCrop` draws them
# (`crop_sizes??`; [Szegedy et al. 2015](https://arxiv.org/abs/1409.4842)). Crop, mirror image and
# rotation are all *affine*: together they are one 2 x 3 matrix that says where in the stored image
# each pixel of the output looks. One resampling instead of three is faster, and sharper. Where a
# rotated crop looks beyond its own edge it sees what really lies there, not black corners.


# %%
def draw_affine(cfg: EnhancedConfig, u: dict[str, Floats], tries: Floats) -> Floats:
    """Matrices [B, 2, 3] of crop, flip and rotation; `tries` are uniforms [B, 2 * CROP_TRIES]."""
    width, height = crop_sizes(cfg.CROP_SCALE, CROP_RATIO, *np.split(tries, 2, axis=1))
    x = (2 * u["crop_x"] - 1) * (1 - width)
    y = (2 * u["crop_y"] - 1) * (1 - height)
    mirror = np.where(u["flip"] < cfg.FLIP_PROB, -1.0, 1.0)
    angle = np.deg2rad(cfg.ROTATION) * (2 * u["rotation"] - 1)
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[width * mirror * cos, -width * mirror * sin, x], [height * sin, height * cos, y]]
    return np.moveaxis(np.array(rows), 2, 0)


# %% [markdown]
# All of it together. Random erasing hides a rectangle, so that no single detail decides
# ([Zhong et al. 2020](https://arxiv.org/abs/1708.04896)). A setting of 0 switches its part off
# *exactly*, so what a part is worth can be measured by leaving it out. (For the crop that setting
# is `CROP_SCALE = (1, 1)`: always all of the stored image.)


# %%
def draw_augmentation(cfg: EnhancedConfig, uniforms: Floats) -> Augmentation:
    """What is done to each image: a function of its row of `uniforms` [B, AUGMENT_DRAWS] alone."""
    check_uniforms(uniforms, AUGMENT_DRAWS)
    u = dict(zip(AUGMENT_COLUMNS, uniforms.T, strict=False))
    theta = draw_affine(cfg, u, uniforms[:, len(AUGMENT_COLUMNS) :])
    swings = 2 * np.stack([u["brightness"], u["contrast"], u["saturation"], u["hue"]], axis=1) - 1
    colour = [1, 1, 1, 0] + swings * [cfg.BRIGHTNESS, cfg.CONTRAST, cfg.SATURATION, cfg.HUE]
    blur = np.where(u["blur"] < cfg.BLUR_PROB, between(BLUR_SIGMA, u["blur_sigma"]), 0.0)
    where = [u["erase_area"], u["erase_ratio"], u["erase_x"], u["erase_y"]]
    boxes = random_boxes(train_size(cfg), ERASE_AREA, ERASE_RATIO, *where)
    erase = np.where(u["erase"][:, None] < cfg.ERASE_PROB, boxes, 0)
    floats = [part.astype(np.float32) for part in (theta, colour, blur)]
    return Augmentation(*map(torch.from_numpy, (*floats, erase)))


# %% [markdown]
# Now the pixels. Build the grid of places to look at (by hand: `affine_grid` is a matrix product,
# which autocast would round), and let `grid_sample` look there, bilinearly.
# Beyond the edge of the stored image it sees the image reflected. Stored images are about as much
# larger than the output as an average crop is smaller than its image, so hardly anything is shrunk
# and nothing needs antialiasing.


# %%
def resample_images(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """What the maps `theta` [B, 2, 3] see of `images` [B, 3, S, S]: float32 [B, 3, size, size]."""
    centres = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    down = theta[:, :, 1:2] * centres + theta[:, :, 2:3]  # [B, 2, size]
    across = theta[:, :, 0:1] * centres
    grid = (down[:, :, :, None] + across[:, :, None, :]).permute(0, 2, 3, 1)  # [B, size, size, 2]
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


# %% [markdown]
# And all of it in order: resample, change the colours, normalise as the backbone was trained to
# expect, blur, erase. (Blurring after the normalisation changes nothing: both are linear, and the
# weights of a blur add up to 1. What is erased becomes 0, by then the mean colour.) Numbers travel
# to the device and nothing comes back, so neither side waits for the other. The arithmetic is
# torchvision's with a number of its own for every image; `jitter_colours??` and `shift_hue??` show
# it.


# %%
def apply_augmentation(
    images: Tensor, plan: Augmentation, size: int, mean: Sequence[float], std: Sequence[float],
    jitter: ColourJitter = jitter_colours,
) -> Tensor:  # fmt: skip
    """Augment and normalise uint8 images [B, 3, S, S]: float32 [B, 3, size, size], channels_last.

    Never waits for the device. `jitter` may be compiled. Raises ``ValueError`` for other shapes.
    """
    check_pixels(images, size, len(plan.theta))
    device, shape = images.device, (len(images), 3, size, size)
    theta, colour = send_to(plan.theta, device), colour_factors(plan.colour, device)
    centre, spread = channel_constants(mean, std, device)
    result = torch.empty(shape, device=device, memory_format=torch.channels_last)
    for part in chunks(images):
        pixels = resample_images(images[part], theta[part], size).div_(255)
        pixels = jitter(pixels, *(None if c is None else c[part] for c in colour))
        result[part] = (pixels - centre).div_(spread)
    blur_some(result, plan.blur)
    erase_boxes(result, plan.erase)
    return result
