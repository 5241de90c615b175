"""For the tests of both families with tiles: the unpruned model, views marked by number, a codebook's experiments."""

from __future__ import annotations

import itertools

import numpy as np
import tiny
import torch

from rcb_lmms.codebook import probe
from rcb_lmms.codebook.build import build
from rcb_lmms.engine.prefill import Prefill
from rcb_lmms.families.images import Visual
from rcb_lmms.families.prompts import interleave
from rcb_lmms.pruners.base import Selection, VisualTokens
from rcb_lmms.pruners.none import NoPruning


def unpruned(family, text, images=(), frames=()):
    """Embeddings that reach the language model, and logits, when Hugging Face does everything."""
    media = (["video"] if frames else []) + ["image"] * len(images)
    messages = [{"role": "user", "content": interleave(text, media)}]
    prompt = family.processor.apply_chat_template(messages, add_generation_prompt=True)
    own = {"images": [list(images)]} if images else {"videos": [np.stack([np.asarray(frame) for frame in frames])]}
    inputs = family.processor(text=[prompt], return_tensors="pt", **own)
    seen = {}
    hook = family.model.model.language_model.register_forward_pre_hook(
        lambda _, __, arguments: seen.update(arguments), with_kwargs=True
    )
    with torch.inference_mode():
        logits = family.model(**inputs).logits
    hook.remove()
    return seen["inputs_embeds"][0], logits[0]


def packed(family, pruner, visuals):
    views = family.encode(visuals, pruner.needs)
    selections = [[pruner.choose(view) for view in own] for own in views]
    return [family.pack_selected(*parts) for parts in zip(views, selections, visuals, strict=True)]


def assert_unpruned(family, ids, visuals, embeds, logits):
    """The prompt of everything kept is the one that the Hugging Face model makes; returns it."""
    prompt = family.embed(ids, packed(family, NoPruning(), visuals))
    torch.testing.assert_close(prompt.embeds, embeds, rtol=0, atol=1e-5)
    with torch.inference_mode():
        ours = family.model(inputs_embeds=prompt.embeds[None]).logits[0]
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    assert prompt.native == prompt.retained == sum(stop - start for start, stop in prompt.spans)
    return prompt


def marked(views, kept=range(16), side=4):
    """Every value of token i of view v is 100 v + i: views and selections."""
    n = side * side
    tokens = [torch.full((n, tiny.WIDTH), 100.0 * v) + torch.arange(float(n))[:, None] for v in range(views)]
    selection = Selection(torch.tensor(list(kept), dtype=torch.long), torch.zeros(n))
    return [VisualTokens(own, (side, side)) for own in tokens], [selection] * views


def names(family, image):
    """The packed rows of `marked` views by name: numbers, and "newline" for the model's newline."""
    newline = family.model.model.image_newline
    found = ["newline" if torch.equal(row, newline) else int(row.unique().item()) for row in image.embeds]
    assert [place for place, name in enumerate(found) if name == "newline"] == list(image.rows.newlines)
    return found


def names_in_rows(rows, columns, columns_of_tiles):
    """The names of a base view and of its tiles' rows and columns of tokens, with a newline behind every row."""
    expected = list(range(16))
    for row in rows:
        for column in columns:
            tile = 1 + row // 4 * columns_of_tiles + column // 4
            expected.append(100 * tile + row % 4 * 4 + column % 4)
        expected.append("newline")
    return expected


def video(count, size=(80, 60)):
    return Visual(tuple(tiny.random_image(30 + number, *size) for number in range(count)), "video")


@torch.inference_mode()
def fed_with(family, pixels):
    """Fields of `VisualTokens` for `(3, 56, 56)` pixels by the plain tower, with hooks on its last block."""
    model, seen = family.model.model, {}
    attention = model.vision_tower.encoder.layers[-1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
        for name in ("q_proj", "k_proj")
    ]
    output = model.vision_tower(pixels[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    if "cls_attention" not in family.provides:
        hidden = output.hidden_states[-1]
        # What the projector reads comes before the tower's last norm.
        normed = model.vision_tower.post_layernorm(hidden)
        torch.testing.assert_close(normed, output.last_hidden_state, rtol=0, atol=1e-5)
        return {"features": model.multi_modal_projector(hidden)[0], "encoder_features": hidden[0]}
    hidden = output.hidden_states[-2][0]
    keys, query = seen["k_proj"].double(), seen["q_proj"].double()[0]
    return {
        "features": model.multi_modal_projector(hidden[1:]),
        "encoder_features": hidden[1:],
        "keys": keys[1:],
        "cls_attention": torch.softmax(keys @ query / keys.shape[1] ** 0.5, 0)[1:],
        "cls_similarity": torch.cosine_similarity(hidden[1:].double(), hidden[:1].double()),
    }


def codebook_and_prompts(family, image, settings, folder, monkeypatch):
    """The codebook of one image, and the visual tokens and newlines of every prompt that its builder asked."""
    image.save(folder / "image.png")
    ids = family.prompt(settings.prompt)
    start = ids.index(family.model.config.image_token_id)
    seen = []

    class Watched(Prefill):
        def __init__(self, own, embeds):
            super().__init__(own, embeds)
            seen.append(embeds)

        def continued(self, shared, rests, *given):
            seen.extend(torch.cat([self.embeds[:count], rest]) for count, rest in zip(shared, rests, strict=True))
            return super().continued(shared, rests, *given)

    monkeypatch.setattr(probe, "Prefill", Watched)
    codebook = build(family, [folder / "image.png"], folder / "book.safetensors", settings, progress=False)
    return codebook, [embeds[start : start + 1 + len(embeds) - len(ids)] for embeds in seen]


def assert_experiments(family, prompts, tokens, patches, repeats, pad):
    """The whole image, then four experiments, a window's once for all its `patches`; a newline ends every input."""
    newline = family.model.model.image_newline
    whole, *probes = prompts
    assert all(torch.equal(rows[-1], newline) for rows in (whole, *probes))
    torch.testing.assert_close(whole[:-1], tokens, rtol=0, atol=1e-5)
    around = [tuple(max(0, min(place - 1, 1)) for place in divmod(patch, 4)) for patch in patches]
    windows = list(dict.fromkeys(around))
    ends = list(itertools.accumulate([0, len(patches), len(windows), len(patches), len(windows)]))
    assert ends[-1] == len(probes)
    singles, regions, ablated_regions, ablations = (probes[a:b] for a, b in itertools.pairwise(ends))
    for row, (patch, (top, left)) in enumerate(zip(patches, around, strict=True)):
        number = windows.index((top, left))
        single, region, ablated_region, ablated = (
            singles[row], regions[number], ablated_regions[row], ablations[number]
        )  # fmt: skip
        window = [row * 4 + column for row in range(top, top + 3) for column in range(left, left + 3)]
        without, hole = tokens.clone(), tokens.clone()
        without[patch], hole[window] = pad, pad
        torch.testing.assert_close(single[:-1], tokens[patch].expand(repeats, -1), rtol=0, atol=1e-5)
        torch.testing.assert_close(region[:-1], tokens[window], rtol=0, atol=1e-5)
        torch.testing.assert_close(ablated_region[:-1], without[window], rtol=0, atol=1e-5)
        torch.testing.assert_close(ablated[:-1], hole, rtol=0, atol=1e-5)
