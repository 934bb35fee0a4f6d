"""The certified bound holds on fresh data, thresholds mean what they say, files are strict."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.decoding.calibration import Calibration, DevRun, calibrate, least_utterances
from offramp.decoding.early_exit_ctc import early_exit
from offramp.decoding.exit_policies import RULES, Agreement, Confidence, FrameEntropy, edit_distance
from offramp.errors import ConfigError, InputError
from toy_ctc import ToyTower, batch

EXITS = (2, 4, 6, 8)
Floats = NDArray[np.float64]


def world(n: int, seed: int) -> DevRun:
    """Utterances of unlike difficulty; scores that tell something of the errors, not all; now and
    then a deeper exit is the worse one."""
    draw = np.random.default_rng(seed)
    hardness, words = draw.random((n, 1)), draw.integers(3, 20, size=n)
    depth = np.array([[0.6, 0.35, 0.2, 0.12]])
    rates = np.clip(hardness * depth * 2 + 0.05 * draw.standard_normal((n, 4)), 0, 1)
    errors = draw.binomial(words[:, None], rates)
    scores = 1 - rates + 0.15 * draw.standard_normal((n, 4))
    return DevRun(EXITS, scores.tolist(), errors.tolist(), words.tolist(), [[1.0, 2, 3, 4]] * n)


def exits_taken(dev: DevRun, threshold: float | None) -> list[int]:
    """Index of the first exit whose score reaches the threshold, as a policy would have it."""
    last = len(dev.exits) - 1
    if threshold is None:
        return [last] * len(dev.words)
    return [next((i for i, s in enumerate(own[:-1]) if s >= threshold), last) for own in dev.scores]


def losses(dev: DevRun, threshold: float | None, cap: float) -> Floats:
    """By the definition, without the running maximum."""
    errors, rows = np.array(dev.errors), np.arange(len(dev.words))
    wrong = errors[rows, exits_taken(dev, threshold)] - errors[:, -1]
    excess: Floats = np.clip(wrong / np.maximum(dev.words, 1), 0.0, cap)
    return excess


# -- the guarantee -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "x", "cap"), [(40, 0.06, 1.0), (15, 0.1, 0.8), (150, 0.02, 0.5)])
def test_the_bound_holds_on_fresh_data(n: int, x: float, cap: float) -> None:
    """Over many development sets the excess error of an utterance that none of them saw is x at
    most on average; and it is not far below, so the threshold is not merely timid."""
    draws, fresh = 80, world(600, 999_999)
    risks = []
    for seed in range(draws):
        found = calibrate(world(n, seed), "confidence", x, cap)
        assert found.threshold is not None
        risks.append(losses(fresh, found.threshold, cap).mean())
    mean, error = float(np.mean(risks)), float(np.std(risks)) / math.sqrt(draws)
    assert mean <= x + 2 * error
    assert mean >= 0.3 * x


@pytest.mark.parametrize(("x", "allowed"), [(1 / 16, 0), (0.1, 0), (2 / 16, 1), (0.2, 2)])
def test_where_the_risk_is_known_the_bound_is_as_tight_as_can_be(x: float, allowed: int) -> None:
    """15 utterances, exit 2 loses 9 of 10 whole whatever its score, so a threshold t risks
    0.9 (1 - t). With k losses allowed the expected risk is (k + 1) / 16, and the mean loss alone,
    k / 15 at most x, would allow one too many at x = 0.1."""
    n, draws, risks, plain = 15, 400, [], []
    for seed in range(draws):
        draw = np.random.default_rng(seed)
        scores, lost = draw.random(n), draw.random(n) < 0.9
        dev = DevRun(
            (2, 4),
            [[s, 1.0] for s in scores.tolist()],
            [[7 * hit, 0] for hit in lost.tolist()],
            [7] * n,
            [[1.0, 2.0]] * n,
        )
        found = calibrate(dev, "confidence", x)
        assert found.threshold is not None
        risks.append(0.9 * (1 - max(found.threshold, 0.0)))
        worst_first = np.sort(scores[lost])[::-1]
        plain.append(0.9 * (1 - worst_first[int(x * n)]))
    error = np.std(risks) / math.sqrt(draws)
    assert np.mean(risks) == pytest.approx((allowed + 1) / 16, abs=4 * error)
    assert np.mean(risks) <= x + 2 * error
    if x == 0.1:
        assert np.mean(plain) > x + 3 * error


@pytest.mark.parametrize("x", [0.01, 0.05, 0.1, 0.15])
@pytest.mark.parametrize("cap", [0.2, 1.0])
def test_too_few_utterances_are_never_certified(x: float, cap: float) -> None:
    least = least_utterances(x, cap)
    assert cap / (least + 1) <= x
    assert least == 1 or cap / least > x
    for n in {1, least // 2, least - 1} - {0}:
        if n >= least:
            continue
        perfect = DevRun((2, 4), [[0.9, 0.9]] * n, [[0, 0]] * n, [5] * n, [[1.0, 2.0]] * n)
        found = calibrate(perfect, "confidence", x, cap)
        assert (found.threshold, found.bound, found.saving) == (None, None, 0.0)
        assert found.guarantee.startswith(f"cannot certify +{100 * x:.4g} % WER: {n} utterances")
        assert f"need {least}; nothing leaves early" in found.guarantee
        taken = found.policy((2, 4))
        tower = ToyTower()
        results = early_exit(tower, (2, 4), *batch([8, 9]), taken)
        assert [r.exit_layer for r in results] == [4, 4]
    enough = DevRun((2, 4), [[0.9, 0.9]] * least, [[0, 0]] * least, [5] * least, [[1, 2]] * least)
    found = calibrate(enough, "confidence", x, cap)
    assert found.bound == pytest.approx(cap / (least + 1))
    assert (found.mean_exit_layer, found.saving) == (2.0, 0.5)


# -- the choice --------------------------------------------------------------------------------


def slow_bound(dev: DevRun, threshold: float, thresholds: Sequence[float], cap: float) -> float:
    """The bound at a threshold: each loss is the largest at this or a more cautious threshold."""
    n = len(dev.words)
    cautious = [losses(dev, t, cap) for t in thresholds if t >= threshold]
    return float((np.max(cautious, axis=0).sum() + cap) / (n + 1))


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_cheapest_that_keeps_the_bound(seed: int) -> None:
    dev, x, cap = world(20, seed), 0.1, 1.0
    found = calibrate(dev, "confidence", x, cap)
    observed = sorted({s for own in dev.scores for s in own[:-1]})
    every = [math.nextafter(s, math.inf) for s in (-math.inf, *observed)]
    kept = [t for t in every if slow_bound(dev, t, every, cap) <= x]
    assert found.threshold == min(kept)
    assert found.bound == pytest.approx(slow_bound(dev, min(kept), every, cap))
    assert found.bound is not None
    assert losses(dev, found.threshold, cap).mean() <= found.bound <= x


def test_what_was_seen_is_reported() -> None:
    dev = world(60, 3)
    found = calibrate(dev, "confidence", 0.08)
    taken = exits_taken(dev, found.threshold)
    layers = [EXITS[e] for e in taken]
    excess = [(dev.errors[i][e] - dev.errors[i][-1]) / dev.words[i] for i, e in enumerate(taken)]
    assert len(set(layers)) > 1
    assert found.mean_exit_layer == pytest.approx(np.mean(layers))
    assert found.mean_excess == pytest.approx(np.mean(excess))
    assert found.saving == pytest.approx(1 - sum(e + 1 for e in taken) / (4 * 60))
    assert (found.utterances, found.exits) == (60, EXITS)


def test_more_tolerance_leaves_no_later() -> None:
    dev = world(100, 0)
    found = [calibrate(dev, "confidence", x) for x in (0.012, 0.03, 0.06, 0.1, 0.3)]
    savings = [f.saving for f in found]
    assert savings == sorted(savings)
    assert len(set(savings)) > 3


def test_exits_without_errors_let_everything_go_at_the_first() -> None:
    n = 50
    dev = DevRun(EXITS, world(n, 0).scores, [[1] * 4] * n, [9] * n, [[1.0, 2, 3, 4]] * n)
    found = calibrate(dev, "confidence", 0.05)
    assert exits_taken(dev, found.threshold) == [0] * n
    assert found.saving == 0.75


def test_an_early_exit_that_is_better_gives_no_credit() -> None:
    """One utterance lost as much as another won: the loss counts, the gain does not."""
    errors = [[0, 5]] * 10 + [[5, 0]] * 10
    dev = DevRun((2, 4), [[0.9, 0.9]] * 20, errors, [10] * 20, [[1.0, 2.0]] * 20)
    found = calibrate(dev, "confidence", 0.1)
    assert found.mean_exit_layer == 4.0
    assert calibrate(dev, "confidence", 0.3).mean_exit_layer == 2.0


def test_an_empty_reference_counts_as_one_word() -> None:
    dev = DevRun((2, 4), [[0.9, 0.9]] * 20, [[2, 0]] * 20, [0] * 20, [[1.0, 2.0]] * 20)
    found = calibrate(dev, "confidence", 0.9, cap=3.0)
    assert found.mean_exit_layer == 4.0
    assert calibrate(dev, "confidence", 2.5, cap=3.0).mean_excess == 2.0


@pytest.mark.parametrize("rule", RULES)
def test_the_policy_leaves_where_the_calibration_said(rule: str) -> None:
    """From a run that never leaves early to thresholds to a run that does."""
    tower, lengths = ToyTower(), list(range(12, 60))
    never = RULES[rule].at_score(math.inf)
    exits = (1, 2, 3, 4, 5, 6)
    full = early_exit(tower, exits, *batch(lengths), never)
    scores = [[t.score for t in r.trail if t.score is not None] for r in full]
    texts = [[t.hypothesis.tokens for t in r.trail] for r in full]
    errors = [[edit_distance(t, own[-1]) for t in own] for own in texts]
    words = [len(own[-1]) for own in texts]
    dev = DevRun(exits, scores, errors, words, [[float(e) for e in exits]] * len(lengths))
    for x in (0.1, 0.2, 0.3):
        found = calibrate(dev, rule, x)
        results = early_exit(tower, exits, *batch(lengths), found.policy(exits))
        layers = [r.exit_layer for r in results]
        assert layers == [exits[e] for e in exits_taken(dev, found.threshold)]
        assert np.mean(layers) == pytest.approx(found.mean_exit_layer)
    assert found.mean_exit_layer < 6


# -- words, files, errors ----------------------------------------------------------------------


def test_the_guarantee_says_what_it_is_and_is_not() -> None:
    found = calibrate(world(300, 0), "entropy", 0.05, cap=0.8)
    assert found.bound is not None
    for part in (
        "expected excess error of an utterance",
        f"at most {100 * found.bound:.4g} %",
        "+5 % allowed",
        "counts up to 80 %",
        "speech like the 300 development utterances",
        "each taken whole as the manifest cuts them",
        "not a bound for each utterance",
    ):
        assert part in found.guarantee


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("x", [0.001, 0.05])
def test_the_setting_is_what_the_rule_takes(rule: str, x: float) -> None:
    found = calibrate(world(100, 0), rule, x)
    assert (found.setting is None) == (found.threshold is None) == (x == 0.001)
    if found.setting is not None:
        by_hand = {"entropy": FrameEntropy, "confidence": Confidence, "agreement": Agreement}[rule]
        assert found.policy(EXITS) == by_hand(found.setting)


@pytest.mark.parametrize("x", [0.001, 0.05, 0.99])
def test_a_calibration_survives_its_file(tmp_path: Path, x: float) -> None:
    """Also where nothing is certified, and where everything leaves at once."""
    found = replace(calibrate(world(100, 0), "entropy", x), weights="ab12")
    found.save(tmp_path / "exits.json")
    assert Calibration.load(tmp_path / "exits.json") == found
    json.loads((tmp_path / "exits.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rule": "luck"}, "rule is 'luck'; allowed: confidence, entropy, agreement"),
        ({"exits": [4, 2]}, "ascending order"),
        ({"exits": ["2"]}, "exits is '2'"),
        ({"utterances": 0}, "utterances is 0"),
        ({"threshold": "high"}, "threshold is 'high'"),
        ({"threshold": None}, "both be given, or both be null"),
        ({"bound": 0.5}, "must not exceed max_wer_increase"),
        ({"cap": -1.0}, "cap is -1.0"),
        ({"cap": 0.05}, "cap is 5 % and max_wer_increase 5 %"),
        ({"weights": 7}, "weights is 7"),
        ({"saving": math.nan}, "saving is nan"),
        ({"threshhold": 1.0}, "Calibration has no setting threshhold"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    values = asdict(calibrate(world(100, 0), "entropy", 0.05)) | changes
    (tmp_path / "exits.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=match):
        Calibration.load(tmp_path / "exits.json")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ("{}", "lacks rule"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str | None, match: str) -> None:
    if content is not None:
        (tmp_path / "exits.json").write_text(content)
    with pytest.raises(ConfigError, match=match):
        Calibration.load(tmp_path / "exits.json")


def test_a_calibration_belongs_to_its_exits() -> None:
    found = calibrate(world(100, 0), "entropy", 0.05)
    with pytest.raises(ConfigError, match=r"for exits \(2, 4, 6, 8\) and the model has \(2, 4\)"):
        found.policy((2, 4))


def test_impossible_requests_are_refused() -> None:
    dev = world(20, 0)
    with pytest.raises(InputError, match="rule is 'luck'"):
        calibrate(dev, "luck", 0.05)
    for x, cap in ((0.0, 1.0), (math.nan, 1.0), (0.1, 0.0), (0.1, math.inf)):
        with pytest.raises(InputError, match="it must be greater than 0 and finite"):
            calibrate(dev, "entropy", x, cap)
    for x, cap in ((0.1, 0.1), (0.2, 0.1), (1.0, 1.0)):
        with pytest.raises(InputError, match="would hold for any exits: choose a larger cap") as no:
            calibrate(dev, "entropy", x, cap)
        assert "\n" not in str(no.value)
    with pytest.raises(InputError, match="is empty"):
        DevRun(EXITS, [], [], [], [])
    with pytest.raises(InputError, match=r"errors has shape \(20, 3\); 20 utterances at 4 exits"):
        replace(dev, errors=[[1, 2, 3]] * 20)
    with pytest.raises(InputError, match="costs of the last exit add up to 0"):
        replace(dev, costs=[[0.0] * 4] * 20)
    with pytest.raises(InputError, match="scores hold NaN"):
        replace(dev, scores=[[math.nan] * 4] * 20)
