"""From settings to a run: its configuration, its data, its folder."""

# %% [markdown]
# Two functions lead from the settings to pictures that can be trained on; the command line calls
# the same two. With the sample, a quick profile (few epochs, small images) replaces some defaults;
# what you set yourself still wins. The run's folder ends in a hash of the settings and the data:
# change one that shapes the result and a new run begins beside the old one; run the same again, and
# the run is found and goes on.

# %%
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotion_toolbox.backbones import choose_backbone
from emotion_toolbox.batches import EmotionDataset, make_datasets
from emotion_toolbox.cache import DecodedData, decode_data, refuse_bad_images, refuse_leaks
from emotion_toolbox.device import choose_device, seed_everything
from emotion_toolbox.files import count_threads, resolve_path
from emotion_toolbox.report import make_run_folder, run_name
from emotion_toolbox.sample import load_data, uses_sample
from emotion_toolbox.settings import settings_hash
from emotion_toolbox.tables import EmotionData
from emotion_transfer.config import QUICK_PROFILE, EnhancedConfig, cache_size, make_config


def open_run(settings: Mapping[str, Any]) -> tuple[EnhancedConfig, EmotionData, Path]:
    """The configuration, the data as they are listed, and the folder of the run."""
    cfg = make_config(settings)
    synthetic = uses_sample(cfg.DATASET, cfg.DATA_ROOT)
    if synthetic:
        cfg = make_config(settings, QUICK_PROFILE)
    choose_device(cfg.DEVICE)  # one that is not there should not cost a pass over the images
    listed = load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT)
    if not cfg.INIT_FROM:
        name, weights = choose_backbone(cfg.MODEL_NAME, cfg.WEIGHTS, synthetic=synthetic)
        cfg = dataclasses.replace(cfg, MODEL_NAME=name, WEIGHTS=weights)
    name = cfg.RUN_NAME
    if name == "auto":
        name = run_name(listed, cfg.MODEL_NAME, settings_hash(cfg))
    return cfg, listed, make_run_folder(cfg.OUTPUT_ROOT, name)


def open_data(
    cfg: EnhancedConfig, listed: EmotionData
) -> tuple[DecodedData, dict[str, EmotionDataset]]:
    """Every picture decoded once, those that cannot be used left out; and the three datasets."""
    cache_dir = resolve_path(cfg.CACHE_DIR) if cfg.CACHE else None
    threads = count_threads(cfg.NUM_WORKERS)
    decoded = decode_data(listed, cache_size(cfg), cache_dir=cache_dir, threads=threads)
    refuse_bad_images(decoded, cfg.MAX_BAD_FRACTION)
    refuse_leaks(decoded, cfg.ALLOW_DUPLICATES)
    seed_everything(cfg.SEED)  # from here on everything random follows from it
    return decoded, make_datasets(decoded, 2 * cfg.BATCH_SIZE if cfg.DEBUG else None)
