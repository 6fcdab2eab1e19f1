# %% [markdown]
# ## Evaluation
#
# *How good is it, and where does it fail?* No decision so far was made on the test pictures, so
# they can tell how the network does on pictures it has never seen. Look at them once. If you tune
# on them, they become validation pictures and you have no test any more.
#
# An accuracy on a *finite* set would have come out a little different on another. So every number
# comes with the range that holds it in about 95 of 100 repetitions, and decimals beyond the width
# of that range mean nothing.

# %%
from emotion_transfer.intervals import evaluate_predictions

# %% [markdown]
# **Temperature scaling** ([Guo et al. 2017](https://arxiv.org/abs/1706.04599)). A network may rank
# the classes well and still be too sure, or not sure enough. So its scores are divided by one
# number before the softmax: above 1 it answers more modestly, below 1 more surely. The number is
# the one that gives the labels of the *validation* split the least *negative log-likelihood* (NLL,
# the cross-entropy without weights and smoothing). The order of the classes stays, and with it the
# accuracy.
#
# Each cell reads *value [low, high]*. What is *macro* is a mean over the classes, of F1, precision
# or recall (the next part says what these are); *weighted* F1 counts each class by its pictures.
# *Cohen's kappa* is how much of the way from chance to perfect was gone: 0 for answers dealt out
# blindly, 1 for no mistake. *Top-2* lets a second guess count; *polarity*, where the classes are
# EmoSet's, asks only for pleasant or unpleasant. *ECE* comes further down.
#
# The validation figures are a little too good, because the best epoch and the temperature were
# chosen by them; the test figures are the ones to quote.

# %%
from emotion_toolbox.measures import calibrate, fit_temperature
from emotion_toolbox.report import write_predictions

ask = partial(ask, amp=result.amp, tta=cfg.TTA)
found = {split: ask(model, datasets[split]) for split in ("val", "test")}
temperature = fit_temperature(found["val"].labels, found["val"].probabilities)
calibrated = {split: calibrate(p, temperature) for split, p in found.items()}
measure = partial(evaluate_predictions, resamples=cfg.BOOTSTRAP, seed=cfg.SEED)
raw, metrics = ({s: measure(p.labels, p.probabilities, classes) for s, p in answers.items()}
                for answers in (found, calibrated))  # fmt: skip
test = calibrated["test"]
write_predictions(run_dir / "predictions_test.csv", test_set, test)
pd.DataFrame({split: {m: f"{e:.3f}" for m, e in ms.items()} for split, ms in metrics.items()})

# %% [markdown]
# **Class by class.** Precision asks: of all pictures the network called *awe*, how many were?
# Recall: of all that were, how many did it find? F1 is high only where both are. Low precision
# means that a name is given too freely, low recall that its pictures go unrecognised.

# %%
from emotion_toolbox.figures import plot_confusion, plot_mistakes, plot_per_class, plot_reliability
from emotion_toolbox.measures import most_confused_pairs, per_class_table, reliability_table

report = per_class_table(test.labels, test.predicted, classes)
keep_figure(plot_per_class(report), name="per_class")

# %% [markdown]
# **Which classes are mistaken for which?** Emotions that are alike in being pleasant or unpleasant,
# calm or agitated, are the ones that people confuse too.

# %%
from sklearn.metrics import confusion_matrix

confusion = confusion_matrix(test.labels, test.predicted, labels=range(len(classes)))
display(most_confused_pairs(confusion, classes))
keep_figure(plot_confusion(confusion, classes), name="confusion")

# %% [markdown]
# **Does it know how sure it is?** Of all answers given with 80 % confidence, 80 % should be right:
# bars that reach the diagonal. Bars below it mean that the network is too sure of itself, bars
# above it too modest, which label smoothing and mixing tend to cause. The *expected calibration
# error* (ECE) is their mean distance. On the left the network as it came out of training, on the
# right with the temperature. If that helps here, it does so on pictures it was not fitted on.

# %%
bins = [reliability_table(p.labels, p.probabilities) for p in (found["test"], test)]
keep_figure(plot_reliability(bins, [raw["test"], metrics["test"]], temperature), name="reliability")

# %% [markdown]
# **Its most confident mistakes** are the most instructive pictures of all. In some the network has
# missed the point; in others the *label* is arguable, for what a picture evokes is not the same for
# everybody, and now and then it is plainly wrong.

# %%
confidence = test.probabilities.max(1)
wrong = np.flatnonzero(test.predicted != test.labels)
worst = wrong[np.argsort(-confidence[wrong])][:12]
answers = (test.labels[worst], test.predicted[worst], confidence[worst])
keep_figure(plot_mistakes(test_set.pictures(worst), *answers, classes), name="mistakes")

# %% [markdown]
# **Where does it look?** *Grad-CAM* ([Selvaraju et al. 2017](https://arxiv.org/abs/1610.02391))
# asks how much each channel of the last convolutional layer, which still knows *where* things are,
# speaks for the answer, by the gradient, and adds the channels up with these weights
# (`grad_cam??`). A network that looks at a frame or a watermark has learnt the wrong thing, however
# good its accuracy.

# %%
from emotion_toolbox.probes import grad_cam
from emotion_toolbox.figures import plot_gradcam
from emotion_toolbox.pixels import prepare_images

images, spec = test_set.batch(eight).images, model.spec
inputs = prepare_images(images, cfg.IMG_SIZE, spec.mean, spec.std)
last_stage = model.stage_modules()[list(spec.stages)[-1]][-1]
heat = grad_cam(model, last_stage, inputs, test.predicted[eight])
titles = [f"{classes[test.labels[i]]}: says {classes[test.predicted[i]]}" for i in eight]
keep_figure(plot_gradcam(denormalise(inputs, spec.mean, spec.std), heat, titles), name="grad_cam")

# %% [markdown]
# > **Try it:** set `IMG_SIZE` to 160. What becomes of the heat maps, and of the validation
# > accuracy?
# >
# > <details><summary>What you should see</summary>On the sample (96 pixels by default) the maps
# > have 5 x 5 cells instead of 3 x 3, and the validation accuracy is the same, 88 %, for 2.8
# > times the arithmetic.</details>
