"""A profile of a stream: energy by counts and bytes; what a sensor says stays apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import soundfile
import torch

import toy_streaming
from offramp.bench import stream_profile
from offramp.bench.stream_profile import ProfileOptions, run
from offramp.compress.components import stored_weights
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.meter import Measured, Reading
from offramp.energy.profiles import SHIPPED, load_profile
from offramp.errors import AudioError, ConfigError, InputError
from offramp.streaming import StreamingRecognizer
from thinned import thinned
from toy_streaming import RATE, babble


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("profile")
    toy_streaming.save(made / "m", factorised_blank=True, time_reduction=4)
    samples = torch.cat((babble(1.5), torch.zeros(4 * RATE), babble(0.5, 1)))
    soundfile.write(made / "a.flac", samples.numpy(), RATE)
    return made


@pytest.mark.parametrize(
    "stream",
    thinned({"greedy": StreamOptions(), "beam": StreamOptions(80.0, 2, (), 0.25)}, keep=["beam"]),
)
def test_energy_is_calls_times_what_they_move(folder: Path, stream: StreamOptions) -> None:
    """By the reference's formula, from counts and stored bytes, on the one tier of `mcu`'s SRAM."""
    report = run(str(folder / "m"), folder / "a.flac", ProfileOptions(("mcu",), stream))
    (energy,) = report.energies
    trace, model = report.trace, StreamingRecognizer.load(folder / "m").model
    weights = stored_weights(model)
    rows = {c.name: c for c in energy.components}
    calls = {
        "encoder": trace.enc_chunks,
        "predictor": trace.predictor_calls,
        "joiner": trace.joiner_calls,
        "blank_head": trace.joiner_calls + trace.joiner_blank_only,
    }
    profile = load_profile("mcu")
    sram = profile.tier("sram").read_pj_per_byte.value  # to write costs the same
    for name, count in calls.items():
        assert rows[name].calls_per_s == pytest.approx(count / trace.audio_s)
        if name != "predictor":  # which reads a row of its table per position
            moved = weights[name].read_bytes * count / trace.audio_s
            assert rows[name].weight_bytes_per_s == pytest.approx(moved)
        moved = rows[name].weight_bytes_per_s + rows[name].cache_bytes_per_s
        assert rows[name].memory_mj_per_audio_s == pytest.approx(moved * sram / 1e9)
        assert rows[name].mac_mj_per_audio_s == pytest.approx(
            rows[name].macs_per_s * profile.mac_pj["fp32"].value / 1e9
        )
    both = trace.kv_bytes_read + trace.kv_bytes_written
    assert rows["encoder"].cache_bytes_per_s == pytest.approx(both / trace.audio_s)
    assert sum(energy.share_percent.values()) == pytest.approx(100)
    assert trace.audio_s == 6.0 and trace.vad_active_s < 5.0
    assert report.chunk_ms == (stream.chunk_ms or 120.0)


def test_the_report_says_what_every_figure_is(folder: Path) -> None:
    seen: list[float] = []
    report = run(str(folder / "m"), folder / "a.flac", ProfileOptions(), tell=seen.append)
    assert seen[-1] == 6.0 and seen == sorted(seen)
    made = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(made["modelled"]) == list(SHIPPED)
    for name, energy in made["modelled"].items():
        assert energy["kind"] == "modelled" and energy["profile"]["name"] == name
        assert energy["label"].endswith("version 1; not measured")
    assert made["trace"] == asdict(report.trace)
    assert made["per_audio_s"]["enc_chunks"] == report.trace.enc_chunks / 6.0
    assert (made["measured"] is None) == (made["not_measured"] is not None)
    assert made["rtf"] == pytest.approx(made["seconds"] / 6.0) and made["rtf"] > 0
    assert made["latency_ms"]["first_partial_ms"] > 0


def test_a_sensor_s_word_stands_beside_and_in_no_sum(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter:
        @contextmanager
        def measure(self) -> Iterator[Reading]:
            reading = Reading()
            yield reading
            reading.measured = Measured(3.0, 1.0, ("rapl package-0",))

    plain = run(str(folder / "m"), folder / "a.flac", ProfileOptions(("edge45",)))
    monkeypatch.setattr(stream_profile, "cpu_meter", Meter)
    report = run(str(folder / "m"), folder / "a.flac", ProfileOptions(("edge45",)))
    assert report.energies == plain.energies
    made = report.to_dict()["measured"]
    assert made["kind"] == "measured" and made["joules_per_audio_s"] == 0.5
    assert report.to_dict()["not_measured"] is None


def test_silence_takes_no_energy(folder: Path) -> None:
    soundfile.write(folder / "silence.wav", torch.zeros(RATE).numpy(), RATE)
    report = run(str(folder / "m"), folder / "silence.wav", ProfileOptions(("edge45",)))
    assert report.trace.enc_chunks == 0 and report.latency.first_partial_ms is None
    (energy,) = report.energies
    # The predictor read the blank once, whatever came.
    assert [c.name for c in energy.components if c.mj_per_audio_s] == ["predictor"]


def test_bad_input_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="no hardware is named; give some of edge45"):
        ProfileOptions(())
    with pytest.raises(InputError, match="names a profile twice: mcu, mcu"):
        run("none", "a.wav", ProfileOptions(("mcu", "mcu")))
    with pytest.raises(ConfigError, match="no hardware profile 'phone'; allowed: edge45"):
        run("none", "a.wav", ProfileOptions(("phone",)))
    with pytest.raises(AudioError, match=r"none\.wav is missing"):
        run(str(folder / "m"), "none.wav", ProfileOptions())
