# %% [markdown]
# ## Data
#
# *What does the network learn from?* From **EmoSet-118K**
# ([Yang et al. 2023](https://arxiv.org/abs/2307.07961)): 118,102 pictures, each labelled with the
# one of eight emotions that it evokes in people. The eight are those of Mikels' model: amusement,
# awe, contentment and excitement are pleasant; anger, disgust, fear and sadness are not.
#
# You have to fetch EmoSet from its authors. Until then the notebook draws a small **synthetic
# sample** with the same eight names. It is a toy: it exercises every step and every figure, and
# says nothing about photographs.
#
# The data come in three splits. The *training* pictures teach the network, the *validation*
# pictures choose between epochs, and the *test* pictures are looked at once, at the end. So: what
# is there, and how many of each class?

# %%
import dataclasses
from functools import partial

from emotion_toolbox.backbones import choose_backbone
from emotion_toolbox.figures import plot_class_distribution, save_figure
from emotion_toolbox.report import figure_note, make_run_folder
from emotion_toolbox.sample import load_data
from emotion_transfer.config import profile_for

listed = load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT)
profile = profile_for(len(listed.splits["train"]), cfg.IMG_SIZE, synthetic=listed.synthetic)
cfg = make_config(settings, profile)  # what you set yourself still wins
network, learnt = choose_backbone(cfg.MODEL_NAME, cfg.WEIGHTS, synthetic=listed.synthetic)
cfg = dataclasses.replace(cfg, MODEL_NAME=network, WEIGHTS=learnt)
run_dir = make_run_folder(cfg, listed)
note = figure_note(listed.synthetic, network, cfg.DEBUG)
keep_figure = partial(save_figure, folder=run_dir / "figures", note=note)
print(f"{network}, {cfg.EPOCHS} epochs at {cfg.IMG_SIZE} pixels; profile: {profile}\n{run_dir}")
keep_figure(plot_class_distribution(listed.counts()), name="class_distribution")

# %% [markdown]
# Where classes differ much in number, a network is tempted to ignore the rare ones. `BALANCE`
# decides what is done about it: `"weights"` lets a rare class count more in the loss, `"sampler"`
# shows it more often, `"none"` leaves things as they are. (The folder printed above is where all
# that this run makes will lie. Its name ends in a hash of settings and data: change one that
# shapes the result and a new run begins beside the old one; run the same again, and it goes on.)
#
# Every picture is **decoded once**, cut to a square a little larger than the network's input, and
# kept in one array a split (`open_datasets??` and `emotion_toolbox.cache` show how): decoding takes
# milliseconds, copying pixels microseconds, and training shows each picture dozens of times. The
# same pass finds every file that cannot be used. A few are left out and named; many, or one and the
# same picture in two splits, stop the notebook.
#
# The cut takes a quarter of a 4:3 photograph. `FIT = "pad"` keeps it whole between bars of
# ImageNet's mean colour, `"squash"` keeps it whole and narrows its shapes. Cutting stays the
# default: by logistic regression on a frozen EfficientNet-Lite0 at 128 pixels (five-fold
# cross-validation), crop, squash and pad reach accuracies of 0.509, 0.514 and 0.489 on photographs
# rated for their pleasantness (OASIS), and 0.806, 0.794 and 0.794 on ten kinds of clothes.

# %%
from emotion_toolbox.batches import open_datasets
from emotion_toolbox.device import seed_everything

decoded, datasets = open_datasets(
    listed, cache_size(cfg), cfg.FIT, cache_dir=cfg.CACHE_DIR if cfg.CACHE else None,
    threads=cfg.NUM_WORKERS, max_bad_fraction=cfg.MAX_BAD_FRACTION,
    allow_duplicates=cfg.ALLOW_DUPLICATES, most=2 * cfg.BATCH_SIZE if cfg.DEBUG else None,
)  # fmt: skip
seed_everything(cfg.SEED)  # from here on everything random follows from it
data, train, classes = decoded.data, datasets["train"], decoded.data.classes
print(f"{len(decoded.bad)} images cannot be used and are left out")
decoded.bad.head(10) if len(decoded.bad) else None

# %% [markdown]
# **Always look at your data.** Do the labels make sense to you? Would *you* get them right?

# %%
import numpy as np

from emotion_toolbox.figures import class_colours, plot_image_grid

of_class = [np.flatnonzero(train.split.labels == number)[:2] for number in range(len(classes))]
shown = np.concatenate(of_class[:16])
names = [classes[number] for number in train.split.labels[shown]]
frames = [class_colours(classes)[name] for name in names]
keep_figure(plot_image_grid(train.pictures(shown), names, frames=frames), name="pictures")

# %% [markdown]
# And look for what would make a result worthless: the same picture, slightly cropped or compressed
# anew, in training *and* in test; one picture under two labels; pictures that are all one colour.
# Copies are found by a *perceptual hash*, 64 bits that say how the large structures of a picture
# lie. Judge the pairs with your own eyes: nothing found here stops a run (and
# `NEAR_DUPLICATE_BITS = None` leaves the search out).

# %%
from IPython.display import Markdown, display

from emotion_toolbox.audit import audit_data, look_alikes

if cfg.NEAR_DUPLICATE_BITS is not None:
    pairs, findings = audit_data(datasets, cfg.NEAR_DUPLICATE_BITS)
    print("\n".join(findings))
    if len(pairs):
        display(plot_image_grid(*look_alikes(datasets, pairs), columns=4))
