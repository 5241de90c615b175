"""Models on several devices, left to the CPU and the disk, and quantized: the same tokens, the same answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from original import make
from torch._subclasses import FakeTensorMode
from transformers import LlamaForCausalLM

from rcb_lmms import Budget, Question, Session, make_pruner
from rcb_lmms.engine.layer_attention import last_token_attention
from rcb_lmms.engine.prefix import PrefixCache
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.packed import Prompt
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.models import entries
from rcb_lmms.models.arguments import resolve

ASKED = ("Is there a red circle in the image?", "How many objects are there?")
METHODS = {
    "none": {},
    "rcb": {"budget": Budget.tokens(20)},
    "visionzip": {"budget": Budget.tokens(20)},
    "fastv": {"budget": Budget.tokens(20)},
    "sparsevlm": {"budget": Budget.tokens(60)},
}


def answers(family, method, **options):
    own = {"codebook": f"lab-{family.name.replace('_', '-')}"} if method == "rcb" else {}
    session = Session(family, make_pruner(method, **METHODS[method], **own), **options)
    questions = [Question(text, [make_scene("test", number).image()]) for number in range(2) for text in ASKED]
    told = session.answer(questions, max_new_tokens=3)
    assert all(answer.error is None for answer in told), told
    return told


def scattered(layers: int) -> dict[str, str]:
    """Every second part is left on the disk, and comes to the CPU when it is needed."""
    blocks = {f"model.language_model.layers.{number}": ("cpu", "disk")[number % 2] for number in range(layers)}
    inner = {f"model.language_model.{name}": "disk" for name in ("embed_tokens", "norm", "rotary_emb")}
    return {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "lm_head": "disk", **inner, **blocks}


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_model_of_which_parts_lie_elsewhere_answers_as_the_whole_one(name):
    plain = load_family("lab", family=name)
    places = scattered(plain.layers) if name == "llava" else {"": "disk"}
    family = load_family("lab", family=name, device_map=places)
    assert any(weight.is_meta for weight in family.model.parameters())
    assert family.device == torch.device("cpu")
    assert torch.equal(family.pad_embedding, plain.pad_embedding)
    for method in METHODS if name == "llava" else ("none", "rcb"):
        assert answers(family, method) == answers(plain, method), method


def on_two_gpus(model: torch.nn.Module) -> torch.nn.Module:
    """The decoder's second half, norm and head on `cuda:1`, as accelerate spreads them; of tensors without content."""
    halves = ("layers.2", "layers.3", "model.norm", "lm_head")
    for name, module in model.named_modules():
        device = f"cuda:{int(any(own in name for own in halves))}"
        for key, weight in list(module.named_parameters(recurse=False)):
            module._parameters[key] = torch.nn.Parameter(torch.empty(weight.shape, device=device))
        for key, own in list(module.named_buffers(recurse=False)):
            module._buffers[key] = torch.empty(own.shape, device=device)
    for number, layer in enumerate(model.model.layers):
        add_hook_to_module(layer, AlignDevicesHook(f"cuda:{number // 2}", skip_keys=["past_key_values"]))
    return model


def test_keys_and_values_stay_with_their_layers(tiny_llama):
    """Fake tensors know their device where there is no GPU, and refuse to be mixed with those of another."""
    config = tiny_llama.config
    with FakeTensorMode(), torch.no_grad():
        model = on_two_gpus(LlamaForCausalLM(config).eval())
        prompts = [
            Prompt(torch.randn(12 + row, 32, device="cuda:0"), prefix=10 + row // 2, prefix_name=row // 2)
            for row in range(4)
        ]
        batch = PrefixCache(SimpleNamespace(model=model), always=True).continued(prompts)
        assert [layer.keys.device.index for layer in batch.cache.layers] == [0, 0, 1, 1]
        rest = slice(batch.cache.get_seq_length(), None)
        logits = model(
            inputs_embeds=batch.embeds[:, rest],
            attention_mask=batch.mask,
            position_ids=batch.positions[:, rest],
            past_key_values=batch.cache,
        ).logits
        assert logits.device.index == 1
        attention = last_token_attention(model, prompts[0].embeds, [1, 3])
        assert [own.shape for own in attention.values()] == [(12,), (12,)]
        with pytest.raises(RuntimeError, match="two devices"):
            prompts[0].embeds[:, 0] + attention[3].to("cuda:1")


def test_weights_on_the_disk_are_checked_too(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.save_llava(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
    weights[name][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 with values that are infinite or no number.*layers\.1\.mlp\.up_proj"):
        load_family(str(folder), device_map={"": "disk"})


def test_records_name_places_attention_and_quantization(tmp_path):
    model = entries.LlavaFull(pretrained="lab", device_map="auto")
    assert model.run.arguments["device_map"] == "auto"
    assert model.run.resolved["device_map"] == {"": "cpu"}
    assert model.run.resolved["attn_implementation"] == "sdpa"
    assert model.run.resolved["quantization"] is None
    assert json.loads(json.dumps(model.run.resolved)) == model.run.resolved


def test_quantization_needs_a_package(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    for refused in (lambda **own: resolve("llava", "none", own), lambda **own: load_family("lab", **own)):
        with pytest.raises(UserError, match=r"pip install 'rcb_lmms\[quantization\]'"):
            refused(quantization="8bit")


def test_a_checkpoint_in_the_original_layout_is_converted_first(tmp_path):
    folder = make.save(tmp_path / "tiny", "llava")
    with pytest.raises(UserError, match="rcb checkpoint convert"):
        load_family(str(folder), device_map="auto")


@pytest.mark.quantization
def test_eight_bits_choose_the_same_tokens_and_answer_alike():
    plain, family = load_family("lab"), load_family("lab", quantization="8bit")
    kinds = {name: type(own).__name__ for name, own in family.model.named_modules()}
    assert kinds["model.language_model.layers.3.mlp.down_proj"] == "Linear8bitLt"
    assert kinds["model.vision_tower.encoder.layers.0.mlp.fc1"] == "Linear"
    for method in ("none", "rcb"):
        ours, whole = answers(family, method), answers(plain, method)
        assert [own.text for own in ours] == [own.text for own in whole]
        assert [own.row.kept for own in ours] == [own.row.kept for own in whole]
        assert ours == answers(family, method, prefix_cache="off")
    model = entries.LlavaFull(pretrained="lab", quantization="8bit")
    assert model.run.resolved["quantization"] == "8bit"


@pytest.mark.quantization
def test_four_bits_are_those_of_the_weights_written_out(tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    folder = str(tiny.save_llava(tmp_path / "wide", hidden_size=64, intermediate_size=128))
    family, plain = load_family(folder, quantization="4bit"), load_family(folder)
    written = {}
    for name, own in family.model.named_modules():
        if type(own).__name__ == "Linear4bit":
            written[f"{name}.weight"] = dequantize_4bit(own.weight.data, own.weight.quant_state).float()
    assert len(written) == 4 * 7
    prompt = family.model.get_input_embeddings()(torch.tensor([[1, 40, 50, 60, 70]])).detach()
    whole = plain.model(inputs_embeds=prompt).logits
    plain.model.load_state_dict(written, strict=False)
    with torch.inference_mode():
        expected, found = plain.model(inputs_embeds=prompt).logits, family.model(inputs_embeds=prompt).logits
    rounding, effect = (found - expected).abs(), (expected - whole).abs()  # kernels compute in half precision
    assert effect.mean() > 0.5
    assert rounding.mean() < 0.05 * effect.mean()


@pytest.mark.quantization
def test_four_bits_on_a_cpu_need_whole_blocks():
    with pytest.raises(UserError, match="a language model of width 160"):
        load_family("lab", quantization="4bit")
