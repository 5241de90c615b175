"""The laboratory's vision towers: CLIP and SigLIP, small, started with a sense of place, and what is read of them."""

from __future__ import annotations

import numpy as np

from rcb_lmms.lab.scenes import GRID, IMAGE_SIZE_PX, PATCH_PX

VISION_WIDTH = 128
MEAN, STD = (0.48, 0.46, 0.42), (0.26, 0.26, 0.27)


def vision_config(family: str = "llava"):
    """Configuration of the tower, 168 px and patch 14: CLIP of six blocks, of which LLaVA reads the fifth, or SigLIP.

    The SigLIP of LLaVA-OneVision has lost its last block, so that its five blocks are read to the end.
    """
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    sizes = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE_PX,
        "patch_size": PATCH_PX,
    }
    if family == "llava_onevision":
        return SiglipVisionConfig(num_hidden_layers=5, vision_use_head=False, **sizes)
    return CLIPVisionConfig(num_hidden_layers=6, projection_dim=VISION_WIDTH, **sizes)


def make_tower(family: str = "llava"):
    """An untrained tower whose patches already know where they lie and look at their neighbours.

    Learning to look around takes a plain random tower most of a short training: shapes need more than one patch.
    """
    import torch
    from transformers import CLIPVisionModel, SiglipVisionModel

    config = vision_config(family)
    tower = (SiglipVisionModel if family == "llava_onevision" else CLIPVisionModel)(config)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[-GRID * GRID :] = torch.from_numpy(_grid_waves(config.hidden_size))
        for number, layer in enumerate(tower.encoder.layers[:5]):
            offsets = _DIAGONAL if number % 2 else _STRAIGHT
            query, key = (torch.from_numpy(_looking(config.hidden_size, table)) for table in (offsets, _HERE))
            layer.self_attn.q_proj.weight += query
            layer.self_attn.k_proj.weight += key
    return tower


def read_tower(tower, pixel_values):
    """What the projector reads, `(b, 144, c)`, and the pooled class token `(b, c)`, `None` for SigLIP."""
    output = tower(pixel_values, output_hidden_states=True)
    if tower.config.model_type == "siglip_vision_model":
        return output.hidden_states[-1], None
    return output.hidden_states[-2][:, 1:], output.pooler_output


# Where each of the four heads looks at first: (rows, columns) from the patch itself.
_STRAIGHT = ((0, 1), (0, -1), (1, 0), (-1, 0))
_DIAGONAL = ((1, 1), (1, -1), (-1, 1), (-1, -1))
_HERE = ((0, 0),) * 4
_LOOK_SHARPNESS = 1.6


def _angles(width: int) -> np.ndarray:
    return np.pi / GRID * 2.0 ** np.linspace(-1, 3, width // 4)


def _grid_waves(width: int) -> np.ndarray:
    """Sines and cosines of row and column at `width / 4` frequencies, `(144, width)` float32."""
    rows, columns = np.mgrid[:GRID, :GRID].reshape(2, -1, 1)
    waves = [wave(axis * _angles(width)) for axis in (rows, columns) for wave in (np.sin, np.cos)]
    return (0.3 * np.concatenate(waves, 1)).astype(np.float32)


def _looking(width: int, offsets) -> np.ndarray:
    """A projection that shifts the waves of `_grid_waves` by each head's offset, `(width, width)` float32."""
    quarter, angles = width // 4, _angles(width)
    projection = np.zeros((width, width), np.float32)
    chosen = np.linspace(quarter // 4, quarter - 4, width // 16).astype(int)
    for head, shift in enumerate(offsets):
        row = head * quarter
        for axis, steps in enumerate(shift):
            for frequency in chosen:
                sine, cosine = 2 * axis * quarter + frequency, (2 * axis + 1) * quarter + frequency
                turn = angles[frequency] * steps
                projection[row, [sine, cosine]] = np.cos(turn), np.sin(turn)
                projection[row + 1, [sine, cosine]] = -np.sin(turn), np.cos(turn)
                row += 2
    return _LOOK_SHARPNESS * projection


def preprocess(pixels: np.ndarray):
    """What the image processor does to scenes of the right size: uint8 `(b, h, w, 3)` to float `(b, 3, h, w)`."""
    import torch

    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
