"""One optimizer step of a contrastive run, and the state that its checkpoints hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vlm_vision.errors import ConfigError, VlmVisionError
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.depth import depths, has_batch_statistics, text_blocks, vision_blocks
from vlm_vision.train.embedding_cache import EmbeddingCache
from vlm_vision.train.gradient_cache import LOCAL, Outputs, cached_backward
from vlm_vision.train.objective import Objective
from vlm_vision.train.optim import (
    build_optimizer,
    continue_schedule,
    parameter_groups,
    warmup_cosine,
    warmup_steps,
)
from vlm_vision.train.pairs import Batch
from vlm_vision.train.parallel import (
    Parallel,
    Ranks,
    clip_gradients,
    fit,
    load_optimizer,
    optimizer_state,
    sum_over_ranks,
    whole,
    whole_state,
)
from vlm_vision.train.rules import Rule
from vlm_vision.train.run import refuse_step

PATCH_HEAD_LR = 5e-4  # it starts from random weights, whatever the towers start from: open_clip's default
SMALLEST_LOSS_SCALE = 2.0**-4


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step tells.

    Attributes:
        loss: mean over ranks.
        grad_norm: of all gradients together, before clipping.
        part_norms: of the vision tower, the text tower and what else learns.
        accuracy: share of this rank's pictures whose own caption is the nearest of this rank's distinct ones.
        logit_scale: the factor on similarities.
        skipped: whether a loss scaler left it out because a gradient overflowed.
        asks: what ranks asked for in common, summed over them.
    """

    loss: float
    grad_norm: float
    part_norms: Mapping[str, float]
    accuracy: float
    logit_scale: float
    skipped: bool
    asks: tuple[float, ...]


@dataclass(frozen=True)
class _Seen:
    """Pairs that were each other's negatives, and the objective's outputs for them."""

    batch: Batch
    outputs: Outputs

    @property
    def right(self) -> int:
        """Pictures whose own caption is the nearest of all distinct ones."""
        texts = self.outputs["text"][: self.batch.num_captions]
        nearest = (self.outputs["image"] @ texts.T).argmax(dim=1)
        return int((nearest == self.batch.captions.to(nearest.device)).sum())

    @property
    def not_finite(self) -> list[str]:
        """Samples of which an embedding is not finite."""
        image, text = (self.outputs[side].isfinite().all(dim=1).cpu() for side in ("image", "text"))
        finite = (image & text[self.batch.captions]).tolist()
        return [name for name, is_finite in zip(self.batch.names, finite, strict=True) if not is_finite]


class Learner:
    """An objective with its optimizer, schedule, weight average and loss scaler.

    Attributes:
        objective: with the model that is trained.
    """

    def __init__(
        self,
        objective: Objective,
        config: ContrastiveConfig,
        rules: Sequence[Rule],
        lr: float,
        *,
        total_steps: int,
        ranks: Ranks,
    ) -> None:
        """Put the model on its device and, if the config says so, split it among ranks.

        Raises:
            ConfigError: settings that do not go together.
        """
        self.objective, self.config = objective, config
        self.ranks, self.device = ranks, ranks.device
        world, device = ranks.world, ranks.device
        self.total_steps = total_steps
        model = objective.model
        chunks = config.micro_batch_size is not None and config.cached_gradients
        if chunks and config.micro_batch_size * world < config.batch_size and has_batch_statistics(model):  # type: ignore[operator]
            raise ConfigError(
                "micro_batch_size: this model normalises by the statistics of its batch (BatchNorm), which "
                "chunks would change; leave micro_batch_size out, or freeze those layers"
            )
        if config.parallel == "fsdp" and config.optimizer == "adamw_8bit":
            raise ConfigError("optimizer adamw_8bit does not know split parameters: use parallel ddp")
        if config.checkpoint_activations:
            model.checkpoint_activations()
        objective.to(device)
        objective.move_references(device)
        groups = parameter_groups(
            model,
            rules,
            lr=lr,
            weight_decay=config.weight_decay,
            depths=depths(model) if config.layer_decay < 1 else None,
            layer_decay=config.layer_decay,
        )
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if config.compile:
            objective.compile(dynamic=True)
        blocks = [model.get_submodule(name) for name in (*vision_blocks(model), *text_blocks(model))]
        temperature = [model.logit_scale] + ([] if model.logit_bias is None else [model.logit_bias])
        self.parallel = Parallel(objective, config.parallel, world, blocks, loose=temperature)
        groups = self.parallel.renew(groups)
        if objective.patch_head is not None:
            head = list(objective.patch_head.parameters())
            groups.append({"params": head, "lr": max(lr, PATCH_HEAD_LR), "weight_decay": config.weight_decay})
        self.parts = self._parts()
        self.optimizer = build_optimizer(config.optimizer, groups, betas=config.betas, eps=config.eps)
        self.schedule = warmup_cosine(self.optimizer, total_steps, warmup_steps(total_steps, config.warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = (
            [parameter.detach().clone() for parameter in self._of_model()] if config.ema is not None else []
        )
        self.images = EmbeddingCache.for_images(model, config, world)

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """What learns, by the side of the model it is on."""
        parts: dict[str, list[nn.Parameter]] = {"vision": [], "text": [], "other": []}
        sides = {"model.tower.": "vision", "model.text.": "text"}
        for name, parameter in self._learning().items():
            side = next((side for prefix, side in sides.items() if name.startswith(prefix)), "other")
            parts[side].append(parameter)
        return {side: parameters for side, parameters in parts.items() if parameters}

    # --- A step

    def step(self, batch: Batch, number: int, asks: Sequence[float] = ()) -> StepResult:
        """Forward, backward and the optimizer's step `number` (from 1).

        Args:
            asks: numbers that are summed over ranks with the loss, in the same exchange.

        Raises:
            VlmVisionError: a loss or gradient that is not finite; names the samples, and no weight has
                changed.
        """
        config, model = self.config, self.objective.model
        self._set_patch_dropout(number)
        # What is random in the model draws from here; seeding by step makes a resumed run draw the same.
        torch.manual_seed(config.seed * 1_000_003 + number * self.ranks.world + self.ranks.rank)
        self.optimizer.zero_grad(set_to_none=True)
        loss, seen = self._backward(batch)
        self.parallel.finish_gradients()
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.parts, config.grad_clip)
        grad_norm = norms.pop("all")
        bad = float(not torch.isfinite(loss))
        total, failed, *asked = sum_over_ranks([float(loss), bad, *asks], self.ranks.world, self.device)
        skipped = self.scaler.is_enabled() and not math.isfinite(grad_norm)
        if failed or not (skipped or math.isfinite(grad_norm)):
            self._refuse(seen, number, total / self.ranks.world, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if skipped and self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise VlmVisionError(
                f"step {number}: gradients overflow fp16 at every loss scale; use precision bf16 or fp32"
            )
        self.schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(config.temperature.max))
            if self.average:
                assert config.ema is not None
                average = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
                average(self.average, self._of_model(), number)
        return StepResult(
            loss=total / self.ranks.world,
            grad_norm=grad_norm,
            part_norms=norms,
            accuracy=sum(part.right for part in seen) / len(batch.captions),
            logit_scale=float(model.logit_scale.detach().exp()),
            skipped=skipped,
            asks=tuple(asked),
        )

    def _backward(self, batch: Batch) -> tuple[Tensor, list[_Seen]]:
        """The loss of this rank's share, and what it was taken of."""
        config = self.config
        pairs, size = len(batch.captions), config.micro_batch_size or len(batch.captions)
        if pairs > size and config.cached_gradients:
            inputs, facts = self._inputs(batch)
            loss, outputs = cached_backward(
                self._forward,
                split_inputs(inputs, -(-pairs // size), self.objective.model.tokenizer.pad_id),
                lambda outputs: self.objective.loss(outputs, facts),
                sync=self.parallel.sync,
                scale=float(self.scaler.get_scale()),
            )
            return loss, [_Seen(batch, outputs)]
        parts = [batch.part(slice(first, first + size)) for first in range(0, pairs, size)]
        losses, seen = [], []
        for part in parts:
            inputs, facts = self._inputs(part)
            with self.parallel.sync(part is parts[-1]):
                outputs = self._forward(**inputs)
                loss = self.objective.loss(outputs, facts) + outputs.get(LOCAL, 0.0)
                loss = loss * (len(part.captions) / pairs)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            seen.append(_Seen(part, {name: tensor.detach() for name, tensor in outputs.items()}))
        return torch.stack(losses).sum(), seen

    def _forward(self, **inputs: Any) -> Outputs:
        with self._autocast():
            outputs: Outputs = self.parallel.module(**inputs)
        return outputs

    def _autocast(self) -> torch.autocast:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        return torch.autocast(self.device.type, kind, enabled=kind != torch.float32)

    def _inputs(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the objective's `forward` takes for the whole batch, and the facts that its `loss` takes."""
        objective, config, device = self.objective, self.config, self.device
        pixels = objective.model.image_processor.normalise(batch.squares.to(device, non_blocking=True))
        tokens = batch.tokens
        if batch.negatives is not None and self.objective.config.hard_negatives:
            tokens = torch.cat([tokens, batch.negatives])
        inputs: dict[str, Any] = {"pixels": pixels, "tokens": tokens.to(device, non_blocking=True)}
        if self.images is not None:
            with self._autocast():
                inputs["image_features"] = self.images.embed(batch.indices, inputs.pop("pixels"))
        if self.objective.config.caption_weight:
            inputs["captions"] = batch.tokens[batch.captions].to(device)
        if batch.replay is not None:
            inputs["replay"] = objective.model.image_processor.normalise(batch.replay.to(device))
        facts = {
            "captions": batch.captions.to(device),
            "num_captions": batch.num_captions,
            "identities": batch.identities.to(device),
            "teacher": objective.teach(batch.squares, batch.texts, config.micro_batch_size or len(pixels)),
        }
        return inputs, facts

    def _set_patch_dropout(self, number: int) -> None:
        if self.config.patch_dropout:
            is_tail = number > self.total_steps * (1 - self.config.unmasked_tail)
            backbone = self.objective.model.tower.backbone
            backbone.drop_patches(0.0 if is_tail else self.config.patch_dropout)

    def _refuse(self, seen: Sequence[_Seen], number: int, loss: float, grad_norm: float) -> NoReturn:
        culprits = [name for part in seen for name in part.not_finite]
        names = [name for part in seen for name in part.batch.names]
        refuse_step(number, loss, grad_norm, self.ranks.rank, "embeddings", culprits, names)

    # --- State

    def _of_model(self) -> list[Tensor]:
        """The dual encoder's parameters that learn, in the order of their names."""
        parameters = dict(self.objective.model.named_parameters())
        return [parameters[name] for name in self.names]

    def _learning(self) -> dict[str, nn.Parameter]:
        """All that learns, heads included, by name."""
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    def learnt(self) -> dict[str, Tensor]:
        """What differs from the weights a run started from, whole: parameters that learn, and buffers."""
        state = {
            name: whole(parameter.detach())
            for name, parameter in zip(self.names, self._of_model(), strict=True)
        }
        buffers = dict(self.objective.model.named_buffers())
        kept = self.objective.model.state_dict().keys() & buffers.keys()
        return state | {name: whole(buffers[name]) for name in sorted(kept)}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """What was learnt, and its average where there is one, whole and on the CPU; every rank must ask."""
        weights: dict[str, dict[str, Tensor]] = {"learnt": whole_state(self.learnt())}
        if self.average:
            weights["average"] = dict(zip(self.names, whole_state(self.average), strict=True))
        return weights

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds, whole and on the CPU; every rank must ask for it."""
        state: dict[str, Any] = {
            **self.weights(),
            "optimizer": optimizer_state(self.optimizer, self._learning()),
            "progress": {"steps": self.schedule.last_epoch, "scaler": self.scaler.state_dict()},
        }
        if self.objective.patch_head is not None:
            head = self.objective.patch_head.state_dict()
            state["patch_head"] = whole_state(head)
        return state

    @staticmethod
    def write(state: Mapping[str, Any], folder: Path) -> None:
        """Write what `state` gave."""
        for name in ("learnt", "average", "patch_head"):
            if name in state:
                tensors = {key: tensor.contiguous() for key, tensor in state[name].items()}
                save_file(tensors, folder / f"{name}.safetensors")
        torch.save(state["optimizer"], folder / "optimizer.pt")
        (folder / "progress.json").write_text(json.dumps(state["progress"]), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take the state of a checkpoint, written at whatever world size.

        Raises:
            ConfigError: other parameters learnt there.
        """
        stored, wanted = load_file(folder / "learnt.safetensors"), self.learnt()
        has_average = (folder / "average.safetensors").is_file()
        if stored.keys() != wanted.keys() or has_average != bool(self.average):
            raise ConfigError(
                f"{folder}: other parameters learnt there than in this config; start a new run instead"
            )
        targets = dict(self.objective.model.named_parameters()) | dict(self.objective.model.named_buffers())
        with torch.no_grad():
            for name in wanted:
                targets[name].copy_(fit(stored[name], targets[name]))
            if self.average:
                averages = load_file(folder / "average.safetensors")
                for name, average in zip(self.names, self.average, strict=True):
                    average.copy_(fit(averages[name], average))
            if self.objective.patch_head is not None:
                head = load_file(folder / "patch_head.safetensors")
                for name, parameter in self.objective.patch_head.named_parameters():
                    parameter.copy_(fit(head[name], parameter))
        kept = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        load_optimizer(self.optimizer, self._learning(), kept)
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        continue_schedule(self.schedule, progress["steps"])
        self.scaler.load_state_dict(progress["scaler"])

    def train_mode(self) -> None:
        """Modules of which no weight learns stay in eval mode: no dropout, no moving batch statistics."""
        for module in self.objective.modules():
            parameters = list(module.parameters())
            module.training = not parameters or any(parameter.requires_grad for parameter in parameters)


def split_inputs(inputs: Mapping[str, Any], count: int, pad_id: int) -> list[dict[str, Any]]:
    """The objective's inputs in `count` chunks, none of them empty; the last has some of all.

    Each chunk knows its shares of the pictures, of the caption tokens and of the replayed pictures.
    """
    chunks: list[dict[str, Any]] = [{"shares": {}} for _ in range(count)]
    for name, tensor in inputs.items():
        # Where there is less than one for each chunk, the last ones get it.
        parts = [part for part in torch.tensor_split(tensor, count) if len(part)]
        amounts = [
            float((part[:, 1:] != pad_id).sum()) if name == "captions" else float(len(part)) for part in parts
        ]
        places = range(count - len(parts), count)
        for place, part, amount in zip(places, parts, amounts, strict=True):
            chunks[place][name] = part
            chunks[place]["shares"][name] = amount / sum(amounts)
    return chunks
