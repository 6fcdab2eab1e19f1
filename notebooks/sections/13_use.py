# %% [markdown]
# ## Use
#
# *What does it say of my picture?* First the model is written down so that others can use it: the
# weights in `model.safetensors` (a format that holds numbers and cannot hold code), `config.json`
# with classes, preprocessing and temperature, and a model card. It is read back from these files
# and asked about one test picture; the answer must be the one from above, or something was lost on
# the way.

# %%
from emotion_toolbox.export import export_model, load_export, predict_files, top_classes
from emotion_toolbox.report import closing_text, summarise_run, write_summary

recorded = dataclasses.asdict(cfg)
summary = summarise_run(recorded, data, datasets, result, metrics | compared, tests,
                        temperature, raw)  # fmt: skip
write_summary(run_dir / "summary.json", summary)
folder = export_model(run_dir / "export", model, classes, recorded, cache_size(cfg), summary)
exported = load_export(folder, lambda s, count: build_model(make_config(s), count))
answer = predict_files(exported, [test_set.split.path(0)])[0]
print(f"{folder}: largest difference {abs(answer - test.probabilities[0]).max():.1e}")

# %% [markdown]
# Now **your own picture**: write its path here, or use the button where your Jupyter shows one.

# %%
import ipywidgets

from emotion_toolbox.decoding import decode_image, read_image_bytes

PICTURE = ""
upload = ipywidgets.FileUpload(accept="image/*", description="or upload")
display(upload)

# %% [markdown]
# Run the next cell again after you have chosen one. Without, it takes a test picture.

# %%
picture = Path(PICTURE) if PICTURE else test_set.split.path(len(test_set) // 2)
if upload.value:
    picture = run_dir / "uploaded"
    picture.write_bytes(upload.value[0]["content"])
answer = predict_files(exported, [picture])[0]
said = "\n".join(f"{name} {share:.0%}" for name, share in top_classes(answer, classes))
pixels = decode_image(read_image_bytes(picture), cache_size(cfg), cfg.FIT)
keep_figure(plot_image_grid([pixels], [said]), name="answer")

# %% [markdown]
# For many pictures there is a command, in a checkout of the project: `python -m emotion_transfer
# predict FOLDER --csv answers.csv`.
