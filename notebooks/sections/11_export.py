# %% [markdown]
# ## 11. Summary file and export
#
# What the run leaves for other programs, and a model that can be handed on.

# %%
from emotion_transfer.report import closing_text, summarise_run, write_summary

# %% [markdown]
# ### This run's summary
#
# All figures above, with the settings and versions that gave them.

# %%
summary = summarise_run(cfg, data, result, metrics, comparison)
write_summary(run_dir / "summary.json", summary)
print(run_dir / "summary.json")

# %%
from emotion_transfer.export import export_model, load_export, predict_files, top_classes

# %% [markdown]
# ### Write it, read it back, use it
#
# The export is loaded again from its files and asked about one test image. The answer must be the
# one the network gave above, or something was lost on the way.

# %%
export_dir = export_model(run_dir / "export", cfg, model, data.classes, summary)
exported = load_export(export_dir)
first = datasets["test"].split.path(0)
answer = predict_files(exported, [first])[0]
print(f"{first.name} is {data.classes[test.labels[0]]}; the exported model says:")
for name, probability in top_classes(answer, exported.classes):
    print(f"  {name:<12} {probability:6.1%}")
sorted(file.name for file in export_dir.iterdir())

# %% [markdown]
# The same from a shell, in a checkout of the project, for as many images as you like:
#
# ```
# python -m emotion_transfer.predict --model RUN_FOLDER/export IMAGE...
# ```
