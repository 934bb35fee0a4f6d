"""The one training loop: any task, one process or many, resumable to the bit.

A task adds a shard's gradients; the loop sums them over shards and processes, steps the
optimizers, saves its state and yields what happened. Gradients are summed by one explicit
all-reduce after the backward pass rather than by DistributedDataParallel, whose hooks wait for
autograd to deliver every gradient: the early-exit loss writes the head's straight into `.grad`,
and a dropped layer has none. Launch several processes with torchrun.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from offramp.config import check_counts, check_positive, check_range
from offramp.errors import ConfigError, TrainingError
from offramp.files import check_writable_folder
from offramp.nn.device import choose_device
from offramp.train.checkpoint import load_state, save_state
from offramp.train.schedules import learning_rate

OPTIMIZERS = ("adamw", "muon")
STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. `num_shards` splits each batch: accumulation steps times processes.

    average: what is evaluated and handed out are the weights' exponential moving average, which
    keeps this share of itself at a step (0.999, for a run of thousands); 0: the weights themselves.
    """

    steps: int
    lr: float
    warmup_steps: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    average: float = 0.0
    num_shards: int = 1
    checkpoint_every: int = 100
    evaluate_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}; allowed: {', '.join(OPTIMIZERS)}")
        counts = ("steps", "num_shards", "checkpoint_every", "evaluate_every")
        check_counts(1, **{name: getattr(self, name) for name in counts})
        check_counts(0, seed=self.seed, warmup_steps=self.warmup_steps)
        check_positive(lr=self.lr)
        if not self.max_grad_norm > 0.0:
            raise ConfigError(f"max_grad_norm is {self.max_grad_norm}; it must be greater than 0")
        check_range(0, weight_decay=self.weight_decay)
        check_range(0, 1, average=self.average)
        if len(self.betas) != 2:
            raise ConfigError(f"betas is {self.betas}; it must be two numbers")
        for beta in self.betas:
            check_range(0, 1, betas=beta)


class Task(Protocol):
    """What is trained. `model` holds the parameters, `total_steps` follows the loop's steps."""

    @property
    def model(self) -> nn.Module: ...

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        """Add one shard's share of the gradient; returns sums.

        "loss", "targets" and "tokens", and, where the task has them, "loss_exit_K" and "audio_s".
        """
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Figures on development data, by name."""
        ...


@dataclass(frozen=True)
class StepDone:
    """After every step: the batch's mean loss, the gradient norm, the pace.

    exit_losses: exit layer -> its mean loss, of tasks that report `loss_exit_K`. audio_s_per_s:
    seconds of audio per second, of tasks that hear any.
    """

    step: int
    loss: float
    exit_losses: Mapping[int, float]
    grad_norm: float
    lr: float
    tokens_per_s: float
    audio_s_per_s: float | None
    eta_s: float


@dataclass(frozen=True)
class Evaluated:
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    step: int
    path: Path


TrainEvent = StepDone | Evaluated | Saved


def train(
    task: Task, config: TrainConfig, out: Path, settings: Mapping[str, Any]
) -> Iterator[TrainEvent]:
    """Run or resume; yields events, on every process. State lies in `out`/`STATE_FILE`.

    `settings` is all that determines the result (as JSON): a state written under others is
    refused. After the last event `task.model` has the weights that the run is for: with
    `config.average` their average.
    """
    # How often to save and to look changes nothing in the result, so a resumed run may differ.
    ours = {k: v for k, v in asdict(config).items() if not k.endswith("_every")}
    settings = {**settings, "train": ours}
    check_writable_folder(out)
    with _processes(task.model) as (rank, world):
        if config.num_shards % world:
            raise ConfigError(
                f"num_shards is {config.num_shards} for {world} processes; it must be a multiple"
            )
        optimizers = _optimizers(task.model, config)
        average = copy.deepcopy(task.model) if config.average else None
        # A state file holds one module: both, where there are two.
        kept = task.model if average is None else nn.ModuleList([task.model, average])
        state = out / STATE_FILE
        first = load_state(state, kept, optimizers, settings) if state.exists() else 0
        began, tokens, audio_s = time.monotonic(), 0.0, 0.0
        for step in range(first, config.steps):
            sums, norm = _step(task, config, optimizers, step, rank, world)
            if average is not None:
                _update(average, task.model, config.average, step)
            tokens += sums["tokens"]
            audio_s += sums.get("audio_s", 0.0)
            seconds = time.monotonic() - began
            yield StepDone(
                step=step + 1,
                loss=sums["loss"] / sums["targets"],
                exit_losses=_exit_losses(sums),
                grad_norm=norm,
                lr=optimizers[0].param_groups[0]["lr"],
                tokens_per_s=tokens / seconds,
                audio_s_per_s=audio_s / seconds if audio_s else None,
                eta_s=seconds / (step + 1 - first) * (config.steps - step - 1),
            )
            done = step + 1 == config.steps
            if rank == 0 and (done or (step + 1) % config.checkpoint_every == 0):
                save_state(state, kept, optimizers, step + 1, settings)
                yield Saved(step + 1, state)
            if rank == 0 and (done or (step + 1) % config.evaluate_every == 0):
                yield Evaluated(step + 1, _evaluate(task, average))
        if average is not None:
            task.model.load_state_dict(average.state_dict())


def _exit_losses(sums: Mapping[str, float]) -> dict[int, float]:
    start = "loss_exit_"
    found = {int(k.removeprefix(start)): v for k, v in sums.items() if k.startswith(start)}
    return {layer: found[layer] / sums["targets"] for layer in sorted(found)}


def _step(
    task: Task,
    config: TrainConfig,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    rank: int,
    world: int,
) -> tuple[dict[str, float], float]:
    """Take one step; (the task's sums over all shards, the gradient's norm before clipping)."""
    lr = learning_rate(step, config.steps, config.lr, config.warmup_steps)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = lr
    sums = _sum_shards(task, step, range(rank, config.num_shards, world), config.num_shards)
    _all_reduce(task.model, sums, world)
    loss = sums["loss"] / sums["targets"]
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of step {step + 1} is {loss}; lower lr ({config.lr}) or raise "
            f"warmup_steps ({config.warmup_steps}); the saved state is from before this step"
        )
    norm = nn.utils.clip_grad_norm_(task.model.parameters(), config.max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
    return sums, float(norm)


@torch.no_grad()
def _update(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Take the weights after step `step`, counted from 0, into their average.

    The start, where all is far from good, is soon forgotten: there the average keeps less of itself
    (a tenth, two elevenths, ...). Running statistics are averaged too, counters are taken over.
    """
    kept = min(decay, (1 + step) / (10 + step))
    means, news = (itertools.chain(m.parameters(), m.buffers()) for m in (average, model))
    for mean, new in zip(means, news, strict=True):
        mean.copy_(new.lerp(mean, kept) if mean.is_floating_point() else new)


def _evaluate(task: Task, average: nn.Module | None) -> Mapping[str, float]:
    """The task's figures with the averaged weights, if there are any; it keeps its own."""
    if average is None:
        return task.evaluate()
    own = {name: value.clone() for name, value in task.model.state_dict().items()}
    task.model.load_state_dict(average.state_dict())
    try:
        return task.evaluate()
    finally:
        task.model.load_state_dict(own)


def is_first_process() -> bool:
    """Whether this is the process that writes files and shows progress (rank 0)."""
    return os.environ.get("RANK", "0") == "0"


def process_device(name: str) -> torch.device:
    """The device called `name`; under torchrun `cuda` is this process's own GPU."""
    local = os.environ.get("LOCAL_RANK")
    device = choose_device(f"cuda:{local}" if name == "cuda" and local is not None else name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL and new tensors go
    return device


@contextmanager
def _processes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(rank, world size) in torchrun's process group, left again after; (0, 1) without torchrun."""
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        yield 0, 1
        return
    joined = not dist.is_initialized()
    if joined:
        on_gpu = next(model.parameters()).is_cuda
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if joined:
            dist.destroy_process_group()


def _optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the layers' matrices and AdamW for the rest.

    Muon (torch.optim.Muon) orthogonalises a matrix's update; scaled to AdamW's step size it
    shares AdamW's learning rate.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p for n, p in named if config.optimizer == "muon" and p.ndim == 2 and "embedding" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _sum_shards(task: Task, step: int, shards: range, num_shards: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    for shard in shards:
        for name, value in task.backward(step, shard, num_shards).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _all_reduce(model: nn.Module, sums: dict[str, float], world: int) -> None:
    """Sum gradients and figures over processes, in one message each.

    A layer that every sample skipped gets a gradient of 0, also in a single process: an optimizer
    passes over a parameter without one, and then the result would depend on how many there are.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    at = 0
    for p in parameters:
        p.grad = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    figures = torch.tensor(list(sums.values()), dtype=torch.float64, device=flat.device)
    dist.all_reduce(figures)
    sums.update(zip(sums, figures.tolist(), strict=True))
