"""MixUp and CutMix: an image that is partly another, with a target that says so."""

# %% [markdown]
# One number says how an image is mixed: `lam`, in MixUp how strong the image itself remains, in
# CutMix the share of its pixels that stay. Each image draws for itself, not the batch as a whole:
# whether it is mixed (`MIX_PROB`), how, and how strongly. The last `MIX_OFF_EPOCHS` epochs do
# without, so that training ends on images like those of the test.

# %%
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from emotion_toolbox.draws import DrawStream, draw_uniforms
from emotion_toolbox.pixels import send_to
from emotion_transfer.config import EnhancedConfig, train_size


@dataclass(frozen=True)
class Mixing:
    """How each of B images is mixed with another of the same batch; tensors on the CPU."""

    partner: Tensor  # int64 [B], a permutation: the other image
    lam: Tensor  # float32 [B], the share of the own image; 1 where nothing is mixed
    box: Tensor  # int64 [B, 4], left, top, right, bottom of what is pasted in; empty for MixUp


def mixing_active(cfg: EnhancedConfig, epoch: int) -> bool:
    """Whether images are mixed in `epoch`, counted from 0."""
    wanted = cfg.MIX_PROB > 0 and max(cfg.MIXUP_ALPHA, cfg.CUTMIX_ALPHA) > 0
    return wanted and epoch < cfg.EPOCHS - cfg.MIX_OFF_EPOCHS


# %% [markdown]
# The papers draw `lam` from a Beta distribution. NumPy's Beta generator uses as many random numbers
# as it happens to need, so the next image's would depend on this one's. The inverse of the
# distribution function turns exactly one uniform number into one `lam` instead. CutMix puts the
# centre of its box anywhere in the image and cuts off what hangs out; what counts for the target is
# what is left of the box, to the pixel.

# %%
MIX_COLUMNS = ("mixed", "kind", "lam", "box_x", "box_y", "partner")


def draw_mixing(cfg: EnhancedConfig, epoch: int, first: int, count: int) -> Mixing:
    """How `count` images from position `first` of `epoch` on are mixed, each with one of them."""
    draws = draw_uniforms(cfg.SEED, epoch, first, count, len(MIX_COLUMNS), DrawStream.MIX)
    u = dict(zip(MIX_COLUMNS, draws.T, strict=True))
    mixed = u["mixed"] < (cfg.MIX_PROB if mixing_active(cfg, epoch) else 0.0)
    cut = u["kind"] < (0.0 if cfg.CUTMIX_ALPHA == 0 else 1.0 if cfg.MIXUP_ALPHA == 0 else 0.5)
    alpha = np.where(cut, cfg.CUTMIX_ALPHA, cfg.MIXUP_ALPHA)
    lam = np.where(mixed, special.betaincinv(alpha, alpha, u["lam"]), 1.0)
    size = train_size(cfg)
    side = np.floor(size * np.sqrt(1 - lam)) * cut
    corner = np.floor([size * u["box_x"], size * u["box_y"]]) - side // 2
    left, top, right, bottom = box = np.clip([*corner, *(corner + side)], 0, size)
    lam = np.where(cut, 1 - (right - left) * (bottom - top) / size**2, lam)
    partner = np.argsort(u["partner"], kind="stable")
    return Mixing(*map(torch.from_numpy, (partner, lam.astype(np.float32), box.T.astype(np.int64))))


# %% [markdown]
# Applying it touches only the images that are mixed, and reads the unmixed originals even where a
# partner is mixed as well.


# %%
def mix_images(images: Tensor, mixing: Mixing) -> Tensor:
    """Mixed copies of `images`, float [B, 3, H, W]."""
    mixed = images.clone()
    plan = zip(mixing.partner.tolist(), mixing.lam.tolist(), mixing.box.tolist(), strict=True)
    for image, (partner, lam, (left, top, right, bottom)) in zip(mixed, plan, strict=True):
        if left < right and top < bottom:
            image[:, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        elif lam < 1:
            image.lerp_(images[partner], 1 - lam)
    return mixed


def mix_targets(targets: Tensor, mixing: Mixing) -> Tensor:
    """Mix one-hot or soft `targets`, float [B, C], as the images are; rows keep their sum."""
    partner, lam = (send_to(part, targets.device) for part in (mixing.partner, mixing.lam))
    return torch.lerp(targets[partner], targets, lam.to(targets.dtype)[:, None])
