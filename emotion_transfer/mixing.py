"""MixUp and CutMix: an image that is partly another, with a target that says so."""

# %% [markdown]
# #### MixUp and CutMix
#
# Both show the network two images in one and ask for both answers, in proportion. **MixUp** lays
# one image over the other, at a strength `lam`; **CutMix** pastes a rectangle of the other image
# in, and `lam` is the share of pixels that stay. Both keep the network from being too sure of
# itself, and help most where labels are debatable, as emotions are.
#
# Each image draws for itself, not the batch as a whole: whether it is mixed (`MIX_PROB`), how, and
# how strongly. The last `MIX_OFF_EPOCHS` epochs do without, so that training ends on images like
# those of the test.

# %%
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from emotion_transfer.augment import send_to
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.seeding import DrawStream, draw_uniforms


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
# distribution function turns exactly one uniform number into one `lam` instead.

# %%
MIX_COLUMNS = ("mixed", "kind", "lam", "box_x", "box_y", "partner")


def draw_mixing(cfg: EnhancedConfig, epoch: int, first: int, count: int) -> Mixing:
    """How the images at positions `first` to `first + count` of `epoch` are mixed.

    Whether, how and how strongly depends on the position alone; the partner is one of these
    `count` images (or, now and then, the image itself). So where processes share a batch, each
    mixes its own part within itself, with the strengths that one process would draw.
    """
    draws = draw_uniforms(cfg.SEED, epoch, first, count, len(MIX_COLUMNS), DrawStream.MIX)
    named = dict(zip(MIX_COLUMNS, draws.T, strict=True))
    share = cfg.MIX_PROB if mixing_active(cfg, epoch) else 0.0
    cut_share = 0.0 if cfg.CUTMIX_ALPHA == 0 else 1.0 if cfg.MIXUP_ALPHA == 0 else 0.5
    mixed, cut = named["mixed"] < share, named["kind"] < cut_share
    alpha = np.where(cut, cfg.CUTMIX_ALPHA, cfg.MIXUP_ALPHA)
    lam = np.ones(count)
    lam[mixed] = special.betaincinv(alpha[mixed], alpha[mixed], named["lam"][mixed])
    box = draw_boxes(cfg.IMG_SIZE, lam, named["box_x"], named["box_y"])
    box[~(mixed & cut)] = 0
    pasted = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    lam = np.where(cut, 1 - pasted / cfg.IMG_SIZE**2, lam)
    return Mixing(
        partner=torch.from_numpy(np.argsort(named["partner"], kind="stable").astype(np.int64)),
        lam=torch.from_numpy(lam.astype(np.float32)),
        box=torch.from_numpy(box),
    )


# %% [markdown]
# CutMix puts the centre of its box anywhere in the image and cuts off what hangs out. What counts
# for the target is what is left of the box, to the pixel.


# %%
def draw_boxes(
    size: int, lam: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Boxes [B, 4] of the share ``1 - lam`` around (x, y) in [0, 1), clipped (Yun et al. 2019)."""
    side = (size * np.sqrt(1 - lam)).astype(np.int64)
    left, top = ((size * centre).astype(np.int64) - side // 2 for centre in (x, y))
    return np.clip(np.stack((left, top, left + side, top + side), axis=1), 0, size)


# %% [markdown]
# Applying it touches only the images that are mixed, and reads the unmixed originals even where a
# partner is mixed as well.


# %%
def mix_images(images: Tensor, mixing: Mixing) -> Tensor:
    """Mixed copies of `images` [B, 3, H, W] (MixUp: Zhang et al. 2018; CutMix: Yun et al. 2019)."""
    boxes, changed = mixing.box.tolist(), mixing.lam < 1
    pasted = mixing.box.any(dim=1)
    mixed, device = images.clone(), images.device
    rows = torch.nonzero(changed & ~pasted).flatten()
    if len(rows):
        own, other = (
            images.index_select(0, send_to(r, device)) for r in (rows, mixing.partner[rows])
        )
        lam = send_to(mixing.lam[rows], device).to(images.dtype)[:, None, None, None]
        mixed.index_copy_(0, send_to(rows, device), torch.lerp(other, own, lam))
    for row in torch.nonzero(pasted).flatten().tolist():
        left, top, right, bottom = boxes[row]
        other = images[int(mixing.partner[row])]
        mixed[row, :, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed


def mix_targets(targets: Tensor, mixing: Mixing) -> Tensor:
    """Mix one-hot or soft `targets`, float [B, C], as the images are; rows keep their sum."""
    partner = send_to(mixing.partner, targets.device)
    lam = send_to(mixing.lam, targets.device).to(targets.dtype)[:, None]
    return torch.lerp(targets.index_select(0, partner), targets, lam)
