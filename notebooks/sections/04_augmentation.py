# %% [markdown]
# ## 4. Augmentation
#
# A photograph of a sunset stays one when it is mirrored, cut a little closer or slightly warmer.
# Showing the network such variants, new ones in every epoch, keeps it from memorising pixels. How
# far to go is a question of meaning: a strong change of hue turns a calm blue sea into an angry red
# one, so colours move little here.

# %%
from emotion_transfer.augment import (
    AUGMENT_DRAWS,
    apply_augmentation,
    denormalise,
    draw_augmentation,
)

# %%
from emotion_transfer.mixing import draw_mixing, mix_images

# %% [markdown]
# ### One technique at a time
#
# Each row shows the same six images under one technique alone, with everything else switched off
# and its own probability turned up where it is rarely drawn. The last row is what training really
# uses: all of them together, drawn anew for every image in every epoch.

# %%
import dataclasses
from typing import Any

from emotion_transfer.seeding import draw_uniforms

OFF: dict[str, Any] = {
    "CROP_SCALE": (1.0, 1.0), "FLIP_PROB": 0.0, "ROTATION": 0.0, "BRIGHTNESS": 0.0, "CONTRAST": 0.0,
    "SATURATION": 0.0, "HUE": 0.0, "BLUR_PROB": 0.0, "ERASE_PROB": 0.0,
}  # fmt: skip
TECHNIQUES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "crop": {"CROP_SCALE": cfg.CROP_SCALE},
    "flip": {"FLIP_PROB": 1.0},
    "rotation": {"ROTATION": cfg.ROTATION},
    "colour jitter": {
        name: getattr(cfg, name) for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE")
    },
    "blur": {"BLUR_PROB": 1.0},
    "random erasing": {"ERASE_PROB": 1.0},
}
settings = {name: dataclasses.replace(cfg, **(OFF | change)) for name, change in TECHNIQUES.items()}
settings["all together"] = cfg

# %% [markdown]
# The random numbers are drawn from the seed, the epoch and the position of the image, all rows
# alike, and then turned into crops, angles and colours.

# %%
mean = std = (0.5, 0.5, 0.5)
few = train.__getitems__(shown[:6]).images
draws = draw_uniforms(cfg.SEED, 0, 0, len(few), AUGMENT_DRAWS)
rows = {}
for name, setting in settings.items():
    plan = draw_augmentation(setting, draws)
    augmented = apply_augmentation(few, plan, cfg.IMG_SIZE, mean, std)
    rows[name] = list(denormalise(augmented, mean, std))

# %% [markdown]
# Read a column from top to bottom: one image, and what each technique makes of it. If you could no
# longer tell its emotion in the last row, the augmentation would be too strong.

# %%
from emotion_transfer.plots.data import plot_rows

keep_figure(plot_rows(rows, "Augmentation"), name="augmentation")

# %% [markdown]
# ### Mixing two images
#
# MixUp lays one image over another, CutMix pastes a piece of one into the other; the target is
# mixed in the same proportion, printed below. The network learns to be unsure where it should be.
# The picture draws the shares evenly (an alpha of 1) so that the mixture shows; at
# `MIXUP_ALPHA = 0.2` most of them lie near 0 or 1.

# %%
unchanged = draw_augmentation(settings["as it is"], draws)
plain = apply_augmentation(few, unchanged, cfg.IMG_SIZE, mean, std)
mixed_rows = {"before": list(denormalise(plain, mean, std))}
for name, alpha, off in (
    ("MixUp", "MIXUP_ALPHA", "CUTMIX_ALPHA"),
    ("CutMix", "CUTMIX_ALPHA", "MIXUP_ALPHA"),
):
    only: dict[str, Any] = {off: 0.0, alpha: 1.0, "MIX_PROB": 1.0, "MIX_OFF_EPOCHS": 0}
    always = dataclasses.replace(cfg, **only)
    mixing = draw_mixing(always, 0, 0, len(few))
    mixed_rows[name] = list(denormalise(mix_images(plain, mixing), mean, std))
    print(f"{name}: share of the image above", [round(float(lam), 2) for lam in mixing.lam])
keep_figure(plot_rows(mixed_rows, "MixUp and CutMix"), name="mixing")
