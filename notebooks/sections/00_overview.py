# %% [markdown]
# # Which emotion does a picture evoke?
#
# ![Training on the built-in sample](docs/first_screen.png)
#
# *What a run on the built-in synthetic sample gives, here with EfficientNet-Lite0, a small network
# whose weights need no download: its guesses before training and after it.*
#
# Here a network that has learnt to see on ImageNet (ResNet50 or EfficientNet-B0) learns to tell
# which of eight emotions a picture evokes. You will learn
#
# - what *transfer learning* is, why it works, and what the ImageNet weights are worth in numbers;
# - what augmentation, MixUp and CutMix do to a picture, and what they are for;
# - how head and backbone are trained at different rates and thawed in stages;
# - how to read training curves, and how far a test accuracy can be trusted;
# - how to train on your own pictures, and to use what came out.
#
# **Press *Run All*.** It takes up to half an hour on a laptop without a GPU, with pictures that the
# notebook draws itself. [Settings](#Settings) says how to take your own, or EmoSet-118K.

# %% [markdown]
# | part | the question it answers |
# |---|---|
# | [Toolbox](#Toolbox) | the plumbing, folded away; **skip it** |
# | [Settings](#Settings) | what can I change, and where? |
# | [Data](#Data) | what does the network learn from? |
# | [Augmentation](#Augmentation) | how can few pictures be made into many? |
# | [Mixing](#Mixing) | why show two pictures at once? |
# | [Model](#Model) | what is transfer learning, and what does the network look like? |
# | [Loss](#Loss) | what exactly is made small? |
# | [Rates](#Rates) | how fast does which part learn? |
# | [Engine](#Engine) | what happens in one step, and in one epoch? |
# | [Training](#Training) | does it learn, or does it memorise? |
# | [Evaluation](#Evaluation) | how good is it, and where does it fail? |
# | [Comparison](#Comparison) | what was all of it worth? |
# | [Use](#Use) | what does it say of *my* picture? |
# | [Summary](#Summary) | what came out, and what next? |
#
# **In Colab** choose *Runtime > Change runtime type > GPU* first. To keep your runs, mount Drive in
# a first cell of your own (`from google.colab import drive; drive.mount("/content/drive")`) and set
# `OUTPUT_ROOT` to a folder on it, `/content/drive/MyDrive/runs` say; your own pictures may lie
# there too. Leave `CACHE_DIR` where it is, because Drive is slow. **In
# Kaggle** switch on *GPU* and *Internet* in the sidebar; data sets lie in `/kaggle/input/NAME`, and
# what you write to `/kaggle/working` stays.
#
# > Change here what you like. Who works in a checkout of the project changes the sources instead
# > (`notebooks/sections/`, `emotion_transfer/`, `emotion_toolbox/`), from which this notebook is
# > built; `CONTRIBUTING.md` says how.
