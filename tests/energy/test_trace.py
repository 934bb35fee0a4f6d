"""A streaming trace adds up over utterances, gives rates, and survives its file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from offramp.energy.trace import CallRate, StreamTrace
from offramp.errors import ConfigError, DataError, InputError

# 10 s in chunks of 160 ms, 25 frames a second, at most one symbol per frame.
PLAIN = StreamTrace(
    audio_s=10.0,
    enc_chunks=62,
    enc_frames=248,
    right_ctx_frames=62,
    joiner_calls=248,
    joiner_positions=248,
    predictor_calls=35,
    predictor_positions=35,
    tokens=34,
    kv_bytes_read=6200,
    kv_bytes_written=620,
    vad_active_s=9.5,
)


def test_utterances_add_up() -> None:
    other = replace(PLAIN, audio_s=5.0, tokens=0, vad_active_s=0.0)
    both = sum([PLAIN, other], StreamTrace())
    assert (both.audio_s, both.tokens, both.enc_chunks, both.vad_active_s) == (15.0, 34, 124, 9.5)
    assert both == other + PLAIN
    assert PLAIN.enc_chunks == 62  # left as it was


def test_counts_per_second() -> None:
    per_s = PLAIN.per_s()
    assert (per_s["enc_chunks"], per_s["tokens"], per_s["vad_active_s"]) == (6.2, 3.4, 0.95)
    assert set(per_s) == set(asdict(PLAIN)) - {"audio_s"}
    with pytest.raises(InputError, match="the trace holds no audio; count over at least one"):
        StreamTrace().per_s()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"joiner_calls": 248 + 34},  # any number of symbols per frame
        {"joiner_calls": 100},  # frames that were skipped
        {"joiner_calls": 68, "joiner_blank_only": 180},
        {"tokens": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("blank_head", [False, True])
def test_rates_at_the_token_rate_of_the_trace_are_its_counts(
    changes: dict[str, Any], blank_head: bool
) -> None:
    trace = replace(PLAIN, **changes)
    if trace.joiner_blank_only and not blank_head:
        with pytest.raises(InputError, match="joiner_blank_only is 180, which needs a factorised"):
            trace.rates()
        return
    calls = {n: r.at(trace.tokens / 10) for n, r in trace.rates(blank_head).items()}
    counted = {
        "encoder": trace.enc_chunks / 10,
        "predictor": trace.predictor_calls / 10,
        "joiner": trace.joiner_calls / 10,
    }
    if blank_head:
        counted["blank_head"] = (trace.joiner_calls + trace.joiner_blank_only) / 10
    assert calls == pytest.approx(counted)


def test_what_follows_the_tokens() -> None:
    rates = PLAIN.rates()
    assert (rates["encoder"], rates["joiner"]) == (CallRate(6.2), CallRate(24.8, 0.0))
    assert rates["predictor"].per_s == 0
    many = replace(PLAIN, joiner_calls=248 + 34).rates()["joiner"]
    assert (many.per_s, many.per_token) == (24.8, pytest.approx(1.0))
    gated = replace(PLAIN, joiner_calls=68, joiner_blank_only=180).rates(blank_head=True)
    assert (gated["joiner"].per_s, gated["joiner"].per_token) == (0.0, pytest.approx(2.0))
    assert gated["blank_head"] == CallRate(24.8, 0.0)


def test_positions_of_a_beam() -> None:
    assert set(PLAIN.positions_per_call().values()) == {1.0}
    beam = replace(
        PLAIN,
        joiner_calls=50,
        joiner_positions=100,
        joiner_blank_only=200,
        blank_only_positions=650,
        predictor_calls=0,
        predictor_positions=0,
    )
    assert beam.positions_per_call(blank_head=True) == {
        "encoder": 1.0,
        "predictor": 0.0,
        "joiner": 2.0,
        "blank_head": 3.0,
    }
    with pytest.raises(InputError, match="joiner_blank_only is 200, which needs a factorised"):
        beam.positions_per_call()


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    PLAIN.save(path)
    assert StreamTrace.load(path) == PLAIN
    assert json.loads(path.read_text())["enc_chunks"] == 62


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": None}, "the trace lacks tokens; write it anew"),
        ({"beams": 3}, "StreamTrace has no setting beams"),
        ({"tokens": -1}, "tokens is -1; it must be a whole number of at least 0"),
        ({"tokens": 1.5}, "tokens is 1.5"),
        ({"audio_s": "10"}, "audio_s is '10'; it must be a number of at least 0"),
    ],
    ids=str,
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "trace.json"
    values = asdict(PLAIN) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(DataError, match=says) as caught:
        StreamTrace.load(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(DataError, match=r"cannot read .* No such file"):
        StreamTrace.load(path)
    for text, says in (("[1]", "is no JSON object"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            StreamTrace.load(path)
    with pytest.raises(ConfigError, match="vad_active_s is -1"):
        StreamTrace(vad_active_s=-1)
