"""LayerSkip training of a transformers decoder, under its own Trainer or any loop of yours.

The same layer dropout and early-exit loss as `train/layerskip.py` (arXiv 2404.16710, section 4),
lent to a Llama, Mistral, Qwen2 or Qwen3 model, plain or with peft adapters, for the time of a
`with` block. The model computes the loss itself, from `labels` and the Trainer's
`num_items_in_batch`, as it always does: so no Trainer subclass is needed, gradient accumulation
is right, and evaluation stays the plain loss of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offramp.data.batching import IGNORE
from offramp.errors import ConfigError
from offramp.models.hf_config import FAMILIES
from offramp.nn.layer_dropout import draw_survivors, run_survivors, time_factor
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.schedules import exit_weights

if TYPE_CHECKING:
    from transformers import TrainerCallback

Head = Callable[[Tensor], Tensor]  # a state [K, D] to logits [K, V]: the final norm and lm_head


@contextmanager
def layerskip(
    model: nn.Module, options: LayerSkipConfig, total_steps: int | None = None, seed: int = 0
) -> Iterator[LayerSkip]:
    """Within the block `model` trains with layer dropout and the early-exit loss.

    model: a transformers decoder (`hf_config.FAMILIES`) or a peft model around one.
    total_steps: of the whole run, for what changes over time; None: the Trainer says it.
    Give `.callback` of what this yields to the Trainer, or call `.at(step)` in your own loop.
    After the block, also after an exception, the model is as plain as it came.

    Only training forwards (`model.train()`, gradients on) are changed: they need `labels`, and
    their output holds the logits of the last position alone unless `logits_to_keep` is given.
    ConfigError: transformers is missing, the model is of another kind, the step is not known,
    or a training forward comes without labels.
    """
    base = _base_model(model)
    skip = LayerSkip(base, options, total_steps, seed)
    with ExitStack() as undo:
        for i, layer in enumerate(base.model.layers):
            _restore_later(undo, layer, "forward")
            layer.forward = partial(skip._run_layer, i, layer.forward)
        _restore_later(undo, base, "_loss_function")  # what the public property below writes
        base.loss_function = partial(skip._loss, base.loss_function)
        # Hooks, because accelerate puts its own wrapper around `base.forward` for bf16 and fp16.
        begin = base.register_forward_pre_hook(skip._begin, with_kwargs=True)
        end = base.register_forward_hook(skip._end, always_call=True)
        undo.callback(begin.remove)
        undo.callback(end.remove)
        yield skip


@dataclass
class _Forward:
    """One training forward under way: survivors is bool [L, B], hidden layer -> [B, T, D]."""

    weights: dict[int, float]
    survivors: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    has_loss: bool = False


class LayerSkip:
    """What `layerskip` yields: knows the step, and does the work of the changed forwards."""

    def __init__(
        self, base: Any, options: LayerSkipConfig, total_steps: int | None, seed: int
    ) -> None:
        self.options, self.seed = options, seed
        self._base, self._num_layers = base, len(base.model.layers)
        self._given_total, self._total_steps = total_steps, total_steps
        self._at: tuple[int, int, int] | None = None
        self._forward: _Forward | None = None

    def at(self, step: int, shard: int = 0, num_shards: int = 1) -> None:
        """The next forward is of `step` (counts from 0); for loops without the callback.

        With gradient accumulation, it sees batch number `shard` of the step's `num_shards`:
        batches of one size drop just what the joint batch would drop.
        """
        assert 0 <= shard < num_shards, f"shard {shard} of {num_shards}"
        self._at = (step, shard, num_shards)

    @property
    def callback(self) -> TrainerCallback:
        """Keeps the step, for `Trainer(callbacks=[...])`; a resumed run goes on where it was."""
        return _step_callback(self)

    def _train_for(self, total_steps: int) -> None:
        if self._given_total not in (None, total_steps):
            raise ConfigError(
                f"total_steps is {self._given_total} and the Trainer will take {total_steps} "
                "steps; leave total_steps out, and it is the Trainer's"
            )
        self._total_steps = total_steps

    # -- a training forward, in the order of events --------------------------------------------

    def _begin(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the model's forward: plan it, if it is one that trains."""
        self._forward = None
        if not (base.training and torch.is_grad_enabled()):
            return None
        if kwargs.get("labels") is None:
            raise ConfigError(
                "a training forward came without labels, which the early-exit loss needs; keep "
                "them in the batch, and use neither label_smoothing_factor nor compute_loss_func"
            )
        if self._at is None or self._total_steps is None:
            raise ConfigError(
                "the training step or total_steps is not known; pass callbacks=[skip.callback] "
                "to the Trainer, or give total_steps and call skip.at(step) in your own loop"
            )
        cfg = self.options
        weights = exit_weights(
            self._at[0], self._total_steps, self._num_layers, cfg.curriculum, cfg.early_exit_scale
        )
        self._forward = _Forward(weights)
        # Layers that see different rows cannot share a cache. The logits of all positions would
        # be T x V numbers that the loss has no use for: it makes its own, chunk by chunk.
        return args, {"logits_to_keep": 1, **kwargs, "use_cache": False}

    def _run_layer(
        self, index: int, forward: Callable[..., Tensor], h: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Layer `index` on the surviving rows of h [B, T, D]; the others pass unchanged."""
        now = self._forward
        if now is None:
            return forward(h, *args, **kwargs)
        if now.survivors is None:
            now.survivors = self._draw(len(h))

        def run(kept: Tensor, rows: Tensor | None) -> Tensor:
            if rows is None:
                return forward(kept, *args, **kwargs)
            of_rows = {name: _select(name, x, rows, len(h)) for name, x in kwargs.items()}
            return forward(kept, *(_select("input", x, rows, len(h)) for x in args), **of_rows)

        h = run_survivors(run, h, now.survivors[index])
        if index in now.weights:
            now.hidden[index] = h
        return h

    def _draw(self, batch_size: int) -> Tensor:
        """bool [L, B] for this forward: its shard's columns of the whole step's draw."""
        assert self._at is not None and self._total_steps is not None
        (step, shard, num_shards), cfg = self._at, self.options
        time = time_factor(step, self._total_steps, cfg.dropout_schedule)
        joint = draw_survivors(
            self._num_layers, batch_size * num_shards, cfg.p_max, time, self.seed, step
        )
        return joint[:, shard * batch_size : (shard + 1) * batch_size]

    def _loss(
        self,
        plain: Callable[..., Tensor],
        logits: Tensor,
        labels: Tensor,
        *args: Any,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Called by the model where it would call `plain`, with its arguments; a scalar.

        Divided as there: by `num_items_in_batch`, the targets of all batches of a step, or where
        there is none (a loop of your own) by this batch's targets.
        """
        now = self._forward
        if now is None:
            extra = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            return plain(logits, labels, *args, **extra, **kwargs)
        if shift_labels is None:
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORE)
        targets = shift_labels.flatten().to(logits.device)
        hidden = {i: h.flatten(0, 1) for i, h in now.hidden.items()}
        loss = exit_loss(self._head, hidden, targets, now.weights, self.options.distill)
        now.has_loss = True
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE).sum().clamp(min=1)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
        # Frozen base, and every layer with an adapter dropped: there is nothing to learn from
        # this batch, but the Trainer calls backward.
        return loss if loss.requires_grad else loss.requires_grad_()

    def _head(self, h: Tensor) -> Tensor:
        # Called as modules: lm_head may itself be an adapter's or quantised.
        logits: Tensor = self._base.lm_head(self._base.model.norm(h))
        return logits

    def _end(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's forward, also a failed one (output is None): let go of its states."""
        now, self._forward = self._forward, None
        if now is not None and output is not None and not now.has_loss:
            raise ConfigError(
                "the model did not use its loss_function, so there was no early-exit loss; "
                "undo what replaced the model's forward (use_liger_kernel=False)"
            )


def exit_loss(
    head: Head,
    hidden: dict[int, Tensor],
    targets: Tensor,
    weights: dict[int, float],
    distill: float = 0.0,
    chunk: int = 2048,
) -> Tensor:
    """`losses.early_exit_loss` inside autograd with one chunk of one exit's logits at a time.

    hidden: layer -> [N, D] before the final norm; targets: [N]; a scalar, summed over targets.
    Each [chunk, V] block is made again in the backward pass, so memory does not grow with the
    exits. The caller's own backward() runs it: loss scaling, DDP and accumulation work as ever
    (`early_exit_backward`, which is cheaper, writes `.grad` past them).
    """
    kept = (targets != IGNORE).nonzero().flatten()
    last = max(hidden)
    total = targets.new_zeros((), dtype=torch.float32)
    for at in range(0, max(1, len(kept)), chunk):  # no target: one empty chunk, a 0 with a graph
        rows = kept[at : at + chunk]
        for i, weight in weights.items():
            teacher = hidden[last] if i != last and distill > 0.0 else None
            part = checkpoint(
                _chunk_loss, head, hidden[i], teacher, rows, targets, distill, use_reentrant=False
            )
            total = total + weight * part
    return total


def _chunk_loss(
    head: Head, h: Tensor, teacher: Tensor | None, rows: Tensor, targets: Tensor, distill: float
) -> Tensor:
    """Summed cross-entropy of one exit at positions `rows` [K] of h [N, D]."""
    logits = head(h[rows]).float()
    hard = F.cross_entropy(logits, targets[rows], reduction="sum")
    if teacher is None:
        return hard
    with torch.no_grad():
        goal = head(teacher[rows]).float().softmax(-1)
    return (1 - distill) * hard + distill * F.cross_entropy(logits, goal, reduction="sum")


def _select(name: str, value: Any, rows: Tensor, batch_size: int) -> Any:
    """The part of a layer's argument that belongs to `rows` [K].

    Per sample are masks [B, ...], position_ids [B, T] and cos and sin [B, T, Dh]. What all rows
    share has 1 in front, and what has one dimension (cache_position, cu_seq_lens) or none
    (num_items_in_batch) belongs to no row.
    """
    if isinstance(value, tuple):
        return tuple(_select(name, x, rows, batch_size) for x in value)
    if isinstance(value, Tensor):
        per_sample = value.ndim >= 2 and len(value) == batch_size
        return value.index_select(0, rows) if per_sample else value
    if name == "attention_mask" and value is not None:
        raise ConfigError(
            f"the attention mask is a {type(value).__name__}, whose rows cannot be chosen; load "
            "the model with attn_implementation='sdpa' (or 'eager', 'flash_attention_2')"
        )
    return value


def _base_model(model: nn.Module) -> Any:
    """The transformers decoder in `model`, without peft's wrapper; ConfigError if it is none."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "LayerSkip on a transformers model needs transformers; pip install 'offramp[hf]'"
        ) from error
    unwrap = getattr(model, "get_base_model", None)  # peft's
    base = model if unwrap is None else unwrap()
    wanted = FAMILIES.get(getattr(getattr(base, "config", None), "model_type", None) or "")
    if wanted is None or all(cls.__name__ != wanted for cls in type(base).__mro__):
        raise ConfigError(
            f"LayerSkip training got a {type(base).__name__}; allowed: "
            f"{', '.join(FAMILIES.values())}, plain or in a peft model"
        )
    return base


def _restore_later(undo: ExitStack, module: nn.Module, name: str) -> None:
    """On leaving, set the instance's attribute `name` back, or take it off if there was none."""
    before = {name: module.__dict__[name]} if name in module.__dict__ else {}

    def restore() -> None:
        module.__dict__.pop(name, None)
        module.__dict__.update(before)

    undo.callback(restore)


def _step_callback(skip: LayerSkip) -> TrainerCallback:
    from transformers import TrainerCallback  # a slow import, and an optional package

    class StepCallback(TrainerCallback):
        """Tells `skip` the optimizer step and which batch of its accumulation comes next."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.n_gpu > 1:
                raise ConfigError(
                    f"the Trainer would split each batch over {args.n_gpu} GPUs in one process "
                    "(nn.DataParallel); start one process per GPU with torchrun"
                )
            skip._train_for(state.max_steps)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.shard = 0
            skip.at(state.global_step, 0, args.gradient_accumulation_steps)

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.shard += 1
            skip.at(state.global_step, self.shard, args.gradient_accumulation_steps)

    return StepCallback()
