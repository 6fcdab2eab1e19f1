# %% [markdown]
# ## Comparison
#
# *What was all of it worth?* An accuracy alone says nothing: it must beat what can be had for less.

# %%
from emotion_transfer.baselines import run_baseline

# %% [markdown]
# `BASELINES` says which to train; the plain fine-tune takes about as long as the training above.
# Each is kept: run this again and it is read back.

# %%
baselines = {name: run_baseline(name, cfg, datasets, folder) for name in cfg.BASELINES}

# %% [markdown]
# What the ImageNet weights buy shows most in the first epochs:

# %%
from emotion_toolbox.figures import plot_comparison, plot_curves

by_epoch = {name: answer["curve"] for name, answer in baselines.items() if "curve" in answer}
by_epoch["this notebook"] = result.history["val_accuracy"].to_numpy()
keep_figure(plot_curves(by_epoch, "validation accuracy"), name="curves")

# %% [markdown]
# **Is one model really better than another?** Read the intervals before the values. On the *same*
# pictures models must be compared picture by picture: where both are right, or both wrong, a
# picture says nothing about which is better. *Ours is better by* is the difference of the two
# accuracies with an interval of its own: if that holds zero, the difference may be chance. If the
# models were equally good, each picture that only one of them gets right would be a fair coin toss:
# that is McNemar's test ([McNemar 1947](https://doi.org/10.1007/BF02295996); `paired_test??`). Its
# p-value says how often equals would differ this much, not that the difference is large.

# %%
from emotion_toolbox.measures import paired_test
from emotion_toolbox.report import comparison_table, published_accuracies

others = {name: answer["probabilities"] for name, answer in baselines.items()}
compared = {name: measure(test.labels, p, classes) for name, p in others.items()}
compared["this notebook"] = metrics["test"]
tests = {name: paired_test(test.labels, test.predicted, p.argmax(1), seed=cfg.SEED)
         for name, p in others.items()}  # fmt: skip
comparison_table(compared, tests)

# %% [markdown]
# The same as a picture. On EmoSet itself, published accuracies stand beside ours with a marker of
# their own: others measured them with other code, some on other splits.

# %%
published = published_accuracies(classes, synthetic=data.synthetic)
keep_figure(plot_comparison(compared, published), name="comparison")

# %% [markdown]
# **What is each technique worth by itself?** No single run can say. *Measured before, not in this
# run*, by `python -m emotion_transfer ablate --seeds 2`, on the 121 validation pictures of a small
# set of photographs (511 to learn from; three classes, unpleasant to pleasant; EfficientNet-Lite0,
# 128 pixels, 8 epochs): points of accuracy with a technique, less those without it.
#
# | ingredient | in the recipe | oasis valence3 |
# | --- | --- | --- |
# | *accuracy of the whole recipe* |  | 0.587 [0.504, 0.669] |
# | start from the probe | yes | +2.9 [-5.0, +10.7] |
# | progressive head | no | +0.0 [-6.6, +7.4] |
# | mixing | no | -5.0 [-11.6, +1.7] |
# | label smoothing | yes | -1.7 [-9.1, +5.0] |
# | class weights | yes | +0.0 [-5.8, +5.8] |
# | weight averaging | yes | +1.2 [-2.1, +6.6] |
# | staged thawing | no | -1.2 [-7.4, +5.0] |
# | frozen BatchNorm | yes | +4.1 [-3.3, +11.6] |
# | colour | yes | -0.4 [-5.8, +5.0] |
# | erasing | yes | +1.2 [-5.0, +7.4] |
# | test-time augmentation | yes | +0.4 [-3.3, +4.1] |
#
# Every interval holds zero: with so few pictures none of this is proven, however plausible it
# looks, and a longer list of tricks is no evidence either. To *see* 3 points you need thousands of
# pictures, or many seeds. The widest gains are the start from the probe and the frozen BatchNorm
# statistics; mixing, which the small-set profile leaves out, would rather cost something here.

# %% [markdown]
# > **Try it:** switch one technique off, `{"EMA_DECAY": 0}` say, and run with three seeds
# > (`SEED`). Is the difference in validation accuracy larger than the spread between the seeds?
# >
# > <details><summary>What you should see</summary>On the sample, with the seeds 42, 43 and 44:
# > 88.3, 90.0 and 89.2 % with the average of the weights, 88.3, 89.2 and 89.2 % without. One
# > picture in one of the runs: nothing that could be told from chance. What helps one data set
# > may do nothing for another, and only a comparison tells.</details>
