# %% [markdown]
# ## Model
#
# *What is transfer learning, and what does the network look like?* A network trained on ImageNet's
# 1.28 million photographs has had to learn what pictures are made of: edges and textures in its
# first layers, parts and faces and skies in its later ones. Little of that is about ImageNet's own
# thousand classes. So the layers are kept, as a **backbone** that turns a picture into a list of
# features, the thousand-class output is taken off, and a small new **head** is put on: the
# knowledge is *transferred*. The earlier a layer, the more general what it has learnt
# ([Yosinski et al. 2014](https://arxiv.org/abs/1411.1792)), and better ImageNet networks transfer
# better ([Kornblith et al. 2019](https://arxiv.org/abs/1805.08974)). That is why a few thousand
# pictures suffice where training from nothing needs a million. [Comparison](#Comparison) trains the
# same network from random weights too, so that you see what ImageNet is worth.

# %%
from emotion_transfer.model import build_model, find_probe, trainable_stages

# %% [markdown]
# Here it is. The stages thaw from the end: what lies early is the most general, and moves last and
# least.

# %%
from emotion_toolbox.backbones import stage_table
from emotion_toolbox.figures import plot_stages
from emotion_toolbox.keeper import load_initial_weights
from emotion_transfer.config import thaw_epochs

folder = run_dir / "baselines"
probe = find_probe(cfg, datasets, folder / "linear_probe") if cfg.START == "probe" else None
model = build_model(cfg, len(classes), probe)
load_initial_weights(model, cfg.INIT_FROM, classes, run_dir)
begin = {stage: epoch + 1 if epoch < cfg.EPOCHS else None
         for level, epoch in reversed([*enumerate((0, *thaw_epochs(cfg)))])
         for stage in trainable_stages(model, level)}  # fmt: skip
table = stage_table(model.stage_modules(), begin)
keep_figure(plot_stages(table, train.pictures([0])[0]), name="model")

# %% [markdown]
# What does it say *before* anything is learnt? With a head of random numbers, nothing that helps.
# Its answers to eight test pictures are kept here, and stand beside those of the trained network at
# the end of [Training](#Training). (A picture that is judged is cut to its centre and not
# augmented, and every one counts exactly once: `predict??`.)

# %%
from emotion_toolbox.probes import predict

test_set = datasets["test"]
eight = np.linspace(0, len(test_set) - 1, 8).round().astype(int)
ask = partial(predict, size=cfg.IMG_SIZE, batch_size=cfg.BATCH_SIZE)
untrained = ask(build_model(cfg, len(classes)), test_set, positions=eight)
print(f"right: {(untrained.predicted == untrained.labels).sum()} of {len(eight)}")

# %% [markdown]
# > **Try it:** set `WEIGHTS` to `None`. How far do the validation curves come?
# >
# > <details><summary>What you should see</summary>On the sample, with EfficientNet-Lite0, random
# > weights end at 32 % of the validation pictures after eight epochs, ImageNet's at 88 %. The
# > curves still rise when training ends, and a recipe for random weights does better
# > ([Comparison](#Comparison) has one), but not nearly as well: 480 pictures do not teach a
# > network to see.</details>
