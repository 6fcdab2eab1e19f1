# %% [markdown]
# ## Augmentation
#
# *How can few pictures be made into many?* A photograph of a sunset stays one when it is mirrored,
# cut a little closer or slightly warmer. Showing the network such variants, new ones in every
# epoch, keeps it from learning pictures by heart. How far to go is a question of *meaning*: a
# strong change of hue turns a calm blue sea into an angry red one, so colours move little here.

# %%
from emotion_transfer.augment import AUGMENT_DRAWS, apply_augmentation, draw_augmentation
from emotion_transfer.config import train_size

# %% [markdown]
# Now see it. Each row shows the same six pictures under one technique alone, as far to either side
# as it may go. The last row is what training really uses: all of them together, by chance, drawn
# anew for every picture in every epoch. If you could no longer tell a picture's emotion there, the
# augmentation would be too strong.

# %%
import dataclasses

from emotion_toolbox.draws import draw_uniforms
from emotion_toolbox.figures import plot_rows
from emotion_toolbox.pixels import denormalise

alone: dict[str, dict[str, Any]] = {
    "as it is": {}, "crop": {"CROP_SCALE": cfg.CROP_SCALE}, "flip": {"FLIP_PROB": 1.0},
    "rotation": {"ROTATION": cfg.ROTATION}, "brightness": {"BRIGHTNESS": cfg.BRIGHTNESS},
    "contrast": {"CONTRAST": cfg.CONTRAST}, "saturation": {"SATURATION": cfg.SATURATION},
    "hue": {"HUE": cfg.HUE}, "blur": {"BLUR_PROB": 1.0}, "random erasing": {"ERASE_PROB": 1.0},
}  # fmt: skip
off = {name: 0.0 for change in alone.values() for name in change} | {"CROP_SCALE": (1.0, 1.0)}
varied = {name: dataclasses.replace(cfg, **off | change) for name, change in alone.items()}
few, half = train.batch(shown[:6]).images, (0.5, 0.5, 0.5)
ends = np.resize([0.02, 0.98], (len(few), AUGMENT_DRAWS))
chance, rows = draw_uniforms(cfg.SEED, 0, 0, len(few), AUGMENT_DRAWS), {}
for name, setting_of in {**varied, "all together": cfg}.items():
    plan = draw_augmentation(setting_of, chance if setting_of is cfg else ends)
    rows[name] = denormalise(apply_augmentation(few, plan, train_size(cfg), half, half), half, half)
keep_figure(plot_rows(rows, "Augmentation"), name="augmentation")

# %% [markdown]
# **Why a killed run can go on to the same bits.** The random numbers above have no state that could
# be lost. Each row is a function of the seed, the epoch and the picture's position
# (`emotion_toolbox.draws`; a counter-based generator,
# [Salmon et al. 2011](https://doi.org/10.1145/2063384.2063405)). So a slice drawn by itself is a
# slice of the whole:

# %%
whole = draw_uniforms(cfg.SEED, epoch=3, first=0, count=1000, columns=AUGMENT_DRAWS)
part = draw_uniforms(cfg.SEED, epoch=3, first=640, count=32, columns=AUGMENT_DRAWS)
bool((part == whole[640:672]).all())
