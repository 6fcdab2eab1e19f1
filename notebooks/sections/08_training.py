# %% [markdown]
# ## 8. Training
#
# If this run was begun before, its checkpoints are listed here, and training goes on from the
# newest. An empty list means a new run.

# %%
from emotion_transfer.checkpoint import list_checkpoints

[path.name for path in list_checkpoints(run_dir / "checkpoints")]

# %% [markdown]
# ### Train
#
# Everything is in place. Interrupt this cell whenever you like (the stop button saves first) and
# run it again: it goes on where it was. A run that is complete is loaded, not trained again.
#
# One line an epoch tells you: the losses, what validation says of the raw and of the averaged
# weights, the gap between training and validation, both learning rates, speed and memory. The
# training loss is usually *higher* than the validation loss here: it is measured on augmented,
# mixed images with smoothed targets, and validation on clean ones.

# %%
result = fit(cfg, model, datasets, run_dir / "checkpoints")
print(f"{result.finished}; best epoch {result.best_epoch} ({result.best_source} weights)")

# %% [markdown]
# ### The curves
#
# What to look for: validation loss that falls and then rises means the network has begun to
# memorise. A jump at a thaw that does not recover means `LR_BACKBONE` is too high. The gap is
# measured on clean images on both sides, so it compares like with like.

# %%
from emotion_transfer.plots.training import plot_history

curves = plot_history(result.history, best_epoch=result.best_epoch, thaws=thaws)
keep_figure(curves, name="training")

# %%
from emotion_transfer.metrics import evaluate_predictions, gap_verdict

# %% [markdown]
# ### The verdict on the gap
#
# The gap at the best epoch, judged against what chance alone would give with so many images.

# %%
row = result.history["epoch"].tolist().index(result.best_epoch)
clean_accuracy = result.history["train_clean_accuracy"].tolist()[row]
gap = result.history["gap"].tolist()[row]
print(gap_verdict(clean_accuracy, clean_accuracy - gap, len(datasets["val"])))
