"""The state of a LoRA run and what a step does to it."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftwan.device import versions
from swiftwan.engine import Engine
from swiftwan.errors import SwiftwanError
from swiftwan.models.dit import WanTransformer
from swiftwan.train import adapter, flow, memory, validate, work
from swiftwan.train.buckets import Item, Shapes, batches
from swiftwan.train.cache import Cache, Encoders
from swiftwan.train.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from swiftwan.train.loop import Schedule
from swiftwan.train.processes import Processes, shard
from swiftwan.train.settings import Settings
from swiftwan.train.trainee import Trainee, attention, compile_blocks, equip, make_optimizer, trainees
from swiftwan.weights.lora import Expert
from swiftwan.weights.lora_write import write_lora

HELD_OUT_ITEMS = 8
"""Most items of the held-out loss: its five levels make it five forwards an item."""

TEXT_STEP = 16
"""Text is padded to a multiple of so many tokens, so that one compilation serves all prompts."""


@dataclass(frozen=True)
class Data:
    """Data that is checked, cut and encoded."""

    sha256: str
    shapes: Shapes
    train: list[Item]
    held_out: list[Item]
    cache: Cache
    encoders: Encoders

    @cached_property
    def text_tokens(self) -> int:
        """Of the longest caption, rounded up."""
        captions = {"", *(item.caption for item in (*self.train, *self.held_out))}
        longest = max(len(self.cache[self.encoders.text_key(caption)]) for caption in captions)
        return math.ceil(longest / TEXT_STEP) * TEXT_STEP


class Run:
    """A run in a folder.

    Attributes:
        step: how many steps lie behind.
        parameters: the adapters' factors, float32, by names that begin with the expert's.
        average: their running mean; empty where none is kept.
    """

    def __init__(self, engine: Engine, settings: Settings, data: Data, out: Path, processes: Processes) -> None:
        self.engine, self.settings, self.data, self.out = engine, settings, data, out
        self.processes = processes
        self.device = engine.torch_device
        self.trainees = trainees(engine, settings)
        self.parameters = self._adapted()
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        self.optimizer = make_optimizer(settings, list(self.parameters.values()))
        self.schedule = Schedule(settings.steps, settings.learning_rate, max(1, settings.warmup))
        self.checkpoints = Checkpoints(out / "checkpoints")
        self.step = 0
        self._first_bad = torch.full((), math.inf, device=self.device)
        self._losses: list[Tensor] = []
        self._norm = torch.zeros((), device=self.device)
        self._tokens, self._tflop, self._began = 0, 0.0, time.perf_counter()
        self._epochs: dict[int, list[list[int]]] = {}

    @property
    def log_path(self) -> Path:
        return self.out / "log.jsonl"

    def _adapted(self) -> dict[str, nn.Parameter]:
        """Adapters in place, blocks wrapped and compiled; the parameters to train."""
        settings, device = self.settings, self.engine.device
        parameters: dict[str, nn.Parameter] = {}
        targets = adapter.chosen_targets(settings.targets)
        for number, trainee in enumerate(self.trainees):
            transformer = trainee.transformer
            found = adapter.inject(transformer, settings.rank, settings.scale, targets, seed=settings.seed)
            if settings.experts == "shared" and number:
                adapter.tie(transformer, self.trainees[0].transformer)
            else:
                parameters |= {f"{trainee.expert or 'model'}.{name}": parameter for name, parameter in found.items()}
            equip(transformer, device, attention(device, transformer.dtype, settings.base))
            if settings.base != "bf16":
                adapter.freeze_in_fp8(transformer, device)
            memory.keep_in_blocks(transformer, self._keeps(transformer))
            if self.device.type == "cuda":
                # A compilation a bucket's shape, and one more without gradients: past torch's limit of eight.
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
                compile_blocks(transformer)
            if settings.weights != "whole":
                shard(transformer, list(found.values()), self.device, settings.weights)
                self.engine.parts.enter = lambda component: None  # they come by themselves from now on
        return parameters

    def _keeps(self, transformer: WanTransformer) -> list[memory.Keep]:
        config = transformer.config
        if self.settings.keep != "auto":
            return [self.settings.keep] * config.num_layers
        if self.device.type != "cuda":
            return ["all"] * config.num_layers
        shapes = self.data.shapes
        tokens = max(max(shapes.tokens(item.bucket) for item in self.data.train), self.settings.batch_tokens)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return memory.choose(config, tokens, int(0.9 * free), transformer.dtype.itemsize)

    # A step

    def update(self) -> None:
        """One step: gradients of some batches, clipped, AdamW, average. Nothing is read back from the device."""
        settings = self.settings
        parameters: list[Tensor] = list(self.parameters.values())
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        trainee, total = self._trainee(), torch.zeros((), device=self.device)
        each = settings.accumulate
        for number in range(self.step * each, (self.step + 1) * each):
            loss = self._loss(trainee, number * self.processes.count + self.processes.rank) / each
            loss.backward()
            total += loss.detach()
        self.processes.average(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        bad = ~(torch.isfinite(total) & torch.isfinite(norm))
        self._first_bad = torch.where(bad & torch.isinf(self._first_bad), float(self.step + 1), self._first_bad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average:
            # A short average at first, so that it does not carry the start for long.
            decay = min(settings.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        self._losses.append(total)
        self._norm = norm

    def _trainee(self) -> Trainee:
        """Who learns in this step: as often as its share says."""
        place = flow.spread(self.settings.seed, self.step)
        return self.trainees[0] if place < self.trainees[0].share else self.trainees[-1]

    def _loss(self, trainee: Trainee, number: int) -> Tensor:
        items = [self.data.train[i] for i in self._numbers(number)]
        place = flow.spread(self.settings.seed + 1, number)
        level = trainee.levels.quantile(flow.shares(place, len(items))).to(self.device)
        chance = flow.generator(self.settings.seed, number, self.device)
        batch = self.batch(items, chance, drop=self.settings.drop_caption)
        noise = torch.randn(batch.latents.shape, generator=chance, device=self.device)
        for tokens in (self.data.shapes.tokens(item.bucket) for item in items):
            self._tokens += tokens
            self._tflop += sum(work.tflop(trainee.transformer.config, tokens))
        return flow.loss(trainee.transformer, batch, level, noise, self.settings.weighting)

    def _numbers(self, number: int) -> list[int]:
        """The items of a batch, counted from the run's beginning."""
        epoch, at = divmod(number, self._batches_an_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._epoch(epoch)}
        return self._epochs[epoch][at]

    @cached_property
    def _batches_an_epoch(self) -> int:
        return len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[list[int]]:
        settings = self.settings
        return batches(self.data.train, self.data.shapes, settings.batch_tokens, seed=settings.seed, epoch=epoch)

    def batch(self, items: Sequence[Item], chance: torch.Generator, *, drop: float = 0.0) -> flow.Batch:
        """Read a batch from the cache to the device; ``drop`` is the share of captions to leave out."""
        cache, encoders = self.data.cache, self.data.encoders
        samples = [encoders.sample(item) for item in items]
        empty = encoders.text_key("")
        # On the host, so that nobody waits for the device.
        dropped = random.Random(chance.initial_seed())
        keys = [empty if dropped.random() < drop else sample.text for sample in samples]
        text = torch.stack([_padded(cache[key], self.data.text_tokens) for key in keys])
        tokens = [sample.image_tokens for sample in samples if sample.image_tokens]
        share = self.settings.first_frame if items[0].bucket.frames > 1 else 0.0
        given = torch.rand(len(items), generator=chance, device=self.device) < share if share else None
        return flow.Batch(
            latents=self._stacked([sample.latents for sample in samples]).float(),
            text=text.to(self.device),
            channels=self._channels([sample.image for sample in samples if sample.image]),
            image_tokens=self._stacked(tokens) if tokens else None,
            given=given,
        )

    def _stacked(self, keys: Sequence[str]) -> Tensor:
        return torch.stack([self.data.cache[key] for key in keys]).to(self.device, non_blocking=True)

    def _channels(self, keys: Sequence[str]) -> Tensor | None:
        """Mask and latents of the first frame, as sampling has them (``pipelines.start.beside_channels``)."""
        if not keys:
            return None
        image = self._stacked(keys).float()
        mask = torch.zeros_like(image[:, :1]).repeat(1, self.data.shapes.grid.temporal, 1, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat((mask, image), dim=1)

    # What is told of it

    def log(self, trackers: Sequence[Any] = ()) -> None:
        """A row of the mean loss since the last one.

        Raises:
            SwiftwanError: the loss was not finite.
        """
        losses = torch.stack(self._losses).mean().item()
        self.check()
        seconds = time.perf_counter() - self._began
        self._write(
            {
                "loss": losses,
                "gradient_norm": self._norm.item(),
                "learning_rate": self.schedule.at(self.step - 1),
                "step_seconds": seconds / len(self._losses),
                "tokens_per_second": self._tokens / seconds,
                "tflop_per_second": self._tflop / seconds,
            },
            trackers,
        )
        self._losses, self._tokens, self._tflop, self._began = [], 0, 0.0, time.perf_counter()

    def check(self) -> None:
        """Raise SwiftwanError if the loss or a gradient was not finite, saying since which step."""
        if math.isinf(first := self._first_bad.item()):
            return
        paths = self.checkpoints.paths()
        kept = f"the last good checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
        raise SwiftwanError(
            f"the loss is not finite from step {first:.0f} on, so training stopped; {kept}. A smaller --learning-rate "
            f"(now {self.settings.learning_rate:g}) helps most, in a new --out."
        )

    def validate(self, trackers: Sequence[Any] = ()) -> None:
        """A row of the held-out loss, of the averaged adapter where there is one; then the plot."""
        for trainee in self.trainees if self.data.held_out else ():
            with self.averaged():
                losses = validate.held_out_loss(
                    trainee.transformer, self._held_out(), trainee.levels, self.settings.seed
                )
            end = f"_{trainee.expert}" if trainee.expert else ""
            self._write({f"{name}{end}": value for name, value in losses.items()}, trackers)
        if self.processes.is_first:
            validate.plot(validate.read_log(self.log_path), self.out / "loss.svg")
        self._began = time.perf_counter()

    def _held_out(self) -> Iterator[flow.Batch]:
        for number, item in enumerate(self.data.held_out[:HELD_OUT_ITEMS]):
            yield self.batch([item], flow.generator(self.settings.seed + 1, number, self.device))

    def sample(self) -> None:
        """Videos of the model as it is now."""
        item = (self.data.held_out or self.data.train)[0]
        prompts = self.settings.prompts or (item.caption,)
        folder = self.out / "samples" if self.processes.is_first else None
        with self.averaged():
            validate.sample(self.engine, prompts, item, folder, self.step, self.settings.seed)
        self._began = time.perf_counter()

    def _write(self, values: Mapping[str, float], trackers: Sequence[Any]) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        if not self.processes.is_first:
            return
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": self.step, **rounded}) + "\n")
        for tracker in trackers:
            tracker.log(rounded, step=self.step)

    # What stays of it

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged adapter in place of the one that trains, where there is one."""
        before = {name: self.parameters[name].data for name in self.average}
        for name, value in self.average.items():
            self.parameters[name].data = value
        try:
            yield
        finally:
            for name, value in before.items():
                self.parameters[name].data = value

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            SwiftwanError: the loss was not finite: such a state is never saved.
            OutputError: the disk is full.
        """
        self.check()
        if not self.processes.is_first:
            return
        tensors = {f"adapter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        state, values = optimizer_tensors(self.optimizer, self.parameters)
        self.checkpoints.save(self.step, tensors | state, {"optimizer": values, "data": self.data.sha256})

    @torch.no_grad()
    def resume(self) -> bool:
        """Go on from the newest checkpoint; False where there is none."""
        saved = self.checkpoints.latest()
        if saved is None:
            return False
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.tensors[f"adapter.{name}"])
            if name in self.average:
                self.average[name].copy_(saved.tensors[f"average.{name}"])
        restore_optimizer(self.optimizer, self.parameters, saved, saved.facts["optimizer"])
        self.step = saved.step
        return True

    def deliver(self) -> list[Path]:
        """Write the adapter as others read it; the first process does."""
        if not self.processes.is_first:
            return []
        settings = self.settings
        config = adapter.lora_config(settings.rank, settings.scale, adapter.chosen_targets(settings.targets)).to_dict()
        final: dict[Expert | None, dict[str, Tensor]] = {}
        for trainee in self.trainees:
            own = self.trainees[0] if settings.experts == "shared" else trainee
            prefix = f"{own.expert or 'model'}."
            factors = {n.removeprefix(prefix): p.data for n, p in self.parameters.items() if n.startswith(prefix)}
            final[trainee.expert] = {n: self.average.get(f"{prefix}{n}", value) for n, value in factors.items()}
        return write_lora(
            self.out / "lora.safetensors",
            final,
            peft_config={key: sorted(value) if isinstance(value, set) else value for key, value in config.items()},
            metadata={
                "base_model": self.engine.facts.known.hub_id or self.engine.model_name,
                "data_sha256": self.data.sha256,
                "steps": str(self.step),
                "settings": json.dumps(settings.identity()),
                "versions": json.dumps(versions(self.engine.device)),
            },
            form=settings.format,
        )


def _padded(text: Tensor, tokens: int) -> Tensor:
    return nn.functional.pad(text, (0, 0, 0, tokens - len(text)))
