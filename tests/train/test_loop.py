"""The loop: a killed run goes on to the same bits, many processes do what one does.

Run as a program, this file is one process of `test_two_processes_equal_one`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import toy
from offramp.data.batching import TokenBatch
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.train import checkpoint
from offramp.train.layerskip import LayerSkipConfig, LayerSkipTask
from offramp.train.loop import Evaluated, Saved, StepDone, TrainConfig, process_device, train
from offramp.train.schedules import ExitCurriculum
from thinned import thinned

STEPS = 8
LAYERSKIP = LayerSkipConfig(0.7, "exp", 0.5, ExitCurriculum("rotational", 2), distill=0.1)
SETTINGS = {"model": {"width": 32}, "corpus": "toy"}


class Killed(BaseException):
    """No `except Exception` stops it."""


class ToyTask(LayerSkipTask):
    """A toy decoder over random tokens; dies in the middle of step `dies_at`."""

    def __init__(
        self,
        seed: int = 0,
        dies_at: int | None = None,
        layerskip: LayerSkipConfig = LAYERSKIP,
        num_layers: int = 4,
    ) -> None:
        model = toy.decoder(seed=seed, num_layers=num_layers, tied_embeddings=True)
        model.requires_grad_(True).train()
        super().__init__(model, toy.Batches(), layerskip, STEPS, seed=5)
        self._dies_at = dies_at

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        sums = super().backward(step, shard, num_shards)
        if step == self._dies_at:
            raise Killed
        return sums

    def evaluate(self) -> Mapping[str, float]:
        return {"norm": float(self.model.norm.weight.detach().norm())}


def settings_of(**changes: Any) -> TrainConfig:
    every = {"checkpoint_every": 3, "evaluate_every": 4}
    return TrainConfig(**{"steps": STEPS, "lr": 3e-2, "warmup_steps": 2, **every, **changes})


def run(task: ToyTask, config: TrainConfig, out: Path) -> list[Any]:
    """Events until the end or until the task dies."""
    events = []
    try:
        for event in train(task, config, out, SETTINGS):
            events.append(event)
    except Killed:
        pass
    return events


def bits(task: ToyTask) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in task.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def figures(events: list[Any]) -> dict[int, tuple[float, float, float]]:
    """What a step reports, but for its pace."""
    return {e.step: (e.loss, e.grad_norm, e.lr) for e in events if isinstance(e, StepDone)}


# -- resuming ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, dict[str, Tensor], list[Any]]:
    """(config, weights, events) of a run that nothing disturbed."""
    task, config = ToyTask(), settings_of(optimizer=request.param, num_shards=2)
    events = run(task, config, tmp_path_factory.mktemp("whole"))
    return config, bits(task), events


@pytest.mark.parametrize("dies_at", thinned([1, 3, 5, STEPS - 1], keep=[5]))
def test_a_killed_run_goes_on_to_the_same_bits(whole: Any, dies_at: int, tmp_path: Path) -> None:
    config, weights, events = whole
    before = run(ToyTask(dies_at=dies_at), config, tmp_path)
    # Other initial weights: all that matters comes from the state, if there is one.
    task = ToyTask(seed=0 if dies_at < config.checkpoint_every else 99)
    after = run(task, config, tmp_path)
    assert same(bits(task), weights)
    expected = figures(events)
    assert figures(before) == {s: expected[s] for s in range(1, dies_at + 1)}
    resumed = dies_at // config.checkpoint_every * config.checkpoint_every
    assert figures(after) == {s: expected[s] for s in range(resumed + 1, STEPS + 1)}


@pytest.mark.slow
def test_a_run_killed_at_every_step_arrives_as_well(whole: Any, tmp_path: Path) -> None:
    config, weights, _ = whole
    config = dataclasses.replace(config, checkpoint_every=1)
    for step in range(STEPS):
        run(ToyTask(dies_at=step), config, tmp_path)
    task = ToyTask()
    run(task, config, tmp_path)
    assert same(bits(task), weights)


def test_a_finished_run_has_nothing_to_do(whole: Any, tmp_path: Path) -> None:
    config, weights, _ = whole
    run(ToyTask(), config, tmp_path)
    task = ToyTask(seed=99)
    assert run(task, config, tmp_path) == []
    assert same(bits(task), weights), "and hands out its model"


def test_events_say_what_happened_and_when(whole: Any) -> None:
    config, _, events = whole
    assert [e.step for e in events if isinstance(e, StepDone)] == list(range(1, STEPS + 1))
    assert [e.step for e in events if isinstance(e, Saved)] == [3, 6, 8]
    assert [e.step for e in events if isinstance(e, Evaluated)] == [4, 8]
    done = [e for e in events if isinstance(e, StepDone)]
    assert all(e.tokens_per_s > 0 and e.grad_norm > 0 for e in done)
    assert all(e.exit_losses == {} and e.audio_s_per_s is None for e in done), "told of neither"
    assert done[-1].eta_s == 0.0
    assert done[0].lr == pytest.approx(config.lr / 2)
    assert done[1].lr == pytest.approx(config.lr)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(optimizer: str, tmp_path: Path) -> None:
    class OneBatch(toy.Batches):
        def batch(self, step: int, shard: int, num_shards: int) -> TokenBatch:
            return super().batch(0, shard, num_shards)

    task = ToyTask(layerskip=LayerSkipConfig(0.0, "constant", 0.5))
    task.batches = OneBatch()
    losses = [
        figure[0]
        for figure in figures(run(task, settings_of(optimizer=optimizer), tmp_path)).values()
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_the_learning_rate_reaches_the_optimizer(tmp_path: Path) -> None:
    """Adam's first step moves each weight by it, whatever the gradient."""
    before, task = bits(ToyTask()), ToyTask(dies_at=1)
    run(task, settings_of(warmup_steps=4), tmp_path)
    moved = (bits(task)["norm.weight"] - before["norm.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 3e-2 / 4), rtol=1e-3, atol=0)


# -- the state on disk -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a run that died after its first checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    run(ToyTask(dies_at=4), settings_of(), out)
    return out / "state.safetensors"


@pytest.fixture
def stopped(state: Path, tmp_path: Path) -> Path:
    """The folder of that run; what it holds may be changed."""
    shutil.copy(state, tmp_path)
    return tmp_path


def refused(out: Path, says: str, task: ToyTask | None = None, **changes: Any) -> None:
    config = settings_of(**changes)
    with pytest.raises(CheckpointError, match=says) as error:
        next(train(task or ToyTask(), config, out, SETTINGS))
    assert "\n" not in str(error.value)
    assert str(out / "state.safetensors") in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_state_is_refused(stopped: Path, keep: int) -> None:
    state = stopped / "state.safetensors"
    state.write_bytes(state.read_bytes()[:keep])
    refused(stopped, "cannot resume from .*; delete it to start anew")


def test_a_corrupt_state_is_refused(stopped: Path) -> None:
    state = stopped / "state.safetensors"
    state.write_bytes(b"\xff" * 64 + state.read_bytes()[64:])
    refused(stopped, "cannot resume from .*; delete it to start anew")


def test_a_flipped_byte_anywhere_is_noticed(stopped: Path) -> None:
    state = stopped / "state.safetensors"
    whole, task = state.read_bytes(), ToyTask()
    before = {name: p.clone() for name, p in bits(task).items()}
    for at in [*range(0, 4000, 397), *range(4000, len(whole), 9973), len(whole) - 1]:
        state.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(stopped, "cannot resume from ", task)
    assert same(bits(task), before), "a refused state changes nothing"


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(InputError, match=r"cannot write .*; choose a folder you may write to"):
            next(train(ToyTask(), settings_of(), out, SETTINGS))


def rewrite(state: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    """Change tensors and metadata of a state, and sign it anew."""
    with safe_open(str(state), framework="pt") as file:
        meta = file.metadata()
    tensors = load_file(state)
    change(tensors, meta)
    save_file(tensors, state, {**meta, "sha256": checkpoint._digest(tensors, meta)})


CHANGES: dict[str, Callable[[dict[str, Tensor], dict[str, str]], object]] = {
    "an optimizer tensor less": lambda t, _: t.pop("optimizer0.3.exp_avg"),
    "a step less": lambda t, _: t.pop("optimizer0.0.step"),
    "a weight less": lambda t, _: t.pop("model.norm.weight"),
    "an index more": lambda t, _: t.update({"optimizer0.99.exp_avg": torch.ones(1)}),
    "an optimizer more": lambda t, _: t.update({"optimizer1.0.exp_avg": torch.ones(1)}),
    "no index": lambda t, _: t.update({"optimizer0.x.exp_avg": torch.ones(1)}),
    "another shape": lambda t, _: t.update({"optimizer0.0.exp_avg": torch.ones(1)}),
    "weights of a new run": lambda _, meta: meta.update(step="0"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_holds_just_the_tensors_of_model_and_optimizer(
    stopped: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]
) -> None:
    rewrite(stopped / "state.safetensors", change)
    refused(stopped, "it is of another model or optimizer .*; delete it to start anew")


@pytest.mark.parametrize("changes", [{"step": "many"}, {"step": "-3"}, {"settings": "{"}], ids=str)
def test_step_and_settings_that_make_no_sense_are_refused(stopped: Path, changes: dict) -> None:
    rewrite(stopped / "state.safetensors", lambda _, meta: meta.update(changes))
    refused(stopped, "it is damaged")


def test_another_file_is_refused(stopped: Path) -> None:
    save_file({"a": torch.ones(1)}, stopped / "state.safetensors")
    refused(stopped, "it is no training state; choose another output folder")


def test_a_state_of_other_settings_is_refused_by_name(stopped: Path) -> None:
    says = r"safetensors: train\.optimizer was 'adamw', is 'muon'; restore"  # and nothing else
    refused(stopped, says, optimizer="muon")
    says = r"corpus was 'toy', is 'books'; model\.width was 32, is None"
    with pytest.raises(CheckpointError, match=says):
        next(train(ToyTask(), settings_of(), stopped, {"corpus": "books"}))


@pytest.mark.parametrize("num_layers", [3, 5])
def test_a_state_of_another_model_is_refused(stopped: Path, num_layers: int) -> None:
    refused(stopped, "it is of another model", ToyTask(num_layers=num_layers))


def test_the_state_holds_step_settings_weights_and_optimizer(stopped: Path) -> None:
    with safe_open(str(stopped / "state.safetensors"), framework="pt") as file:
        meta, names = file.metadata(), set(file.keys())
    assert meta["step"] == "3"
    assert json.loads(meta["settings"])["corpus"] == "toy"
    assert "model.norm.weight" in names
    assert any(name.startswith("optimizer0.") for name in names)


@pytest.mark.parametrize(
    ("error", "becomes"), [(OSError(28, "No space left on device"), InputError), (Killed(), Killed)]
)
def test_a_state_is_never_half_written(
    error: BaseException,
    becomes: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail_half_way(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise error

    whole = ToyTask()
    run(whole, settings_of(), tmp_path / "whole")
    out = tmp_path / "out"
    run(ToyTask(dies_at=3), settings_of(), out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail_half_way)
        with pytest.raises(becomes):
            list(train(ToyTask(), settings_of(), out, SETTINGS))
    assert [p.name for p in out.iterdir()] == ["state.safetensors"]
    task = ToyTask(seed=99)
    run(task, settings_of(), out)
    assert same(bits(task), bits(whole))


# -- shards and processes ----------------------------------------------------------------------


def test_accumulating_shards_equals_one_batch(tmp_path: Path) -> None:
    """Without dropout, whose draw is by place in the shard."""
    ends = []
    for num_shards in (1, 2, 4):
        task = ToyTask(layerskip=LayerSkipConfig(0.0, "constant", 0.5))
        run(task, settings_of(num_shards=num_shards), tmp_path / str(num_shards))
        ends.append(bits(task))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of two samples often skip a layer here: then it has no gradient, in either way."""
    task, config = ToyTask(), settings_of(num_shards=2, lr=3e-3)
    expected = figures(run(task, config, tmp_path / "one"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    other = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "two")],
        env={**os.environ, "RANK": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        dist.init_process_group("gloo", rank=0, world_size=2, timeout=timedelta(seconds=100))
        mine = ToyTask()
        reported = [figures(run(mine, config, tmp_path / "two"))]
        reported.append({step: tuple(x) for step, *x in json.loads(other.communicate()[0])})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        other.kill()
    for steps in reported:
        assert steps.keys() == expected.keys()
        assert all(steps[i] == pytest.approx(expected[i], abs=1e-5) for i in expected)
    others = load_file(tmp_path / "two" / "rank1.safetensors")
    assert same(bits(mine), others)
    torch.testing.assert_close(others, bits(task), rtol=0, atol=1e-6)


def one_of_two(out: Path) -> None:
    task = ToyTask()
    done = figures(run(task, settings_of(num_shards=2, lr=3e-3), out))
    save_file(bits(task), out / f"rank{os.environ['RANK']}.safetensors")
    print(json.dumps([(step, *values) for step, values in done.items()]))


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed: adamw, muon"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, r"lr is 0\.0; it must be a number greater than 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"num_shards": 0}, "num_shards is 0; it must be a whole number of at least 1"),
        ({"num_shards": 1.0}, r"num_shards is 1\.0; it must be a whole number"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it must be a whole number of at least 0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; it must be greater than 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1; it must be a number of at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"betas": (0.9,)}, r"betas is \(0\.9,\); it must be two numbers"),
        (
            {"betas": (0.9, 1.0)},
            r"betas is 1\.0; it must be .* less than 1",
        ),
        ({"betas": (math.nan, 0.9)}, "betas is nan"),
        ({"betas": ("a", 0.9)}, "betas is 'a'"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"evaluate_every": -1}, "evaluate_every is -1"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings_of(**changes)


@pytest.mark.parametrize(
    ("name", "local_rank", "becomes"),
    [
        ("cuda", "1", "cuda:1"),
        ("cuda", None, "cuda"),
        ("cuda:0", "1", "cuda:0"),
        ("cpu", "1", "cpu"),
    ],
)
def test_under_torchrun_each_process_has_its_own_gpu(
    name: str, local_rank: str | None, becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert process_device(name) == torch.device(becomes)
    assert current == ([torch.device(becomes)] if ":" in becomes else [])
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"'cuda:2', and torch sees 2 .*use cuda:0 to cuda:1"):
        process_device("cuda")


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
