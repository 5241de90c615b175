"""Videos beside the current folder's data: where lmms-eval's MVBench looks for files."""

from __future__ import annotations

import os
from pathlib import Path


def use_local_videos() -> None:
    """Let MVBench read `mvbench_video/` of the current folder, if it holds MVBench's questions too.

    lmms-eval knows no other place than HF_HOME, and reads that name when the task is loaded. Everything else that
    follows from it (hub and data set caches, the login) stays where it was.
    """
    here = Path.cwd()
    if not ((here / "mvbench_video").is_dir() and (here / "OpenGVLab" / "MVBench").is_dir()):
        return
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    names = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_TOKEN_PATH": "token", "HF_XET_CACHE": "xet"}
    for variable, name in names.items():
        os.environ.setdefault(variable, str(home / name))
    os.environ["HF_HOME"] = str(here)
