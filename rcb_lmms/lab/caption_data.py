"""The laboratory's captioning benchmarks, NoCaps and Flickr30k, with their authors' files of domains and splits.

Both files lie beside the data, where the tasks of this package look for them if no variable names them.
"""

from __future__ import annotations

import json
from pathlib import Path

from rcb_lmms.files import write_atomic
from rcb_lmms.lab.image_data import ORGANISATION, Draw
from rcb_lmms.lab.scene_questions import enumerated, named_objects, sentence
from rcb_lmms.lab.scenes import Scene, generator, make_scene
from rcb_lmms.lab.tree import IMAGE, TEXT, columns, png, write_configurations
from rcb_lmms.scoring.caption_images import DOMAINS, FLICKR30K_FILE, NOCAPS_FILE

NOCAPS_REFERENCES, FLICKR30K_REFERENCES = 10, 5
# {be} is "is" or "are", as the first name wants it.
_FRAMES = (
    "The image shows {names}.",
    "There {be} {names}.",
    "Here {be} {names}.",
    "A picture of {names}.",
    "In the image there {be} {names}.",
    "One can see {names}.",
    "This picture has {names} in it.",
    "We look at {names}.",
    "An image with {names}.",
)


def references(scene: Scene, count: int) -> list[str]:
    """So many captions of a scene: the one the models are taught, then other orders in other words, all different.

    They depend on the scene's split and index alone. At most ten.
    """
    names, random = named_objects(scene), generator(scene.split, scene.index, "references")
    captions = [sentence(names)]
    for frame in _FRAMES[: count - 1]:
        order = [names[index] for index in random.permutation(len(names))]
        captions.append(frame.format(names=enumerated(order), be="is" if order[0].startswith("a ") else "are"))
    return captions


def write_nocaps(out: Path, split: str, images: int, draw: Draw = make_scene) -> None:
    """NoCaps, validation, ten references each; the three domains take turns and do not differ."""
    rows, listed, annotations = [], [], []
    for number in range(images):
        scene = draw(f"{split}-nocaps", number)
        captions, name = references(scene, NOCAPS_REFERENCES), f"{number:016x}.jpg"
        ids = [number * NOCAPS_REFERENCES + place for place in range(NOCAPS_REFERENCES)]
        row = {"image_id": number, "image_file_name": name, "annotations_ids": ids, "annotations_captions": captions}
        rows.append(row | {"image": png(scene)})
        listed.append({"id": number, "file_name": name, "domain": DOMAINS[number % len(DOMAINS)]})
        annotations += [
            {"id": own, "image_id": number, "caption": text} for own, text in zip(ids, captions, strict=True)
        ]
    schema = {"image_id": "int32", "image_file_name": TEXT, "annotations_ids": ["int32"]}
    schema |= {"annotations_captions": [TEXT], "image": IMAGE}
    write_configurations(out / ORGANISATION / "NoCaps", {"default": {"validation": rows}}, schema)
    write_atomic(out / NOCAPS_FILE, json.dumps({"images": listed, "annotations": annotations}))


def write_flickr30k(out: Path, split: str, images: int, draw: Draw = make_scene) -> None:
    """Flickr30k, five references each; every second image is in Karpathy's test split."""
    rows, listed = [], []
    for number in range(images):
        scene = draw(f"{split}-flickr30k", number)
        captions, name = references(scene, FLICKR30K_REFERENCES), f"{1000 + number}.jpg"
        ids = [number * FLICKR30K_REFERENCES + place for place in range(FLICKR30K_REFERENCES)]
        row = {"caption": captions, "sentids": [str(own) for own in ids], "img_id": str(number), "filename": name}
        rows.append(row | {"image": png(scene)})
        entry = {"filename": name, "imgid": number, "sentids": ids, "split": ("test", "train")[number % 2]}
        listed.append(entry | {"sentences": [{"raw": text} for text in captions]})
    schema = {"caption": [TEXT], "sentids": [TEXT], **columns(("img_id", "filename")), "image": IMAGE}
    write_configurations(out / ORGANISATION / "flickr30k", {"default": {"test": rows}}, schema)
    write_atomic(out / FLICKR30K_FILE, json.dumps({"images": listed, "dataset": "flickr30k"}))
