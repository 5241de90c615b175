"""What every test shares: no network, one seed, no deprecated calls, and tiny random models."""

from __future__ import annotations

import copy
import logging
import os
from importlib.util import find_spec

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

from rcb_lmms.resources import data_dir

# 96 words, attention sharp enough that pruning changes answers (the default of 0.02 makes it almost uniform).
TEXT_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
    "initializer_range": 0.25,
}


_INDEXED: dict[str, dict] = {}


class _DeprecationsFail(logging.Handler):
    """transformers announces most deprecations through its logger, not as warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().lower()
        if "deprecat" in text or "will be removed in" in text:
            raise AssertionError(f"transformers: {record.getMessage()}")


def pytest_configure(config: pytest.Config) -> None:
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:transformers")
    logging.getLogger("transformers").addHandler(_DeprecationsFail(level=logging.WARNING))
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need what is not here are deselected: a run says how many, and none is passed over as skipped."""
    here = {"gpu": torch.cuda.is_available(), "vllm": find_spec("vllm") is not None}
    here["flash_attn"] = find_spec("flash_attn") is not None
    wanted = {item: all(here.get(mark.name, True) for mark in item.iter_markers()) for item in items}
    items[:] = [item for item, runs in wanted.items() if runs]
    config.hook.pytest_deselected(items=[item for item, runs in wanted.items() if not runs])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flash_on_cpu():
    """Flash attention by the name `flash.NAME`."""
    import flash

    flash.register()


@pytest.fixture
def tiny_llama():
    """A random `LlamaForCausalLM`: 4 layers, 4 query and 2 key heads of width 8, 96 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**TEXT_SIZES)).eval()


@pytest.fixture
def tiny_qwen2():
    """A random `Qwen2ForCausalLM` of the same sizes; its projections have biases, which are not zero here."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT_SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def tiny_llava():
    """A random `LlavaForConditionalGeneration`: CLIP tower with 4 x 4 patches of 28 x 28 images, image token 95."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION_SIZES),
        text_config=LlamaConfig(**TEXT_SIZES),
        image_token_id=95,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def indexed_tasks(monkeypatch):
    """lmms-eval's three thousand task files and ours are read once, not again for every run."""
    from lmms_eval.tasks import TaskManager

    index = TaskManager._get_task_and_group
    fixed = ("lmms_eval/tasks/", str(data_dir("tasks")))

    def once(manager, folder):
        if not str(folder).endswith(fixed):
            return index(manager, folder)
        if folder not in _INDEXED:
            _INDEXED[folder] = index(manager, folder)
        return copy.deepcopy(_INDEXED[folder])

    monkeypatch.setattr(TaskManager, "_get_task_and_group", once)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny random LLaVA checkpoint: 4 x 4 patches, width 48, 4 layers."""
    import tiny

    return tiny.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def family(checkpoint):
    """The tiny checkpoint, loaded; tests do not change it."""
    from rcb_lmms.families import load_family

    return load_family(str(checkpoint))


@pytest.fixture(scope="module")
def make(checkpoint):
    """A family around the weights of the module's checkpoint, which are loaded once, with other options."""
    from rcb_lmms.families import load_family

    loaded = load_family(str(checkpoint))
    return lambda **options: type(loaded)(loaded.model, loaded.processor, pretrained="tiny", **options)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A whole CLIP model whose vision tower is as wide as the tiny checkpoint's."""
    import tiny

    return tiny.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def codebook_file(tmp_path_factory):
    """A codebook of 12 random prototypes that fits the tiny checkpoint."""
    import tiny

    return tiny.save_codebook(tmp_path_factory.mktemp("codebook") / "tiny.safetensors")


@pytest.fixture(scope="session")
def pope_tree(tmp_path_factory):
    """A folder in which upstream's `pope` finds 6 random images with 4 questions each."""
    import tiny

    return tiny.save_pope(tmp_path_factory.mktemp("data"))
