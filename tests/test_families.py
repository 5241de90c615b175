import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from rcb_lmms.errors import UserError
from rcb_lmms.families import default_codebook, family_of, load_family
from rcb_lmms.families.base import interleave
from rcb_lmms.families.images import as_rgb, central_square_region, content_key, pad_to_square
from rcb_lmms.families.packed import PackedImage, Rows

NEEDS = frozenset({"encoder_features", "keys", "cls_attention", "cls_similarity"})


def native_inputs(family, images, text):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    prompt = family.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return family.processor(images=images, text=prompt, return_tensors="pt")


@pytest.mark.parametrize("count", [1, 3])
def test_keeping_everything_gives_the_embeddings_of_the_unpruned_model(family, count):
    images = [tiny.random_image(seed) for seed in range(count)]
    inputs = native_inputs(family, images, "What is it?")
    with torch.inference_mode():
        embeds = family.model.get_input_embeddings()(inputs["input_ids"])[0]
        rows = torch.cat(list(family.model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeds[inputs["input_ids"][0] == family.model.config.image_token_id] = rows
    views = family.encode(images)
    prompt = family.embed(family.prompt("What is it?", count), [family.pack_base(own[0].features) for own in views])
    torch.testing.assert_close(prompt.embeds, embeds, rtol=0, atol=1e-6)
    assert [end - start for start, end in prompt.spans] == [16] * count
    assert prompt.prefix == prompt.spans[-1][1]


def test_cls_tensors_are_those_of_eager_attention_in_the_last_block(checkpoint):
    family = load_family(str(checkpoint), attn_implementation="eager")
    image = tiny.random_image(1)
    ((view,),) = family.encode([image], NEEDS)
    pixels = family.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    tower = family.model.model.vision_tower
    projections = {}
    attention = tower.encoder.layers[-1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: projections.update({name: out[0]}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][0]
    for hook in hooks:
        hook.remove()
    keys = projections["k_proj"].double()
    scores = torch.softmax(keys @ projections["q_proj"][0].double() / keys.shape[1] ** 0.5, 0)[1:]
    torch.testing.assert_close(view.encoder_features, hidden[1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(view.keys.double(), keys[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(view.cls_attention.double(), scores, rtol=0, atol=1e-6)
    cosine = torch.cosine_similarity(hidden[1:].double(), hidden[:1].double())
    torch.testing.assert_close(view.cls_similarity.double(), cosine, rtol=0, atol=1e-6)
    torch.testing.assert_close(family.project(view.encoder_features), view.features, rtol=0, atol=1e-5)


def test_views_do_not_depend_on_the_batch(family):
    images = [tiny.random_image(seed, 40 + 20 * seed, 60) for seed in range(4)]
    together = family.encode(images, NEEDS)
    for image, (view,) in zip(images, together, strict=True):
        ((alone,),) = family.encode([image], NEEDS)
        assert view.key == alone.key == content_key(image)
        torch.testing.assert_close(view.features, alone.features, rtol=0, atol=1e-5)


def test_tokens_that_are_no_numbers_are_refused_by_image(make, monkeypatch):
    family = make()
    images = [tiny.random_image(seed) for seed in range(3)]
    project = family.project

    def spoiled(features):
        tokens = project(features)
        return tokens.index_fill(0, torch.tensor([1]), float("nan")) if len(tokens) == 3 else tokens

    monkeypatch.setattr(family, "project", spoiled)
    with pytest.raises(UserError, match=content_key(images[1])[:12]):
        family.encode(images)
    assert len(family.encode(images[:2])) == 2


def test_optional_tensors_are_left_out_unless_needed(family):
    ((view,),) = family.encode([tiny.random_image(0)])
    assert view.encoder_features is view.keys is view.cls_attention is view.cls_similarity is None


@pytest.mark.parametrize(
    ("text", "images", "items"),
    [
        ("Q", 2, ["image", "image", "Q"]),
        ("A <image> B <image>", 2, ["A <image> B <image>"]),
        ("A <image> B", 3, ["image", "image", "A <image> B"]),
        ("A <image> B <image> C", 1, ["image", "A <\ue000image> B <\ue000image> C"]),
        ("<image>A <image> B", 1, ["<image>A <\ue000image> B"]),
        ("A <image> B <image> C <image>", 2, ["A <image> B <image> C <\ue000image>"]),
        ("Q", 0, ["Q"]),
    ],
)
def test_placeholders_interleave_missing_ones_come_first_and_spare_ones_go(text, images, items):
    assert [item.get("text", "image") for item in interleave(text, ["image"] * images)] == items


def test_images_stand_where_the_text_has_them(family):
    ids = family.prompt("first <image> second <image>", 2)
    images = [PackedImage(Rows(torch.full((k, tiny.WIDTH), float(k))), 16, k) for k in (2, 3)]
    prompt = family.embed(ids, images)
    (a, b), (c, d) = prompt.spans
    assert (b - a, d - c) == (2, 3)
    assert (prompt.native, prompt.retained) == (32, 5)
    assert torch.equal(prompt.embeds[a:b], images[0].embeds)
    assert torch.equal(prompt.embeds[c:d], images[1].embeds)
    between = family.tokenizer(" second ", add_special_tokens=False)["input_ids"]
    assert torch.equal(prompt.embeds[b:c], family.model.get_input_embeddings()(torch.tensor(between)))
    with pytest.raises(UserError, match="2 image placeholders"):
        family.embed(ids, images[:1])


def test_the_vicuna_template_adds_the_original_system_prompt(checkpoint):
    family = load_family(str(checkpoint), template="vicuna")
    text = family.tokenizer.decode(family.prompt("Is it red?"), skip_special_tokens=False)
    assert text == (
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nIs it red? ASSISTANT:"
    )


def test_pad_preset_shows_the_whole_image_on_a_square_of_the_mean_colour(checkpoint):
    wide = Image.new("RGB", (80, 40), "red")
    square = pad_to_square(wide, (1 / 255, 2 / 255, 3.4 / 255))
    assert square.size == (80, 80)
    assert square.getpixel((5, 5)) == (1, 2, 3)
    assert square.getpixel((5, 20)) == square.getpixel((5, 59)) == (255, 0, 0)
    crop, pad = (load_family(str(checkpoint), preprocess=name) for name in ("rcb", "pad"))
    assert not torch.allclose(crop.encode([wide])[0][0].features, pad.encode([wide])[0][0].features, atol=1e-3)
    same = tiny.random_image(0, 60, 60)
    assert torch.equal(crop.encode([same])[0][0].features, pad.encode([same])[0][0].features)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "L", "I;16", "1"])
def test_every_image_mode_becomes_rgb(family, mode):
    image = Image.new(mode, (30, 20))
    assert as_rgb(image).mode == "RGB"
    assert torch.isfinite(family.encode([as_rgb(image)])[0][0].features).all()


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert [as_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 3)])
def test_extreme_shapes_are_encoded(family, size):
    ((view,),) = family.encode([Image.new("RGB", size, "blue")])
    assert view.features.shape == (16, tiny.WIDTH)


def test_cutting_far_ends_leaves_the_centre_crop_alone():
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 1000, 3), dtype=np.uint8))
    cut = central_square_region(strip)
    assert cut.size == (160, 10)
    left = (1000 - 160) // 2
    assert cut.tobytes() == strip.crop((left, 0, left + 160, 10)).tobytes()
    assert central_square_region(cut) is cut


def test_unreadable_images_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does to the whole process
    (tmp_path / "empty.png").write_bytes(b"")
    tiny.random_image(0).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    for name in ("empty.png", "cut.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            as_rgb(tmp_path / name)


def test_gigantic_images_are_refused_before_they_are_decoded(tmp_path):
    import os
    import struct
    import time
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(10)), b"IEND")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    os.mkfifo(tmp_path / "pipe.png")
    begun = time.monotonic()
    for image, found in (
        (tmp_path / "bomb.png", "60000|3600000000"),
        (Image.new("1", (20_000, 10_000)), "20000 x 10000 pixels"),
        (tmp_path / "pipe.png", "a pipe"),
        (tmp_path, "a folder"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(UserError, match=found):
            as_rgb(image)
    with pytest.raises(UserError, match="40000 x 40000 pixels"):
        pad_to_square(Image.new("RGB", (40_000, 2)), (0, 0, 0))
    assert time.monotonic() - begun < 2


def test_content_keys_name_pixels_not_objects():
    assert content_key(tiny.random_image(0)) == content_key(tiny.random_image(0)) != content_key(tiny.random_image(1))
    # The same bytes in another shape are another image.
    assert content_key(Image.new("RGB", (2, 3))) != content_key(Image.new("RGB", (3, 2)))


def test_checkpoints_that_do_not_load_say_why(tmp_path, checkpoint):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="type llama"):
        load_family(str(tmp_path / "text"))
    with pytest.raises(UserError, match="hf download"):
        load_family("nobody/no-such-model")
    with pytest.raises(UserError, match="no such choice"):
        load_family(str(checkpoint), preprocess="stretch")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(UserError, match="complete the folder"):
        load_family(str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"device": "foo"}, "cpu"),
        ({"device": "cuda:999"}, "cpu"),
        ({"device": "cpu:x"}, "cpu"),
        ({"attn_implementation": "flsh"}, "sdpa, eager, "),
        ({"attn_implementation": "flash_attention_3"}, "sdpa and eager"),
        ({"dtype": "int8"}, "float16"),
        ({"device_map": "everywhere"}, "balanced"),
        ({"device_map": {"": "cpu"}, "device": "cpu"}, "one device for each process"),
        ({"quantization": "3bit"}, "8bit"),
    ],
)
def test_what_this_machine_lacks_is_refused_before_anything_is_read(checkpoint, monkeypatch, options, allowed):
    def read(*_, **__):
        raise AssertionError("read before it was checked")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", read)
    with pytest.raises(UserError) as error:
        load_family(str(checkpoint), **options)
    assert allowed in error.value.allowed


def test_defaults_of_the_family(checkpoint):
    assert family_of(str(checkpoint)) == "llava"
    assert default_codebook("llava", "lab") == "lab-llava"
    assert default_codebook("llava", "llava-hf/llava-1.5-7b-hf") == "llava-1.5-7b"
