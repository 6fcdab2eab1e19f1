"""Where a run keeps what it makes."""

import hashlib
import re
from pathlib import Path

from emotion_transfer.config import ConfigError, EnhancedConfig, config_hash, resolve_path
from emotion_transfer.data import EmotionData

# %% [markdown]
# #### A folder for every run
#
# Checkpoints, figures, predictions and the summary of a run lie together in one folder. Its name
# ends in a hash of the settings and of the data's names and labels: change one that shapes the
# result and a new run begins beside the old one; run the same again, even with the data in another
# place, and the run is found and resumed.


# %%
def run_name(cfg: EnhancedConfig, data: EmotionData) -> str:
    """``RUN_NAME``, or the data set, the model (the sample chooses later) and a hash."""
    if cfg.RUN_NAME != "auto":
        return cfg.RUN_NAME
    name = "sample" if data.synthetic else f"{data.root.name}-{cfg.MODEL_NAME}"
    facts = [config_hash(cfg), *(split.fingerprint() for split in data.splits.values())]
    digest = hashlib.sha256("".join(facts).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", f"{name}-{digest}")


def make_run_folder(cfg: EnhancedConfig, data: EmotionData) -> Path:
    """Create the run's folder and return it; raises ``ConfigError`` if it cannot be written."""
    folder = resolve_path(cfg.OUTPUT_ROOT) / run_name(cfg, data)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_ROOT={cfg.OUTPUT_ROOT!r}: {folder} cannot be written ({error}); "
            "choose another folder"
        ) from error
    return folder
