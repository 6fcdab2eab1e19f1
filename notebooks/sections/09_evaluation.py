# %% [markdown]
# ## 9. Evaluation on the test split
#
# Until now no decision was made on the test images, so they can tell how the network does on
# pictures it has never seen. Look at them once. If you tune on them, they become validation images
# and you have no test any more.

# %%
from emotion_transfer.evaluation import prediction_table, write_predictions

test = predict(cfg, model, datasets["test"], amp=result.amp, progress="testing")
validation = predict(cfg, model, datasets["val"], amp=result.amp, progress="validating")
metrics = {
    split: evaluate_predictions(
        found.labels, found.probabilities, data.classes, resamples=cfg.BOOTSTRAP, seed=cfg.SEED
    )
    for split, found in (("val", validation), ("test", test))
}
write_predictions(run_dir / "predictions_test.csv", prediction_table(datasets["test"], test))
pd.DataFrame({name: {m: f"{e:.3f}" for m, e in found.items()} for name, found in metrics.items()})

# %% [markdown]
# Each cell reads *value [low, high]*. The validation figures are a little too good, because the
# best epoch was chosen by them; the test figures are the ones to quote, with their interval.

# %%
from emotion_transfer.plots.evaluation import (
    plot_comparison,
    plot_confusion,
    plot_gradcam,
    plot_mistakes,
    plot_per_class,
    plot_reliability,
)

# %% [markdown]
# ### Class by class
#
# Precision asks: of all images the network called *awe*, how many were? Recall asks: of all that
# were, how many did it find? F1 is high only where both are.

# %%
from emotion_transfer.metrics import most_confused_pairs, per_class_table

report = per_class_table(test.labels, test.predicted, data.classes)
report.round(3)

# %% [markdown]
# The same as a picture; a class whose two marks lie far apart is called too often or too rarely.

# %%
keep_figure(plot_per_class(report), name="per_class")

# %% [markdown]
# ### Confusion
#
# Rows are the true classes, columns the answers. Left are counts; right, each row is divided by its
# sum, so that the diagonal shows the recall. Emotions that are alike in being pleasant or
# unpleasant (polarity), or calm or agitated (arousal), are the ones people confuse too.

# %%
from sklearn.metrics import confusion_matrix

confusion = confusion_matrix(test.labels, test.predicted, labels=range(len(data.classes)))
keep_figure(plot_confusion(confusion, data.classes), name="confusion")

# %% [markdown]
# The pairs it confuses most:

# %%
most_confused_pairs(confusion, data.classes)

# %% [markdown]
# ### Does it know how sure it is?
#
# Of all answers given with 80 % confidence, 80 % should be right: bars on the diagonal. Bars below
# it mean the network is too sure of itself, bars above it too modest, which label smoothing and
# mixing tend to cause.

# %%
from emotion_transfer.metrics import reliability_table

reliability = reliability_table(test.labels, test.probabilities)
keep_figure(plot_reliability(reliability, metrics["test"]["ece"]), name="reliability")

# %% [markdown]
# ### Its most confident mistakes
#
# Look at these closely. Often the *label* is arguable, and sometimes it is plainly wrong; a few
# such finds say more about a data set than any metric.

# %%
wrong = np.flatnonzero(test.predicted != test.labels)
confidence = test.probabilities.max(1)
worst = wrong[np.argsort(-confidence[wrong])][:12]
seen = datasets["test"].__getitems__(worst.tolist()).images.permute(0, 2, 3, 1).numpy()
figure = plot_mistakes(
    list(seen),
    test.labels[worst].tolist(),
    test.predicted[worst].tolist(),
    confidence[worst].tolist(),
    data.classes,
)
keep_figure(figure, name="mistakes")

# %%
from emotion_transfer.explain import grad_cam

# %% [markdown]
# One image of each class, and what in it made the network say what it said. Bright places speak for
# the answer. Each map is scaled to its own highest value, and its cells are coarse: an image of 96
# pixels has 3 x 3 of them, one of 224 has 7 x 7. A network that looks at a frame or a watermark has
# learnt the wrong thing, however good its accuracy.

# %%
from emotion_transfer.augment import prepare_images

chosen = [int(np.flatnonzero(test.labels == c)[0]) for c in np.unique(test.labels)][:8]
batch = datasets["test"].__getitems__(chosen)
inputs = prepare_images(batch.images, cfg.IMG_SIZE, model.spec.mean, model.spec.std)
heat = grad_cam(model, inputs, test.predicted[chosen])
titles = [
    f"{data.classes[test.labels[i]]}: says {data.classes[test.predicted[i]]} ({confidence[i]:.0%})"
    for i in chosen
]
pixels = denormalise(inputs, model.spec.mean, model.spec.std)
keep_figure(plot_gradcam(pixels, heat, titles), name="grad_cam")
