"""Checkpoints in the original layout: against the original code (LLaVA-1.5) and against models put together by hand."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from original import make
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rcb_lmms.errors import UserError
from rcb_lmms.families import family_of, load_family
from rcb_lmms.families.original import convert, find_original, open_original

FAMILIES = ("llava", "llava_next", "llava_onevision")
TOWER_NAMES = {"llava": "tiny-clip", "llava_next": "tiny-clip", "llava_onevision": "tiny-siglip"}
QUESTION = "What is left of the red circle?"
PROMPTS = {
    "llava_next": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and "
    "vision assistant. You are able to understand the visual content that the user provides, and assist the user with "
    "a variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
    f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llava_onevision": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
    f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.fixture
def save(tmp_path):
    """Write a tiny checkpoint: `save(family, ...)`, see `make.save`."""
    return lambda family, **options: make.save(tmp_path / "tiny", family, **options)


def stored(folder):
    """All tensors of a checkpoint by the original's names."""
    weights = {}
    for file in folder.glob("*model*"):
        if file.suffix == ".safetensors":
            weights |= load_file(file)
        elif file.suffix == ".bin":
            weights |= torch.load(file, weights_only=True)
    return weights


def under(weights, prefix):
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


# LLaVA-1.5, against the original code


@pytest.mark.parametrize("tower", ["beside", "inside"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_llava15_gives_the_logits_of_the_original_code(save, tower, form):
    with safe_open(make.HERE / "llava15.safetensors", "pt") as file:
        ids, pixels, expected = (file.get_tensor(f"{tower}.{name}") for name in ("ids", "pixels", "logits"))
        metadata = file.metadata()
    family = load_family(str(save("llava", tower=tower, form=form)), template="checkpoint")
    prompt = family.prompt(metadata["question"])
    assert prompt == [family.model.config.image_token_id if token == -200 else token for token in ids.tolist()]
    image = Image.fromarray(make.pixels("llava"))
    own = family.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(own, pixels, rtol=0, atol=1e-6)
    ((view,),) = family.encode([image])
    embeds = family.embed(prompt, [family.pack_base(view.features)]).embeds
    with torch.inference_mode():
        logits = family.model(inputs_embeds=embeds[None]).logits[0].flip(0)[:: int(metadata["step"])]
    torch.testing.assert_close(logits[:, : make.VOCABULARY["llava"]], expected, rtol=0, atol=1e-5)


def test_the_recorded_towers_differ_behind_the_image():
    recorded = load_file(make.HERE / "llava15.safetensors")
    assert (recorded["inside.logits"] - recorded["beside.logits"])[0].abs().max() > 0.05


# LLaVA-NeXT and OneVision, against the parts of the original put together by hand

SIZE = (60, 25)


def tower_by_hand(family, weights, pixels):
    """Features of `(b, 3, h, w)`: CLIP up to its last layer but one without CLS, SigLIP up to its last but one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    siglip = family == "llava_onevision"
    sizes = make.tower_config(family)["vision_config"] | {"attn_implementation": "eager"}
    layers = make.TOWER_LAYERS - 1
    tower = (SiglipVisionModel if siglip else CLIPVisionModel)(
        SiglipVisionConfig(**sizes, vision_use_head=False) if siglip else CLIPVisionConfig(**sizes)
    ).eval()
    del tower.encoder.layers[layers:]
    own = {
        name: weight for name, weight in weights.items() if not name.startswith(("head.", f"encoder.layers.{layers}."))
    }
    own = {name: weight for name, weight in own.items() if not name.endswith("position_ids")}
    tower.load_state_dict(own)
    hidden = tower.embeddings(pixels)
    hidden = hidden if siglip else tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return hidden if siglip else hidden[:, 1:]


def language_by_hand(family, weights):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    qwen = family == "llava_onevision"
    model = (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(
        (Qwen2Config if qwen else LlamaConfig)(
            vocab_size=make.VOCABULARY[family],
            hidden_size=make.WIDTH,
            intermediate_size=make.INNER,
            num_hidden_layers=make.LAYERS,
            num_attention_heads=make.HEADS,
            num_key_value_heads=make.KEY_HEADS,
            rms_norm_eps=1e-6 if qwen else 1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6 if qwen else 5e5},
            attn_implementation="eager",
        )
    ).eval()
    other = ("model.mm_projector.", "model.vision_tower.", "model.image_newline")
    own = {n: w for n, w in weights.items() if not n.startswith(other) and not n.endswith("inv_freq")}
    model.load_state_dict(own)
    return model


def tiles_by_hand(family, image):
    """Base view and the tiles of the widest grid, three in a row, which fits `SIZE` best: `(4, 3, side, side)`."""
    side = make.SIDE_PX[family]
    width, height = image.size
    scale = min(3 * side / width, side / height)
    inner = image.resize((min(math.ceil(width * scale), 3 * side), min(math.ceil(height * scale), side)))
    canvas = Image.new("RGB", (3 * side, side))
    canvas.paste(inner, ((3 * side - inner.width) // 2, (side - inner.height) // 2))
    views = [image.resize((side, side))]
    views += [canvas.crop((x, 0, x + side, side)) for x in range(0, 3 * side, side)]
    if family == "llava_onevision":
        mean = std = torch.tensor([0.5, 0.5, 0.5])
    else:
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    stacked = torch.stack([torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8) for view in views])
    scaled = stacked.view(4, side, side, 3).permute(0, 3, 1, 2) / 255
    return (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def rows_by_hand(features, newline):
    """Base view, then the row of tiles without its padding, with a newline behind every row of patches."""
    base, tiles = features[0], features[1:]
    side = math.isqrt(len(base))
    wide = tiles.view(3, side, side, -1).permute(1, 0, 2, 3).reshape(side, 3 * side, -1)
    width = int(SIZE[0] * (side / SIZE[1]))
    padding = (3 * side - width) // 2
    rows = [torch.cat([row[padding : 3 * side - padding], newline[None]]) for row in wide]
    return torch.cat([base, *rows])


@pytest.mark.parametrize("tower", ["inside", "beside"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_give_the_logits_of_the_original_parts(save, name, tower):
    folder = save(name, tower=tower)
    family = load_family(str(folder), pack="spatial_unpad", attn_implementation="eager")
    pixels = torch.from_numpy(make.random_pixels(*SIZE))
    image = Image.fromarray(pixels.numpy())
    weights = stored(folder)
    tower_weights = under(weights, "model.vision_tower.vision_tower.vision_model.") or under(
        stored(folder.parent / TOWER_NAMES[name]), "vision_model."
    )
    views = tiles_by_hand(name, image)
    projector = torch.nn.Sequential(
        torch.nn.Linear(make.TOWER_WIDTH, make.WIDTH), torch.nn.GELU(), torch.nn.Linear(make.WIDTH, make.WIDTH)
    )
    projector.load_state_dict(under(weights, "model.mm_projector."))
    language = language_by_hand(name, weights)
    tokenizer = family.tokenizer
    before, after = (tokenizer(part, return_tensors="pt").input_ids[0] for part in PROMPTS[name].split("<image>"))
    with torch.inference_mode():
        rows = rows_by_hand(projector(tower_by_hand(name, tower_weights, views)), weights["model.image_newline"])
        table = weights["model.embed_tokens.weight"]
        expected = language(inputs_embeds=torch.cat([table[before], rows, table[after]])[None]).logits[0]

    prompt = family.prompt(QUESTION)
    assert prompt == [*before.tolist(), family.model.config.image_token_id, *after.tolist()]
    inputs = family.processor(images=image, text=PROMPTS[name], add_special_tokens=False, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], views, rtol=0, atol=1e-6)
    with torch.inference_mode():
        logits = family.model(**inputs).logits[0]
    vocabulary = make.VOCABULARY[name]
    torch.testing.assert_close(logits[:, :vocabulary], expected, rtol=0, atol=1e-5)

    (own,) = family.encode([image])
    packed = family.pack([view.features for view in own], family.open(image), whole=True)
    torch.testing.assert_close(packed.embeds, rows, rtol=0, atol=1e-5)


# Reading


@pytest.mark.parametrize("form", ["bin", "single", "single_bin"])
def test_all_forms_hold_the_same_weights(save, tmp_path, form):
    expected = load_family(str(make.save(tmp_path / "reference", "llava_onevision", tower="inside"))).model
    model = load_family(str(save("llava_onevision", tower="inside", form=form))).model
    for (name, weight), other in zip(expected.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_half_precision(save):
    folder = save("llava_next", tower="inside")
    model = load_family(str(folder), dtype="bfloat16").model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    newline = stored(folder)["model.image_newline"].bfloat16()
    assert torch.equal(model.model.image_newline, newline)


def test_old_torch_files_are_read(save):
    folder = save("llava", form="single_bin")
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    model = load_family(str(folder)).model
    assert torch.equal(model.lm_head.weight[:340], make.random("lm_head.weight", 340, make.WIDTH))


def test_the_stray_projector_is_not_read(save):
    folder = save("llava")
    assert not torch.load(folder / "mm_projector.bin", weights_only=True)["model.mm_projector.0.weight"].any()
    projector = load_family(str(folder)).model.model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, make.random("model.mm_projector.0.weight", make.WIDTH, 16))


@pytest.mark.parametrize(("name", "added"), [("llava", 1), ("llava_next", 0), ("llava_onevision", 0)])
def test_placeholders_get_unused_rows_or_new_ones_that_never_win(save, name, added):
    family = load_family(str(save(name, tower="inside")))
    config, rows = family.model.config, make.VOCABULARY[name]
    assert family.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    assert len(family.model.get_input_embeddings().weight) == config.text_config.vocab_size == rows + added
    if added:
        hidden = torch.randn(200, make.WIDTH)
        # The highest logit is made as low as can be: a row of zeros would win.
        head = family.model.lm_head.weight
        hidden = hidden - 10 * torch.linalg.lstsq(head[:rows], torch.ones(rows, 1)).solution.T
        logits = hidden @ head.T
        assert (logits.argmax(1) < rows).all()
        torch.testing.assert_close(logits[:, rows], logits[:, :rows].mean(1), rtol=0, atol=1e-3)


def test_tied_embeddings_need_no_head(save):
    folder = save("llava_onevision", tower="inside", lm_head__weight=None)
    edit(folder, tie_word_embeddings=True)
    model = load_family(str(folder)).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, make.random("model.embed_tokens.weight", 280, make.WIDTH))


def edit(folder, **changes):
    """Change config.json; `None` removes."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# Configuration


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("model_type", ["llava", "original"])
def test_the_family_shows_in_the_configuration_whatever_the_type_says(save, name, model_type):
    folder = save(name)
    own = "llava_qwen" if name == "llava_onevision" else "llava_llama"
    edit(folder, model_type="llava" if model_type == "llava" else own)
    assert family_of(str(folder)) == name
    assert load_family(str(folder), family=name).name == name


def test_configuration(save):
    folder = save("llava_onevision", tower="inside")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [258, 256], "repetition_penalty": 1.05, "temperature": 0.7})
    )
    family = load_family(str(folder))
    config, processor = family.model.config, family.processor
    swapped = [[35, 35], [70, 35], [70, 70], [35, 105]]
    assert config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints == swapped
    assert config.vision_aspect_ratio == processor.vision_aspect_ratio == "anyres_max_9"
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    assert (config.image_token_id, config.video_token_id) == (259, 260)
    assert config.vision_config.num_hidden_layers == make.TOWER_LAYERS - 1
    generation = family.model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == ([256, 258], 256)
    # Penalties of the published files would change greedy answers.
    assert generation.repetition_penalty in (None, 1.0)
    assert "Pil" in type(processor.image_processor).__name__
    assert list(processor.video_processor.image_mean) == [0.5] * 3
    video = family.chat([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q"}]}])
    assert video.count(260) == 1


@pytest.mark.parametrize(
    ("name", "tower", "layers", "tokens"),
    [
        ("llava_next", "openai/clip-vit-large-patch14-336", 24, 576),
        ("llava_onevision", "google/siglip-so400m-patch14-384", 27, 729),
    ],
)
def test_public_towers_inside_a_checkpoint_are_not_looked_for(save, name, tower, layers, tokens):
    folder = save(name, tower="inside", name=tower)
    found = find_original(str(folder))
    assert found.family == family_of(str(folder)) == name
    assert found.tower.num_hidden_layers == layers
    assert (found.tower.image_size // found.tower.patch_size) ** 2 == tokens


def test_a_hub_id_is_read_from_the_cache(save, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    folder = save("llava", name="someone/tiny-tower")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for source, repository in ((folder, "someone/tiny-llava"), (tmp_path / "tiny-clip", "someone/tiny-tower")):
        home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0123abcd")
        (home / "snapshots").mkdir()
        source.rename(home / "snapshots" / "0123abcd")
    assert family_of("someone/tiny-llava") == "llava"
    family = load_family("someone/tiny-llava@main")
    assert family.revision == family.fingerprint == "0123abcd"
    embedding = family.model.model.vision_tower.embeddings.class_embedding
    assert torch.equal(embedding, make.random("embeddings.class_embedding", 16))


# Errors


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"model__layers__1__mlp__up_proj__weight": None},
            r"1 missing: model\.language_model\.layers\.1\.mlp\.up_proj",
        ),
        ({"model__extra__weight": torch.ones(2)}, r"1 surplus: model\.extra\.weight"),
        ({"model__layers__7__mlp__up_proj__weight": torch.ones(2)}, r"1 surplus: model\.layers\.7"),
        ({"model__mm_projector__0__weight": torch.ones(3, 16)}, r"shape \(3, 16\)"),
        ({"model__vision_tower__vision_tower__vision_model__post_layernorm__bias": torch.ones(16)}, r"\d+ missing"),
    ],
)
def test_every_weight_is_used_and_none_is_missing(save, changes, found):
    folder = save("llava", **changes)
    with pytest.raises(UserError, match=found):
        load_family(str(folder))


def test_a_missing_weight_of_the_tower(save, tmp_path):
    folder = save("llava")
    file = tmp_path / "tiny-clip" / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    del weights["vision_model.encoder.layers.2.mlp.fc1.bias"]
    torch.save(weights, file)
    with pytest.raises(UserError, match=r"1 missing: model\.vision_tower\.encoder\.layers\.2\.mlp\.fc1\.bias"):
        load_family(str(folder))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_missing_and_cut_off_shards(save, form):
    folder = save("llava", form=form)
    (shard,) = folder.glob(f"*-00002-of-00002.{form}")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="00002-of-00002") as error:
        load_family(str(folder))
    assert "download" in error.value.next_step
    shard.unlink()
    with pytest.raises(UserError, match=f"missing: .*00002-of-00002.{form}"):
        load_family(str(folder))


def test_no_weights_at_all(save):
    folder = save("llava", form="single")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"safetensors or pytorch_model\.bin"):
        load_family(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "found:   LlavaMptForCausalLM"),
        ({"architectures": None, "model_type": "llava_mixtral"}, "found:   None"),
        ({"mm_vision_tower": "nowhere/tower"}, "vision tower nowhere/tower"),
        ({"mm_projector_type": "linear"}, "mm_projector_type linear"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "list of"),
    ],
)
def test_what_cannot_be_loaded_is_named(save, changes, message):
    folder = save("llava_next")
    edit(folder, **changes)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_family(str(folder))


def test_another_family_is_refused(save):
    with pytest.raises(UserError, match="llava_next_") as error:
        load_family(str(save("llava_next")), family="llava")
    assert error.value.next_step == "use the llava_next_* entries for it"


def test_a_checkpoint_without_tokenizer(save):
    folder = save("llava_next")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_family(str(folder))


def test_a_tokenizer_that_is_cut_off(save):
    folder = save("llava")
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:1000])
    with pytest.raises(UserError, match="its tokenizer"):
        load_family(str(folder))


# Writing


@pytest.mark.parametrize("name", FAMILIES)
def test_the_converted_folder_is_the_loaded_checkpoint(save, tmp_path, name, monkeypatch):
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr("rcb_lmms.families.original.conversion.SHARD_BYTES", 20_000)
    folder = save(name, tower="inside", form="bin")
    files = convert(open_original(str(folder)), tmp_path / "out")
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 3
    assert all(file.stat().st_size < 70_000 for file in shards)
    assert find_original(str(tmp_path / "out")) is None
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected, family = load_family(str(folder)), load_family(str(tmp_path / "out"))
    assert family.name == name
    assert (expected.original, family.original) == (True, False)  # whose rounding is used where tiles are unpadded
    for (key, weight), other in zip(expected.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), key
    same_config = {"dtype", "_name_or_path", "transformers_version"}
    ours, theirs = (own.model.config.to_dict() for own in (expected, family))
    assert {k: v for k, v in ours.items() if k not in same_config} == {
        k: v for k, v in theirs.items() if k not in same_config
    }
    assert expected.model.generation_config.to_diff_dict() == family.model.generation_config.to_diff_dict()
    assert family.prompt("<image> is it?\nä") == expected.prompt("<image> is it?\nä")
    assert family.tokenizer.decode([75, 76, 77, 270]) == expected.tokenizer.decode([75, 76, 77, 270])
    image = Image.fromarray(make.random_pixels(*SIZE))
    for own, other in zip(expected.encode([image])[0], family.encode([image])[0], strict=True):
        assert torch.equal(own.features, other.features)


def test_an_interrupted_conversion_leaves_nothing_and_starts_over(save, tmp_path, monkeypatch):
    import safetensors.torch

    monkeypatch.setattr("rcb_lmms.families.original.conversion.SHARD_BYTES", 20_000)
    written, save_file = [], safetensors.torch.save_file

    def dying(tensors, file, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        save_file(tensors, file, **options)

    monkeypatch.setattr("safetensors.torch.save_file", dying)
    original, out = open_original(str(save("llava"))), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(original, out)
    assert not out.exists()
    (left,) = tmp_path.glob(".out*")
    with pytest.raises(UserError):
        family_of(str(left))
    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    convert(original, out)
    assert not left.exists()
    assert load_family(str(out)).name == "llava"
    with pytest.raises(UserError, match="something there already"):
        convert(original, out)


def test_a_full_disk_is_told(save, tmp_path, monkeypatch):
    def full(*_, **__):
        from safetensors import SafetensorError

        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        convert(open_original(str(save("llava"))), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_the_command(save, tmp_path):
    from typer.testing import CliRunner

    from rcb_lmms.cli import app

    folder, out = save("llava"), tmp_path / "out"
    done = CliRunner().invoke(app, ["checkpoint", "convert", str(folder), str(out), "--dtype", "float16"])
    assert done.exit_code == 0, done.output
    assert f"wrote {out / 'model-00001-of-00001.safetensors'}" in done.output
    assert f"next: lmms_eval --model llava_rcb --model_args pretrained={out}" in done.output
    assert {w.dtype for w in load_file(out / "model-00001-of-00001.safetensors").values()} == {torch.float16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    again = CliRunner().invoke(app, ["checkpoint", "convert", str(out), str(tmp_path / "other")])
    assert isinstance(again.exception, UserError)
    assert "use it as it is" in again.exception.next_step


# Memory

MEASURE = """
import os, re, sys, torch
from rcb_lmms.families.original import load_original, open_original

def status_bytes(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

small, *large = sys.argv[1:]
load_original(open_original(small), dtype=torch.float32)
for folder in large:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    # A fork starts without the pages of the program's own files.
    load_original(open_original(small), dtype=torch.float32)
    before = status_bytes("VmRSS")
    model, _ = load_original(open_original(folder), dtype=torch.float32)
    # Not ru_maxrss, into which the parent's peak enters when a process is started.
    print(status_bytes("VmHWM") - before, sum(weight.nbytes for weight in model.parameters()), flush=True)
    os._exit(0)
"""


def test_memory_peaks_little_above_the_model(save, tmp_path, monkeypatch):
    folders = [save("llava")]
    for name, value in {"WIDTH": 512, "INNER": 2048, "LAYERS": 10, "HEADS": 8, "KEY_HEADS": 8}.items():
        monkeypatch.setattr(make, name, value)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
    monkeypatch.setattr(make, "TEXT", make.TEXT | sizes | {"num_attention_heads": 8, "num_key_value_heads": 8})
    folders += [make.save(tmp_path / form, "llava", form=form) for form in ("single", "single_bin")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(make.HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, env=environment, check=True
    )
    measured = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == 2
    for added, model in measured:
        assert model > 150e6
        # Pages mapped from a file count too: reading it in one go would come to twice the model.
        assert 0.9 * model < added < 1.2 * model + 8e6, measured
