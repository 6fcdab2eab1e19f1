# %% [markdown]
# ## 3. Data
#
# First the two places data can come from: the sample that is drawn by code, and your own CSVs. If
# you only want to *use* the notebook, read on at *Load the splits*.

# %%
from emotion_transfer.sample import draw_sample

# %%
from emotion_transfer.data import QUICK_PROFILE, SPLITS, load_data, uses_sample

# %% [markdown]
# ### Load the splits
#
# If the sample is used, a quick profile replaces some defaults (few epochs, small images), so that
# the whole notebook takes minutes. What you set in `OVERRIDES` still wins.

# %%
synthetic = uses_sample(cfg)
if synthetic:
    cfg = make_config(OVERRIDES, QUICK_PROFILE)
    print("SYNTHETIC SAMPLE with the quick profile:")
    print("  " + ", ".join(f"{name}={getattr(cfg, name)}" for name in QUICK_PROFILE))
listed = load_data(cfg)
print(f"{listed.name}: {len(listed.classes)} classes in {listed.root}")

# %%
from emotion_transfer.runs import make_run_folder

# %% [markdown]
# Everything that this run writes goes here:

# %%
run_dir = make_run_folder(cfg, listed)
print(run_dir)

# %%
from emotion_transfer.cache import check_images

# %% [markdown]
# ### Check and decode every image
#
# Now the pass itself. The second time it takes a moment: only new and changed files are read.

# %%
checked = check_images(cfg, listed)
data = checked.data
print(f"{len(checked.bad)} images cannot be used and are left out")
checked.bad if len(checked.bad) else None

# %%
from emotion_transfer.plots.style import save_figure

# %%
from emotion_transfer.plots.data import plot_class_distribution, plot_image_grid

# %% [markdown]
# ### How many of each class
#
# Where classes differ much in number, a network is tempted to ignore the rare ones. `BALANCE`
# decides what is done about it: `"weights"` lets a rare class count more in the loss, `"sampler"`
# shows it more often, `"none"` leaves things as they are.

# %%
from functools import partial

keep_figure = partial(save_figure, folder=run_dir / "figures", synthetic=data.synthetic)
keep_figure(plot_class_distribution(data.counts()), name="class_distribution")

# %%
from emotion_transfer.seeding import seed_everything

# %%
from emotion_transfer.loader import make_datasets

# %% [markdown]
# ### Look at the images
#
# Always look at your data. Do the labels make sense to you? Would *you* get them right? From here
# on everything random follows from `SEED`.

# %%
seed_everything(cfg.SEED)
datasets = make_datasets(cfg, checked)
train = datasets["train"]
rng = np.random.default_rng(cfg.SEED)
shown = [
    int(position)
    for number in range(min(len(data.classes), 16))
    for position in rng.permutation(np.flatnonzero(train.split.labels == number))[:2]
]
grid = train.__getitems__(shown)
pictures = list(grid.images.permute(0, 2, 3, 1).numpy())
names = [data.classes[label] for label in grid.labels]
keep_figure(plot_image_grid(pictures, names, columns=8), name="sample_grid")

# %%
from emotion_transfer.audit import audit_data, pair_pictures, show_audit

# %% [markdown]
# ### What the audit finds
#
# Judge the pairs with your own eyes: a burst of photographs of one scene is not a copy, but if its
# frames stand in training *and* in test, the test is easier than it looks.

# %%
from IPython.display import display

if cfg.AUDIT:
    audit = audit_data(cfg, datasets)
    print("\n".join(show_audit(audit)))
    suspects = audit.leaks if len(audit.leaks) else audit.pairs
    if len(suspects):
        pair_images, pair_titles = pair_pictures(datasets, suspects)
        display(keep_figure(plot_image_grid(pair_images, pair_titles, columns=4), name="audit"))
else:
    print("AUDIT is off")
