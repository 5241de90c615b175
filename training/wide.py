"""The laboratory's checkpoints with attention heads of a width that vLLM's attention on a CPU has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rcb_lmms.lab.checkpoint import lab_checkpoint


def save_wide(folder: Path, family: str = "llava", wide: int = 64) -> Path:
    """Write a laboratory checkpoint whose heads of 40 are padded with zeros to `wide`: the same function, in float32.

    Scores are divided by the root of the heads' width, so queries grow by the root of the ratio; the rotary base is
    raised so that the turning dimensions keep their frequencies, in their halves.
    """
    source = lab_checkpoint(family)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    width = text["head_dim"]
    text["head_dim"], config["dtype"] = wide, "float32"
    text["rope_parameters"]["rope_theta"] **= wide / width
    (folder / "config.json").write_text(json.dumps(config))
    half = torch.arange(width // 2)
    places = torch.cat([half, wide // 2 + half])

    def padded(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(0, (-1, width))
        found = heads.new_zeros(heads.shape[0], wide, *heads.shape[2:])
        found[:, places] = heads
        return found.flatten(0, 1)

    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        weight = weight.float()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and "language_model" in name:
            weight = padded(weight) * ((wide / width) ** 0.5 if "q_proj" in name else 1)
        elif name.endswith("self_attn.o_proj.weight"):
            weight = padded(weight.T).T
        # Today's name of the tower's weights in files, which is the one that vLLM reads.
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        weights[name] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
