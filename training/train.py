"""Train a laboratory model for real: vision tower first, then, with the tower frozen, projector and language model.

Every batch is a pure function of seed and step, and weights with optimiser state are written as the run goes, so a
killed run continues with the same command and ends in the same weights.
"""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rcb_lmms.errors import UserError, exit_on_user_error
from rcb_lmms.files import append_jsonl, write_atomic


@dataclass(frozen=True)
class Stage:
    """Length and pace of one stage; `pool` is how many scenes it draws its batches from."""

    name: str
    steps: int
    batch: int
    pool: int
    learning_rate: float
    warmup_steps: int = 100
    save_every: int = 100
    log_every: int = 20


STATE_FOLDER, LOG_NAME = "state", "training.jsonl"
EVALUATION_SCENES = 48
TOWER = Stage("tower", steps=1900, batch=32, pool=20_000, learning_rate=1.2e-3)


LANGUAGE = Stage("language", steps=1500, batch=32, pool=8_000, learning_rate=1.5e-3, save_every=250)
BENCHMARKS = Stage("benchmarks", steps=1500, batch=12, pool=1280, learning_rate=2e-3, warmup_steps=60)
# LLaVA-NeXT only has to learn smaller objects and tiles; OneVision's tower is new, its language model is not.
STAGES = {
    "llava": (TOWER, LANGUAGE, BENCHMARKS),
    "llava_next": (
        dataclasses.replace(TOWER, steps=500, learning_rate=8e-4),
        Stage("language", steps=500, batch=16, pool=1500, learning_rate=6e-4, warmup_steps=60),
        BENCHMARKS,
    ),
    "llava_onevision": (
        TOWER,
        Stage("language", steps=3600, batch=12, pool=1280, learning_rate=4e-3, warmup_steps=60),
        BENCHMARKS,
    ),
}


def train(
    out: str | Path,
    *,
    family: str = "llava",
    device: str = "cpu",
    seed: int = 0,
    stages: Sequence[Stage] | None = None,
    resume: bool = True,
) -> Path:
    """Train a laboratory model and write its checkpoint to `out`, beside the log and the state a resumed run needs.

    The first stage is the tower's, the others the language model's; without any it takes the family's own, `STAGES`.

    Raises:
        UserError: the family is unknown, or the folder cannot be written.
    """
    from rcb_lmms.lab.checkpoint import FAMILIES
    from training.model import save_checkpoint

    out = Path(out)
    if family not in FAMILIES:
        raise UserError(
            wanted="train a laboratory model",
            found=f"family {family!r}",
            allowed=", ".join(FAMILIES),
            next_step="name one of the allowed families",
        )
    tower_stage, *language_stages = stages or STAGES[family]
    if not resume:
        for path in (out / LOG_NAME, *(out / STATE_FOLDER / f"{s.name}.pt" for s in stages or STAGES[family])):
            path.unlink(missing_ok=True)
    tower = train_tower(out, tower_stage, family=family, device=device, seed=seed)
    model, processor = _untaught(tower, family, device, seed)
    for stage in language_stages:
        train_language(out, stage, model, processor, family=family, seed=seed, first_scene=TOWER.pool)
    return save_checkpoint(model.eval(), processor, out)


def run_stage(stage: Stage, out: Path, modules, step_loss: Callable, *, seed: int, evaluate: Callable | None = None):
    """Train `modules` (an `nn.ModuleDict`) for the stage, from its last saved state if there is one.

    `step_loss(indices, step, random)` returns a loss and a dict of figures for the log.
    """
    import torch

    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    state_path = out / STATE_FOLDER / f"{stage.name}.pt"
    first = _load_state(state_path, modules, optimiser)
    begun, log = time.monotonic(), out / LOG_NAME
    for step in range(first, stage.steps):
        random = np.random.default_rng((seed, step))
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = stage.learning_rate * _pace(step, stage)
        # Half precision in the products alone: twice as fast where the processor has it, and as good.
        with torch.autocast(parameters[0].device.type, torch.bfloat16):
            loss, figures = step_loss(random.integers(stage.pool, size=stage.batch), step, random)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        done = step + 1
        if done % stage.log_every == 0:
            figures = {name: round(value, 4) for name, value in figures.items()}
            row = {"stage": stage.name, "step": done, "loss": round(loss.item(), 4), **figures}
            append_jsonl(log, {**row, "elapsed_s": round(time.monotonic() - begun, 1)})
        if done % stage.save_every == 0 or done == stage.steps:
            if evaluate is not None:
                append_jsonl(log, {"stage": stage.name, "step": done, "evaluation": evaluate()})
            _save_state(state_path, done, modules, optimiser)


def _pace(step: int, stage: Stage) -> float:
    warm = min(1.0, (step + 1) / stage.warmup_steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))


def _save_state(path: Path, step: int, modules, optimiser) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save({"step": step, "modules": modules.state_dict(), "optimiser": optimiser.state_dict()}, buffer)
    write_atomic(path, buffer.getvalue())


def _load_state(path: Path, modules, optimiser) -> int:
    import torch

    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    modules.load_state_dict(state["modules"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


def train_tower(out: Path, stage: Stage, *, family: str, device: str, seed: int):
    """The first stage; returns the trained tower."""
    import torch

    from training.model import starting_model
    from training.tower import batch_of, make_heads, tower_loss
    from training.vision import VISION_WIDTH, make_tower, preprocess

    torch.manual_seed(seed)
    modules = torch.nn.ModuleDict({"tower": make_tower(family), "heads": make_heads(VISION_WIDTH)}).to(device)
    tiled = 0
    if family == "llava_next":
        # As the public families grew from each other: LLaVA-1.5's tower learns to see objects of half their size.
        modules["tower"].load_state_dict(starting_model().model.vision_tower.state_dict())
        tiled = stage.batch * 3 // 4

    def step_loss(indices, step, random):
        pixels, labels = batch_of("train", indices, preprocess, device, tiled)
        return tower_loss(modules["tower"], modules["heads"], pixels, labels)

    run_stage(stage, out, modules, step_loss, seed=seed)
    return modules["tower"].eval().requires_grad_(False)


def _untaught(tower, family: str, device: str, seed: int):
    """A model whose language model starts afresh behind a trained tower, and its processor."""
    import torch

    from training.model import make_model, make_processor

    torch.manual_seed(seed + 1)
    processor = make_processor(family)
    model = make_model(processor.tokenizer, family).to(device)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model, processor


def train_language(out: Path, stage: Stage, model, processor, *, family: str, seed: int, first_scene: int) -> None:
    """One stage of the language model, in place, on scenes the tower was not trained on."""
    import torch

    from training import asking
    from training import language as lab
    from training.packing import run_packed
    from training.pointing import NAME_LAYER, NOUN_LAYER, OPTION_LAYER, Pointing, placed

    benchmarks = stage.name == BENCHMARKS.name
    ask = asking.benchmarks if benchmarks else asking.first
    model.model.vision_tower.requires_grad_(False)
    # The later stage is about words alone: what they say of visual tokens stays, and so do codebooks of these tokens.
    model.model.multi_modal_projector.requires_grad_(not benchmarks)
    # Token 0 must stay the empty slot it is, although the tied head would like to push it away.
    freed = model.get_input_embeddings().weight.register_hook(_without_token_zero)
    wording, pool = lab.Wording(processor.tokenizer), lab.FeaturePool(model.model.vision_tower, model.device)
    text = model.model.language_model
    pointing = {
        what: Pointing(text, layer)
        for what, layer in (("noun", NOUN_LAYER), ("name", NAME_LAYER), ("option", OPTION_LAYER))
    }
    modules = torch.nn.ModuleDict({"projector": model.model.multi_modal_projector, "text": text})
    if family != "llava":
        model.model.image_newline.requires_grad_(not benchmarks)
        modules["newline"] = torch.nn.ParameterList([model.model.image_newline])

    def step_loss(indices, step, random):
        progress = 1.0 if benchmarks else step / stage.steps
        count = lab.token_count(random, progress)
        batch = lab.draw_examples(family, "train", indices, random, first_scene)
        views = [lab.make_view(example, count, wording, random, progress, ask) for example in batch]
        packed = lab.pack_views(views, wording)
        features = lab.projected(model, views, [pool.features(example) for example in batch])
        loss, right = lab.answer_loss(model, run_packed(model, packed, features), packed)
        naming = lab.naming_loss(model, features, views, wording, random)
        points = [view.points for view in views]
        looks = {what: head.loss(packed, points, what) for what, head in pointing.items()}
        figures = {"answers": loss.item(), "right": right.item(), "naming": naming.item(), "tokens": count}
        if benchmarks or family == "llava_onevision":
            for what, layer, told in (("noun", "name", lab.place_loss), ("option", "option", lab.word_loss)):
                found = placed(packed, points, what)
                states = pointing[layer].states(found) if found else features
                own = (packed, views, wording) if what == "noun" else (packed,)
                looks[f"{what}_told"] = told(model, states, found, *own)
        figures |= {name: value.item() for name, value in looks.items()}
        return loss + 0.2 * (naming + sum(looks.values())), figures

    evaluate = _evaluator(family, model, lab.FeaturePool(model.model.vision_tower, model.device), wording, ask)
    run_stage(stage, out, modules, step_loss, seed=seed, evaluate=evaluate)
    freed.remove()
    for head in pointing.values():
        head.remove()


def _without_token_zero(gradient):
    gradient = gradient.clone()
    gradient[0] = 0
    return gradient


def _evaluator(family: str, model, pool, wording, ask):
    """Accuracy on held-out examples by kind of question, unpruned and at a quarter, as a callable for the log."""
    import torch

    from training import language as lab
    from training.packing import run_packed

    def evaluate() -> dict[str, dict[str, float]]:
        table = {}
        for name, count in (("unpruned", lab.TOKENS), ("a quarter", lab.TOKENS // 4)):
            found: dict[str, list[bool]] = {}
            for first in range(0, EVALUATION_SCENES, 16):
                random = np.random.default_rng(first)
                indices = range(first, min(first + 16, EVALUATION_SCENES))
                batch = lab.draw_examples(family, "validation", indices, random)
                views = [lab.make_view(example, count, wording, random, 1.0, ask) for example in batch]
                packed = lab.pack_views(views, wording)
                with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
                    features = lab.projected(model, views, [pool.features(example) for example in batch])
                    hidden = run_packed(model, packed, features)
                    for kind, right in lab.right_answers(model, hidden, packed, views):
                        found.setdefault(kind, []).append(right)
            table[name] = {kind: round(float(np.mean(rights)), 3) for kind, rights in sorted(found.items())}
        return table

    return evaluate


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, the log and the state of a resumed run.")],
    family: Annotated[str, typer.Option(help="llava, llava_next or llava_onevision.")] = "llava",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: int = 0,
) -> None:
    """Train a family's laboratory model. Killed at any moment, the same command continues to the same weights."""
    with exit_on_user_error():
        typer.echo(f"wrote {train(out, family=family, device=device, seed=seed)}")
        typer.echo(f"next: python -m training.check --model {out}")


if __name__ == "__main__":
    typer.run(main)
