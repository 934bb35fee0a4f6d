"""A recording of an hour goes through in bounded memory, and every time in it is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import toy_speech

PERIOD_S = 5.12  # 160 windows of the detector: every repetition lies alike in them
SAID = "do mi mi"
PEAK_BYTES = 1.5e9

# The command line, and then the most memory that its process ever held.
COMMAND = """
import resource, sys
from offramp.cli import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def write_repeated(path: Path, repetitions: int) -> None:
    """`SAID` every `PERIOD_S` seconds, written piece by piece."""
    said = torch.zeros(round(PERIOD_S * 16_000))
    spoken = toy_speech.speak(SAID)
    said[: len(spoken)] = spoken
    pcm = (said * 32767).round().numpy().astype(np.int16)
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
        for _ in range(repetitions):
            file.write(pcm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_hour_in_bounded_memory_with_right_times(
    tmp_path: Path, recogniser_folder: Path
) -> None:
    repetitions = round(3600 / PERIOD_S)
    write_repeated(tmp_path / "hour.flac", repetitions)
    words = ["transcribe", str(tmp_path / "hour.flac"), "--model", str(recogniser_folder)]
    words += ["--detector", "energy", "--format", "json", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stderr) * unit < PEAK_BYTES
    assert made["audio_s"] == pytest.approx(repetitions * PERIOD_S)
    assert len(made["segments"]) == repetitions
    first = made["segments"][0]
    assert first["start_s"] < toy_speech.EDGE_S and first["text"] == SAID
    for n, segment in enumerate(made["segments"]):
        assert segment["text"] == SAID
        assert times(segment) == pytest.approx([t + n * PERIOD_S for t in times(first)], abs=1e-6)
    starts = [word["start_s"] for word in first["words"]]
    for i, start in enumerate(starts):
        word = toy_speech.EDGE_S + i * (toy_speech.TONE_S + toy_speech.PAUSE_S)
        assert word <= start <= word + toy_speech.TONE_S
    assert len(starts) == 3


def times(segment: dict) -> list[float]:
    of_words = [word[end] for word in segment["words"] for end in ("start_s", "end_s")]
    return [segment["start_s"], segment["end_s"], *of_words]
