"""Plans: they survive the disk, are carried out to the letter, and only on their own model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.compress.candidates import Heard, Sensitivity, global_levels, problem_of
from offramp.compress.components import stored_weights
from offramp.compress.magnitude import MagnitudePruning
from offramp.compress.packing import stored_size
from offramp.compress.plan import (
    METHODS,
    MODULES,
    Choice,
    CompressionPlan,
    pruned,
    quantised,
)
from offramp.compress.planner import solve
from offramp.compress.problem import Budget, Pick
from offramp.compress.quantized import QuantizedEmbedding, QuantizedLinear
from offramp.compress.sensitivity import NO_INCREASE, Grid, Increase, curves, sweep
from offramp.config import Chunking
from offramp.energy.profiles import load_profile
from offramp.energy.trace import StreamTrace
from offramp.errors import ConfigError, DataError, InputError
from offramp.models.fingerprint import fingerprint
from toy_transducer import CHUNKING, transducer

PLAN = CompressionPlan(
    made_by="exact",
    model="0" * 64,
    choices={"encoder": Choice("blocks", 0.5, 4, "int8"), "joiner": Choice(bits=8)},
    chunk_ms=320.0,
    blank_skip=0.5,
    wer=0.21,
    wer_increase=0.01,
    wer_increase_ci95=(-0.01, 0.03),
    stored_bytes=1234,
    modelled_mj_per_audio_s={"edge45": 3.1},
    placements={"edge45": {"joiner.weights": "local"}},
)


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_ms": None}, "lacks chunk_ms"),
        ({"colour": 1}, "has no setting colour"),
        ({"choices": {"encoder": {"method": "prayer"}}}, "method is 'prayer'"),
        ({"choices": {"encoder": {"level": 0.5}}}, "level 0 is method 'none'"),
        ({"choices": {"ears": {}}}, "no component ears; allowed: encoder, predictor, joiner"),
        ({"choices": [1]}, "no attribute 'items'"),
        ({"wer_increase_ci95": [0.1]}, "not enough values"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = json.loads(PLAN.to_json()) | change
    values = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"p\.json is no plan: .*{message}"):
        CompressionPlan.load(tmp_path / "p.json")


def test_a_file_that_is_not_even_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.json: .*; give a plan"):
        CompressionPlan.load(tmp_path / "none.json")
    for text, message in (("{", "is not JSON"), ("[]", "is no JSON object")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(DataError, match=message):
            CompressionPlan.load(tmp_path / "p.json")


def test_a_plan_is_for_one_model() -> None:
    model = transducer()
    replace(PLAN, model=fingerprint(model)).check(model)
    changed = transducer()
    changed.joiner.tokens.bias[3] += 1e-3
    others = [transducer(seed=1), changed, transducer(vocab_size=12), transducer(dropout=0.1)]
    assert len({fingerprint(m) for m in (model, *others)}) == 5
    for other in others:
        with pytest.raises(InputError, match=r"for another model \(fingerprint .*offramp compress"):
            replace(PLAN, model=fingerprint(model)).check(other)
    assert fingerprint(transducer()) == fingerprint(model)


def test_choices_are_carried_out_on_their_components_alone() -> None:
    model = transducer(factorised_blank=True, ctc_head=True)
    choices = {
        "encoder": Choice("units_and_heads", 0.5, 8, "int8"),
        "predictor": Choice("magnitude", 0.25, 4),
        "joiner": Choice(bits=8),
    }
    smaller = pruned(model, choices)
    made = quantised(smaller, choices)
    layer = made.encoder.layers[0]
    assert layer.feed_forward.up.out_features == 12 and layer.feed_forward.up.bits == 8
    assert layer.attention.output.linear.activations == "int8"
    embedding = made.predictor.embedding
    assert isinstance(embedding, QuantizedEmbedding) and embedding.bits == 4
    assert float((smaller.predictor.embedding.weight == 0).float().mean()) == 0.25
    assert isinstance(made.joiner.tokens, QuantizedLinear)
    for untouched in ("joiner.blank", "ctc_head"):
        old, new = (m.get_submodule(untouched).weight for m in (model, made))
        assert torch.equal(old, new)
    assert fingerprint(model) == fingerprint(transducer(factorised_blank=True, ctc_head=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_component_smaller(name: str) -> None:
    model = transducer()
    for component, module in MODULES.items():
        structured = name in ("feed_forward", "heads", "units_and_heads")
        if structured and component != "encoder":
            continue
        smaller = pruned(model, {component: Choice(name, 0.5)})
        sizes = [stored_size(m).of([module]).nbytes for m in (model, smaller)]
        assert sizes[1] < 0.9 * sizes[0]


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"level": 0.5}, {"method": "blocks"}, {"bits": 7}, {"level": 1.0}):
        with pytest.raises(ConfigError):
            Choice(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="activations is 'int4'"):
        Choice(bits=8, activations="int4")


# -- problems from models ----------------------------------------------------------------------


def trace(chunks: int = 25, frames: int = 75) -> StreamTrace:
    return StreamTrace(
        audio_s=3.0,
        enc_chunks=chunks,
        enc_frames=frames,
        joiner_calls=frames,
        joiner_positions=frames,
        predictor_calls=10,
        predictor_positions=10,
        tokens=9,
    )


def heard(chunking: Chunking = CHUNKING, chunks: int = 25, cost: float = 0.0) -> Heard:
    increase = Increase(cost, (cost, cost)) if cost else NO_INCREASE
    return Heard(20.0 * chunking.chunk, chunking, None, trace(chunks), increase)


def rising(model: Any) -> Increase:
    value = 1e-6 * (20_000 - stored_size(model).nbytes)
    return Increase(value, (value, value))


def sensitivity(model: Any) -> Sensitivity:
    grids = {
        "encoder": Grid(("magnitude", "global_magnitude", "feed_forward"), (0.4, 0.8), (32, 8)),
        "predictor": Grid(("magnitude", "global_magnitude"), (0.4, 0.8), (32, 8)),
        "joiner": Grid(("magnitude", "global_magnitude"), (0.4, 0.8), (32, 8)),
    }
    points = list(sweep(model, grids, rising))
    return Sensitivity(0.2, points, curves(points))


@pytest.mark.slow
def test_a_candidate_costs_what_the_compressed_model_does() -> None:
    model, told = transducer(), list[tuple[int, int]]()
    double = replace(CHUNKING, chunk=6)
    settings = [heard(), heard(double, 13, 0.01)]
    problem = problem_of(
        model,
        sensitivity(model),
        settings,
        [load_profile("edge45")],
        (0.4, 0.6),
        lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1] == sum(len(c) - 1 for c in problem.candidates.values())
    plan = solve(problem, Budget(0.05))
    made = quantised(pruned(model, plan.choices), plan.choices)
    at = [s.chunk_ms for s in problem.settings].index(plan.chunk_ms)
    whole = stored_weights(made, settings[at].chunking)
    for name, candidates in problem.candidates.items():
        wanted = plan.choices.get(name, Choice())
        (found,) = (c for c in candidates if c.choice == wanted)
        weights = [part for part in found.costs[at].parts if part.name != "cache"]
        assert {part.name: part.stored_bytes for part in weights} == whole[name].parts
        assert found.stored_bytes == whole[name].stored_bytes
        assert sum(p.read_bytes for p in weights) == pytest.approx(whole[name].read_bytes)
        assert found.costs[at].macs == whole[name].macs
    assert plan.stored_bytes == sum(held.stored_bytes for held in whole.values())
    first, second = (c.macs["fp32"] for c in problem.candidates["encoder"][0].costs)
    assert second > first, "a longer chunk computes more per call"
    calls = [s.calls_per_s["encoder"] for s in problem.settings]
    assert calls == pytest.approx([25 / 3, 13 / 3])


@pytest.mark.slow
def test_levels_between_the_measured_ones_are_planned_and_none_beyond() -> None:
    model = transducer()
    told = sensitivity(model)
    problem = problem_of(model, told, [heard()], [load_profile("mcu")], (0.3, 0.5, 0.7, 0.9))
    found = {c.choice.level for c in problem.candidates["joiner"] if c.choice.method == "magnitude"}
    assert found == {0.3, 0.5, 0.7}
    (law,) = (
        c for c in told.curves if (c.component, c.choice) == ("joiner", Choice("magnitude", 0.8, 8))
    )
    (planned,) = (
        c for c in problem.candidates["joiner"] if c.choice == Choice("magnitude", 0.5, 8)
    )
    assert planned.increase == law.at(0.5)
    dense = problem.candidates["encoder"][0]
    assert (dense.choice, dense.increase) == (Choice(), NO_INCREASE)
    outcome = problem.outcome(Pick(0, (0,) * len(problem.candidates)))
    assert outcome.ratio == 1.0 and outcome.mj_per_audio_s == problem.dense_mj
    with pytest.raises(InputError, match="no setting is given"):
        problem_of(model, told, [], [load_profile("mcu")])


def test_shares_of_one_threshold_prune_as_one_threshold_does() -> None:
    model = transducer()
    for level, shares in zip((0.2, 0.55), global_levels(model, (0.2, 0.55)), strict=True):
        choices = {name: Choice("global_magnitude", share) for name, share in shares.items()}
        ours = pruned(model, choices).state_dict()
        slow = MagnitudePruning(level, "global").apply(model, list(MODULES.values()))
        for name, tensor in slow.state_dict().items():
            assert torch.equal(ours[name], tensor), name
