"""A checkpoint is loaded whole or not at all: transformers fills what is missing with random values, and goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import tiny_onevision
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rcb_lmms.cli import app
from rcb_lmms.errors import UserError
from rcb_lmms.families import default_split, default_template, load_family
from rcb_lmms.families.original import convert, open_original
from rcb_lmms.models.arguments import resolve
from rcb_lmms.runs.host import main as lmms_eval


@pytest.fixture
def damaged(tmp_path, checkpoint):
    """Write the tiny checkpoint with other weights: `damaged(change)`, where `change(weights)` edits a dictionary."""

    def write(change, source=checkpoint):
        folder = shutil.copytree(source, tmp_path / "damaged")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def without(part):
    """Drop all weights whose names contain `part`."""

    def change(weights):
        names = [name for name in weights if part in name]
        assert names
        for name in names:
            del weights[name]

    return change


def adding(**added):
    return lambda weights: weights.update({name.replace("__", "."): tensor for name, tensor in added.items()})


PROJECTOR, EMBEDDINGS = "multi_modal_projector.linear_1.weight", "vision_tower.embeddings.position_embedding.weight"


def spoiled(name, value):
    def change(weights):
        weights[name].view(-1)[7] = value

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (without("multi_modal_projector"), r"4 missing: model\.multi_modal_projector\.linear_1\.bias"),
        (without("vision_tower.encoder.layers.1."), r"16 missing: model\.vision_tower\.encoder\.layers\.1\."),
        (without("language_model.model.layers.2."), r"9 missing: model\.language_model\.layers\.2\."),
        (without("lm_head"), r"1 missing: lm_head\.weight"),
        (adding(language_model__model__layers__4__mlp__up_proj__weight=torch.ones(96, 48)), r"1 surplus: .*layers\.4"),
        (adding(anything=torch.ones(2)), "1 surplus: anything"),
        (adding(vision_tower__head__probe=torch.ones(2)), r"1 surplus: model\.vision_tower\.head\.probe"),
        (adding(**{PROJECTOR: torch.ones(3, 32)}), r"1 of another shape: .*stored \(3, 32\), configured \(48, 32\)"),
        (spoiled(PROJECTOR, float("nan")), r"linear_1\.weight"),
        (spoiled(EMBEDDINGS, float("inf")), r"position_embedding\.weight"),
    ],
)
def test_what_is_not_whole_is_not_loaded(damaged, change, found):
    with pytest.raises(UserError, match=found):
        load_family(str(damaged(change)))


def test_values_that_the_type_cannot_hold_are_named(damaged):
    folder = str(damaged(spoiled(PROJECTOR, 1e6)))
    assert load_family(folder).model is not None
    with pytest.raises(UserError, match=r"1 with values that are infinite or no number: .*linear_1") as error:
        load_family(folder, dtype="float16")
    assert "bfloat16" in error.value.next_step


def test_the_commands_stop(damaged, codebook_file, pope_tree, tmp_path, monkeypatch, capsys):
    folder = damaged(without("multi_modal_projector"))
    tiny.random_image(0).save(tmp_path / "image.png")
    calibrate = [
        "calibrate",
        "--model",
        str(folder),
        "--images",
        str(tmp_path),
        "--codebook",
        str(codebook_file),
        "--keep",
        "8",
    ]
    done = CliRunner().invoke(app, calibrate)
    assert isinstance(done.exception, UserError)
    assert done.exception.found.startswith("4 missing: model.multi_modal_projector")
    monkeypatch.chdir(pope_tree)
    arguments = f"pretrained={folder},codebook={codebook_file},threshold=0.2"
    monkeypatch.setattr(
        "sys.argv", ["lmms_eval", "--model", "llava_rcb", "--model_args", arguments, "--tasks", "pope", "--limit", "2"]
    )
    with pytest.raises(SystemExit) as ended:
        lmms_eval()
    assert ended.value.code == 2
    assert "4 missing: model.multi_modal_projector" in capsys.readouterr().err


WRONG = [{"vocab_size": [], "text_config": 3}, {"mm_vision_tower": [1], "architectures": [[1]]}]


@pytest.mark.parametrize("layout", ["converted", "original"])
@pytest.mark.parametrize("content", ["[]", "3", "", '{"a":' * 10**5, "\0", *WRONG], ids=range(7))
def test_configurations_of_any_content_are_no_traceback(tmp_path, checkpoint, layout, content):
    from original import make

    folder = tmp_path / "tiny"
    if layout == "original":
        make.save(folder, "llava")
    else:
        shutil.copytree(checkpoint, folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / "config.json").read_text()) | content)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError):
        load_family(str(folder))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "no/such/place", "nobody/no-such-model@main", ""])
def test_names_of_nothing_are_refused(name):
    with pytest.raises(UserError):
        load_family(name)


def test_what_every_model_computes_itself_may_be_stored(damaged, checkpoint):
    harmless = {
        "language_model__model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(6),
        "vision_tower__vision_model__embeddings__position_ids": torch.arange(17)[None],
    }
    loaded, whole = load_family(str(damaged(adding(**harmless)))).model, load_family(str(checkpoint)).model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))


def test_tied_embeddings_need_no_head(tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = tiny_onevision.save_onevision(tmp_path / "tied")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    assert not any(name.startswith("lm_head") for name in load_file(folder / "model.safetensors"))
    loaded = load_family(str(folder)).model
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_whole_siglip_lends_what_the_configuration_asks_for(tmp_path, damaged):
    """The tower is cut behind its last layer but one: head and last layer of a whole one are known surplus."""
    folder = tiny_onevision.save_onevision(tmp_path / "onevision")
    last = {"vision_tower__encoder__layers__3__layer_norm1__weight": torch.ones(32)}
    head = {"vision_tower__head__probe": torch.ones(1, 1, 32)}
    whole = damaged(adding(**last, **head), folder)
    assert load_family(str(whole)).name == "llava_onevision"
    shutil.rmtree(whole)
    # Without the head, the layer is one that a configuration has lost.
    with pytest.raises(UserError, match=r"1 surplus: .*layers\.3"):
        load_family(str(damaged(adding(**last), folder)))


def test_originals_with_broken_numbers_are_neither_loaded_nor_converted(tmp_path):
    from original import make

    name = "model.layers.1.mlp.up_proj.weight"
    broken = torch.full((make.INNER, make.WIDTH), float("nan"))
    folder = make.save(tmp_path / "tiny", "llava", **{name.replace(".", "__"): broken})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load_family(str(folder))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        convert(open_original(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_public_checkpoint_gets_the_papers_tiles_and_system_prompt(checkpoint):
    assert default_split("llava_next", "llava-hf/llama3-llava-next-8b-hf")
    assert not default_split("llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf@main")
    assert default_split("llava_onevision", "lab:llava_onevision")
    onevision = resolve("llava_onevision", "none", {})
    assert (onevision.loading["split"], onevision.loading["pack"]) == (False, "auto")
    assert resolve("llava_onevision", "none", {"split": "true"}).loading["pack"] == "spatial_unpad"
    assert resolve("llava_onevision", "none", {"pretrained": "lab"}).loading["split"]
    assert default_template("llava", "llava-hf/llava-1.5-7b-hf@main") == "vicuna"
    assert default_template("llava_next", "llava-hf/llama3-llava-next-8b-hf") == "llama_3"
    assert default_template("llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf") == "qwen"
    for other in ("lab", "lab:llava", str(checkpoint)):
        assert default_template("llava", other) == "checkpoint"
    assert load_family(str(checkpoint)).template == "checkpoint"
