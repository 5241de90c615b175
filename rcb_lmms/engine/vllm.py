"""vLLM as the engine: prompts are made here, vLLM's language model answers them.

vLLM hashes the rows of embedded prompts block by block, so that questions about one image share its keys and values.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.engine.generation import Generated, end_tokens
from rcb_lmms.engine.processes import rank_and_size
from rcb_lmms.errors import UserError
from rcb_lmms.families.loading import locate

if TYPE_CHECKING:
    from rcb_lmms.engine.options import Generation
    from rcb_lmms.families.base import Family
    from rcb_lmms.families.packed import Prompt

logger = logging.getLogger(__name__)

# What torchrun tells its processes; each has an engine of its own, which is not part of that group.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class VllmEngine:
    """Answers with vLLM, in processes of its own; one that dies is started again and asked once more.

    Args:
        family: the loaded model, whose checkpoint vLLM loads the language model of.
        prefix_cache: keep keys and values of what prompts begin with.
        tensor_parallel_size: GPUs that the language model is spread over.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes; the tower needs some of the first one's.

    Attributes:
        window, facts, counts: see `Engine`.

    Raises:
        UserError: a checkpoint in the original layout, or an engine that does not start.
    """

    window = 512

    def __init__(
        self,
        family: Family,
        *,
        prefix_cache: bool = True,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.8,
    ):
        if family.original:
            raise UserError(
                wanted=f"engine=vllm with {family.pretrained}",
                found="a checkpoint in the original layout, which vLLM does not read",
                allowed="checkpoints in Hugging Face's layout",
                next_step=f"rcb checkpoint convert {family.pretrained} FOLDER, and pretrained=FOLDER",
            )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        self.family, self._llm, self._broken = family, None, None
        place = locate(family.pretrained, family.name)
        config = family.model.config.get_text_config()
        self.arguments: dict[str, Any] = {
            "model": place.path,
            **place.options,
            "dtype": str(family.dtype).removeprefix("torch."),
            "max_model_len": config.max_position_embeddings,
            "language_model_only": True,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": prefix_cache,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "disable_log_stats": False,  # for the time to the first token
        }
        if family.device.type == "cpu":  # where blocks are multiples of 32
            self.arguments |= {"enforce_eager": True, "block_size": 32}
        self.facts = {"name": "vllm", "version": vllm.__version__, **self.arguments}
        self.counts: Counter[str] = Counter(prompt_tokens=0, prompt_tokens_shared=0)
        self._start()

    def _start(self) -> Any:
        """The running engine; one that failed to start is not tried again."""
        if self._broken is not None:
            raise self._broken
        if self._llm is None:
            from vllm import LLM

            try:
                with _alone(self.arguments["tensor_parallel_size"], self.family.device):
                    self._llm = LLM(**self.arguments)
            except Exception as error:
                self._broken = UserError(
                    wanted=f"start vLLM {self.facts['version']} on {self.arguments['model']}",
                    found=" ".join(f"{type(error).__name__}: {error}".split())[:500],
                    allowed="a checkpoint, a device and memory that vLLM can work with",
                    next_step="read what vLLM wrote above, or engine=transformers",
                )
                raise self._broken from error
        return self._llm

    def check(self, generation: Generation) -> None:
        """See `Engine`."""
        options = dict(generation.options)
        refused = {
            "num_beams": ("beams, which vLLM's engine does not have", 1, 1),
            "repetition_penalty": ("a penalty, for which vLLM takes every embedded row for token 0", 1, 1),
            "temperature": ("a temperature above those of vLLM", 0, 2),
        }
        for name, (reason, least, most) in refused.items():
            if not least <= options.get(name, least) <= most:
                raise UserError(
                    wanted=f"{name}={options[name]} with engine=vllm",
                    found=reason,
                    allowed=f"{name} from {least} to {most}",
                    next_step=f"engine=transformers, or leave {name} out",
                )

    def generate(self, prompts: Sequence[Prompt], generation: Generation, seeds: Sequence[int]) -> Generated:
        """Answer prompts in one call, in their order.

        Raises:
            UserError: a prompt of another width or type than the language model's, or an engine that does not start.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        for prompt in prompts:
            self._check(prompt)
        given = [{"prompt_embeds": prompt.embeds} for prompt in prompts]
        parameters = [self._parameters(generation, seed) for seed in seeds]
        try:
            outputs = self._ask(given, parameters)
        except EngineDeadError:
            logger.warning("vLLM died; it is started again, and asked the same %d prompts once more", len(given))
            self.close()
            try:
                outputs = self._ask(given, parameters)
            except EngineDeadError:
                self.close()
                raise
        return self._generated(outputs, dict(generation.options)["max_new_tokens"])

    def _ask(self, given: list[dict[str, Any]], parameters: list[Any]) -> list[Any]:
        llm = self._start()
        with _watched(llm.llm_engine.engine_core):
            return llm.generate(given, parameters, use_tqdm=False)

    def _check(self, prompt: Prompt) -> None:
        """What vLLM would not survive is refused; numbers that are none stay in its memory and spoil later prompts."""
        found, wanted = prompt.embeds, (self.family.width, self.family.dtype)
        if found.ndim != 2 or not len(found) or (found.shape[1], found.dtype) != wanted:
            raise UserError(
                wanted="a prompt in embedding space",
                found=f"shape {tuple(found.shape)} of {found.dtype}",
                allowed=f"shape (s, {wanted[0]}) of {wanted[1]}, s from 1",
                next_step="check the method's features",
            )
        if not bool(found.isfinite().all()):
            raise UserError(
                wanted="a prompt in embedding space",
                found="values that are infinite or no number",
                allowed="finite ones",
                next_step="check the method's features, or dtype=bfloat16 where float16 is too narrow",
            )

    def _parameters(self, generation: Generation, seed: int) -> Any:
        from vllm import SamplingParams

        options = dict(generation.options)
        drawn: dict[str, Any] = {"temperature": 0.0}
        if generation.sampled:
            # As in transformers: what a task does not say is the checkpoint's, or the 50 best tokens.
            own = self.family.model.generation_config
            values = {name: options.get(name, getattr(own, name, None)) for name in ("temperature", "top_p", "top_k")}
            drawn = {
                "temperature": 1.0 if values["temperature"] is None else values["temperature"],
                "top_p": 1.0 if values["top_p"] is None else max(values["top_p"], 1e-9),
                "top_k": 50 if values["top_k"] is None else values["top_k"],
                "seed": seed,
            }
        # Blanks before an answer are no answer: a stop that could stand among them is left to `Generation.cut`.
        stop = [text for text in generation.until if text == text.strip()]
        return SamplingParams(
            max_tokens=options["max_new_tokens"],
            stop=stop,
            detokenize=bool(stop),
            stop_token_ids=sorted(end_tokens(self.family)),
            logprobs=0,  # of the chosen token: no number where a logit is none
            **drawn,
        )

    def _generated(self, outputs: Sequence[Any], most: int) -> Generated:
        import math

        answers = [output.outputs[0] for output in outputs]
        ids = [list(answer.token_ids) for answer in answers]
        # An answer that the context cut off is as long as it may be and one token more, which makes it fail.
        lengths = [
            len(own) + (answer.finish_reason == "length" and len(own) < most)
            for own, answer in zip(ids, answers, strict=True)
        ]
        finite = [
            all(math.isfinite(choice.logprob) for step in answer.logprobs for choice in step.values())
            for answer in answers
        ]
        for output in outputs:
            self.counts["prompt_tokens"] += len(output.prompt_token_ids)
            self.counts["prompt_tokens_shared"] += output.num_cached_tokens or 0
        first = sum(output.metrics.first_token_latency for output in outputs) / len(outputs)
        texts = self.family.tokenizer.batch_decode(ids, skip_special_tokens=True)
        none = [None] * len(outputs)
        return Generated(texts, lengths, finite, [[] for _ in outputs], none, prefill_seconds=first)

    def close(self) -> None:
        """See `Engine`; the next prompts start it again."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


@contextlib.contextmanager
def _watched(client: Any) -> Iterator[None]:
    """Around a call that waits for vLLM: of an engine that is killed, its client (0.32) would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            if client.resources.engine_dead:
                client.outputs_queue.put(EngineDeadError())
                return

    if hasattr(client, "outputs_queue"):
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def _alone(gpus: int, device: Any) -> Iterator[None]:
    """The environment of a process that belongs to no group and, where this one does, sees its own GPUs alone."""
    before = dict(os.environ)
    if device.type == "cpu":  # compiling the ranks of log probabilities takes a minute, and gains nothing
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    if rank_and_size()[1] > 1:
        for name in GROUP:
            os.environ.pop(name, None)
        if device.type == "cuda":
            seen = [part for part in before.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
            own = range(device.index or 0, (device.index or 0) + gpus)
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[number] if seen else str(number) for number in own)
    try:
        yield
    finally:
        for name in (*GROUP, "CUDA_VISIBLE_DEVICES", "TORCH_COMPILE_DISABLE"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
