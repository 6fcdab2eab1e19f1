# %% [markdown]
# ## 5. Model
#
# A pretrained backbone, a new head, and a plan of what trains when.

# %%
from emotion_transfer.model import (
    build_model,
    choose_backbone,
    load_initial_weights,
    parameter_table,
)

# %% [markdown]
# ### Build it
#
# First the weights are looked for. On your own data a backbone without its ImageNet weights is an
# error with a remedy; on the sample the packaged EfficientNet-Lite0 steps in, and the next cell
# says so.

# %%
cfg = choose_backbone(cfg, synthetic=data.synthetic, run_dir=run_dir)
model = build_model(cfg, len(data.classes))
model = load_initial_weights(cfg, model, data.classes, run_dir)
print(f"{cfg.MODEL_NAME}, weights {cfg.WEIGHTS or 'random'}: {len(data.classes)} classes")
model.head

# %% [markdown]
# Where the parameters are, and when each stage starts to train. The early stages see edges and
# textures, which any picture has; they thaw last and move least.

# %%
parameter_table(cfg, model)
