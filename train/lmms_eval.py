"""A saved vision-language model as lmms-eval runs it: `--model vlm_vision --model_args pretrained=FOLDER`.

The interface is that of `lmms` in `lmms_eval/api/model.py` of EvolvingLMMs-Lab/lmms-eval 75571cf. This module
imports only where lmms-eval is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from vlm_vision.errors import ConfigError, DataError, MissingExtraError, nearest
from vlm_vision.progress import progress_bar
from vlm_vision.train.conversations import IMAGE_TOKEN, Turn
from vlm_vision.train.vlm import VisionLanguageModel

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise MissingExtraError(
        f"vlm_vision.train.lmms_eval is what lmms-eval loads, which does not import ({error}): "
        "pip install lmms_eval"
    ) from error

MAX_NEW_TOKENS = 1024
_OPTIONS = ("do_sample", "temperature", "top_p", "num_beams")


class VlmVision(lmms):  # type: ignore[misc,no-any-unimported]
    """Answers lmms-eval's requests, a share of them on each process of `accelerate launch`.

    Args:
        pretrained: folder or hub id that `VisionLanguageModel.save_pretrained` wrote.
        batch_size: requests at once.
        device: by default this process' GPU, or the CPU.

    Raises:
        ConfigError: no such model, or an argument that is not known.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            name = next(iter(unknown))
            hint = nearest(name, ("pretrained", "batch_size", "device"))
            raise ConfigError(f"--model_args of vlm_vision takes no {name!r}{hint}")
        if not str(batch_size).isdigit():
            raise ConfigError(f"batch_size must be a number, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1 and device is not None and not device.startswith("cuda")
        self.model = VisionLanguageModel.from_pretrained(pretrained)
        self.model.to(torch.device(device) if alone and device else self.accelerator.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, in order; those with the same options of generation are batched.

        Raises:
            DataError: a request with something else than pictures.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        with progress_bar(len(requests), "lmms-eval", disable=self._rank != 0) as bar:
            for places in groups.values():
                for first in range(0, len(places), self.batch_size):
                    batch = places[first : first + self.batch_size]
                    for place, answer in zip(batch, self._answer([requests[n] for n in batch]), strict=True):
                        answers[place] = answer
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not there: tasks that rank texts by likelihood.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "vlm_vision answers tasks of lmms-eval that generate text, not those of likelihoods"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there: tasks of several rounds.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("vlm_vision answers tasks of lmms-eval that ask once, not those of several rounds")

    def _answer(self, requests: Sequence[Any]) -> list[str]:
        prompts, pictures = [], []
        for request in requests:
            context, _, doc_to_visual, doc_id, task, split = request.args
            seen = [
                _picture(visual, task) for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or []
            ]
            marks = f"{IMAGE_TOKEN}\n" * len(seen)
            prompts.append([Turn("user", marks + context.replace(IMAGE_TOKEN, "").strip())])
            pictures += seen
        options: Mapping[str, Any] = requests[0].args[1]
        pixels, sizes = self.model.prepare_pictures(pictures)
        said = self.model.answer(
            pixels,
            prompts,
            options.get("max_new_tokens", MAX_NEW_TOKENS),
            image_sizes=sizes,
            **_sampling(options),
        )
        until = options.get("until") or []
        return [_cut(answer, [until] if isinstance(until, str) else until) for answer in said]


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' `generate` is told; greedy at temperature 0, as tasks ask for it."""
    given = {name: options[name] for name in _OPTIONS if options.get(name) is not None}
    if not given.get("do_sample") or not given.get("temperature", 1):
        return {"num_beams": given.get("num_beams", 1)}
    return given


def _cut(answer: str, until: Sequence[str]) -> str:
    for stop in until:
        answer = answer.partition(stop)[0] if stop else answer
    return answer.strip()


def _picture(visual: Any, task: str) -> Image.Image:
    if not isinstance(visual, Image.Image):
        raise DataError(f"task {task!r} shows a {type(visual).__name__}; this model sees pictures alone")
    return visual.convert("RGB")
