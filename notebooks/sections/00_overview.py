# %% [markdown]
# # Improved CNN transfer learning: which emotion does a picture evoke?
#
# This notebook fine-tunes a network that has learnt to see on ImageNet, ResNet50 or
# EfficientNet-B0, to recognise the emotion a picture evokes: amusement, awe, contentment,
# excitement, anger, disgust, fear or sadness, the eight classes of EmoSet-118K.
#
# **Press *Run All*.** Without any data of your own it draws a small synthetic sample and trains on
# that for a few minutes on a laptop, so that you can see every part work. Then point it to EmoSet,
# or to folders of your own pictures, and run it again.
#
# What you will find, in this order:
#
# 1. **Environment, configuration, data**: one frozen configuration, three splits, a report of every
#    image that cannot be used, each image decoded once.
# 2. **Augmentation, model, optimisation, engine**: what is done to each batch, what the network
#    looks like, how fast which part learns, and a training loop that can be killed and resumed.
# 3. **Training, evaluation, comparison, export, summary**: curves, metrics with intervals, what the
#    network looks at, and three baselines trained in the same run, so that you can tell what all of
#    it was worth.
#
# Everything is defined in the notebook itself, right where it is explained. No result of a model is
# quoted that this run did not measure, save for published figures that are marked as such.
#
# Some words you will meet: the *backbone* is the pretrained part of the network, the *head* the new
# classifier on top of it; *frozen* parts do not learn, *thawed* ones do; *EMA* is a moving average
# of the weights; *macro F1* is a score that counts every class alike.

# %% [markdown]
# > This notebook is generated from `notebooks/sections/` and `emotion_transfer/`. To change it for
# > good, change those and run `create_enhanced_notebook.py`, `extend_notebook.py` and
# > `complete_notebook.py`; what you change here is lost when it is built again.
