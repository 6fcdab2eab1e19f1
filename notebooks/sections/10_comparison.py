# %% [markdown]
# ## 10. Comparison
#
# Is the accuracy above a good one? Only a comparison tells.

# %%
from emotion_transfer.baselines import compare_models, published_accuracies, run_baseline

# %% [markdown]
# ### Train the baselines
#
# `BASELINES` in the configuration says which; the plain fine-tune takes about as long as the
# training above. Each is kept: run this again and it is read back.

# %%
baselines = [run_baseline(name, cfg, datasets, run_dir / "baselines") for name in cfg.BASELINES]

# %% [markdown]
# ### The table
#
# Read the intervals before the values. *Ours is better by* is the difference of the two accuracies
# on the same images with its own interval: if that holds zero, the difference may be chance. The
# p-value is McNemar's: how often equals would differ this much.

# %%
comparison = compare_models(cfg, test, baselines, data.classes)
comparison.table()

# %% [markdown]
# The same as a picture. On EmoSet itself, published accuracies stand beside ours, with a marker of
# their own: others measured them with other code.

# %%
measured = comparison.metrics.items()
accuracies = {name.replace("_", " "): found["accuracy"] for name, found in measured}
published = published_accuracies(data.classes, synthetic=data.synthetic)
keep_figure(plot_comparison(accuracies, published), name="comparison")
