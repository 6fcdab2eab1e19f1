# %% [markdown]
# ## Mixing
#
# *Why show two pictures at once?* **MixUp** ([Zhang et al. 2018](https://arxiv.org/abs/1710.09412))
# lays one picture over another; **CutMix** ([Yun et al. 2019](https://arxiv.org/abs/1905.04899))
# pastes a piece of one into the other. The target is mixed in the same proportion: 70 % awe, 30 %
# fear. That keeps the network from being too sure of itself, and helps most where labels are
# debatable, as emotions are.

# %%
from emotion_transfer.mixing import draw_mixing, mix_images

# %% [markdown]
# Beside each row stand the shares that are the pictures' own, in order. (The figure draws the
# shares evenly, so that the mixture shows; at `MIXUP_ALPHA = 0.2` most of them lie near 0 or 1.)

# %%
plain = torch.from_numpy(rows["as it is"]).permute(0, 3, 1, 2) / 255
before = {"as it is": rows["as it is"]}
for name, alphas in {"MixUp": (1.0, 0.0), "CutMix": (0.0, 1.0)}.items():
    one: dict[str, Any] = {"MIXUP_ALPHA": alphas[0], "CUTMIX_ALPHA": alphas[1], "MIX_PROB": 1.0}
    mixing = draw_mixing(dataclasses.replace(cfg, **one, MIX_OFF_EPOCHS=0), 0, 0, len(plain))
    mixed = mix_images(plain, mixing).mul(255).byte().permute(0, 2, 3, 1).numpy()
    before[f"{name}: own share {', '.join(f'{share:.1f}' for share in mixing.lam)}"] = mixed
keep_figure(plot_rows(before, "Mixing"), name="mixing")
