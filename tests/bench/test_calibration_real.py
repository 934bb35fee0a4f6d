"""The certificate on real speech that the calibration did not see; what docs/results.md reports."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from offramp.bench.asr import dev_run
from offramp.data.corpora import data_root
from offramp.data.speech import normalized, speech_set
from offramp.decoding.calibration import DevRun, calibrate
from offramp.decoding.exit_policies import RULES
from offramp.recognizer import Recognizer

SETS = (
    "kathleen_arctic",
    "mini_librispeech_train_clean_5",
    "ljspeech_part_1",
    "vctk_p239",
    "common_voice_en_100",
)
ALLOWED, HALVES = 0.02, 100


def part(dev: DevRun, rows: Sequence[int]) -> DevRun:
    names = ("scores", "errors", "words", "costs")
    return replace(dev, **{name: [getattr(dev, name)[row] for row in rows] for name in names})


def excess(dev: DevRun, threshold: float) -> float:
    """Mean over utterances of the share of words lost by leaving early, as the bound counts it."""
    lost = []
    for scores, errors, words in zip(dev.scores, dev.errors, dev.words, strict=True):
        taken = next((i for i, s in enumerate(scores[:-1]) if s >= threshold), len(scores) - 1)
        lost.append(min(1.0, max(0, errors[taken] - errors[-1]) / max(1, words)))
    return statistics.fmean(lost)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_certificate_holds_on_the_other_half(rule: str) -> None:
    """Mean over random halves of five development sets, of asr-tiny."""
    if not all((data_root() / name).is_dir() for name in SETS):
        pytest.skip("needs the development sets of the data folder")
    utterances = [u for name in SETS for u in normalized(speech_set(name, "dev"))[0]]
    dev = dev_run(Recognizer.load("asr-tiny"), utterances, rule)
    draw, rows, unseen = random.Random(0), list(range(len(dev.words))), []
    for _ in range(HALVES):
        draw.shuffle(rows)
        found = calibrate(part(dev, rows[::2]), rule, ALLOWED)
        assert found.threshold is not None
        unseen.append(excess(part(dev, rows[1::2]), found.threshold))
    mean = statistics.fmean(unseen)
    print(f"{rule}: {100 * mean:.2f} % on the unseen half, {100 * ALLOWED:g} % certified")
    assert 0 < mean <= ALLOWED
