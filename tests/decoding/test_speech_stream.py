"""A stream writes what the whole recording gives, however it is cut, broken off or moved."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from offramp.audio.resampler import Resampler
from offramp.compress.quantize import WeightQuantization
from offramp.config import Chunking
from offramp.decoding.speech_stream import Stream
from offramp.decoding.stream_plan import StreamOptions
from offramp.errors import AudioError, CheckpointError, InputError
from offramp.stream_events import Endpoint, Event, Final, Latency, Partial
from offramp.streaming import StreamingRecognizer
from toy_streaming import (
    ENDPOINTS,
    GATE,
    OPTIONS,
    RATE,
    SPARSE,
    SPOKEN,
    babble,
    finals,
    recognizer,
    timeless,
)
from toy_transducer import CHUNKINGS, ENCODERS

pytestmark = pytest.mark.slow  # the default suite is to stay short


@pytest.fixture(scope="module")
def toy() -> StreamingRecognizer:
    """Its frames last 40 ms."""
    return recognizer(factorised_blank=True, time_reduction=4)


# -- streamed == one-shot -------------------------------------------------------------------------


@pytest.mark.parametrize("chunking", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("encoder", ["published", "all together"])
def test_every_chunk_size_writes_the_text_of_the_whole(encoder: str, chunking: Chunking) -> None:
    toy = recognizer(**ENCODERS[encoder], chunking=chunking)
    options, samples = StreamOptions(gate=GATE), SPARSE[:20_000]
    assert finals(list(toy.stream(samples.split(1600), options))) == toy.transcribe(
        samples, options
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [97, 1600, 10**6])
def test_every_block_size_gives_the_same_events(
    toy: StreamingRecognizer, options: StreamOptions, size: int
) -> None:
    """To the bit: text, times, confidences."""
    expected = list(toy.stream(SPARSE.split(800), options))
    assert timeless(list(toy.stream(SPARSE.split(size), options))) == timeless(expected)
    assert len(expected) > 3
    assert finals(expected) == toy.transcribe(SPARSE, options)


@pytest.mark.parametrize("chunk_ms", [40, 120, 320, 1000])
def test_one_model_serves_every_chunk_size(toy: StreamingRecognizer, chunk_ms: float) -> None:
    options = StreamOptions(chunk_ms=chunk_ms)
    stream = toy.open(options)
    events = list(stream.read(SPOKEN.split(500)))
    assert finals(events) == toy.transcribe(SPOKEN, options) != ""
    assert stream.trace.enc_chunks == math.ceil(37 / (chunk_ms / 40))


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates_are_resampled_in_the_stream(toy: StreamingRecognizer, rate: int) -> None:
    resampler = Resampler(rate)
    samples = babble(3.0)[:rate]
    whole = torch.cat((resampler.push(samples), resampler.finish()))
    for size in (333, rate):
        stream = toy.open(sample_rate=rate)
        assert finals(list(stream.read(samples.split(size)))) == toy.transcribe(whole) != ""
        assert stream.audio_s == 1.0


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 560, 719])
def test_recordings_of_a_frame_or_less(toy: StreamingRecognizer, samples: int) -> None:
    events = list(toy.stream([SPOKEN[:samples]]))
    assert finals(events) == toy.transcribe(SPOKEN[:samples])


def test_samples_may_be_arrays_of_floats_or_16_bits(toy: StreamingRecognizer) -> None:
    codes = (SPOKEN * 32768).round().clamp(-32768, 32767).to(torch.int16)
    expected = timeless(list(toy.stream([codes / 32768.0])))
    frozen = codes.numpy().copy()
    frozen.flags.writeable = False
    swapped = frozen.astype(">i2"), (codes / 32768.0).numpy().astype(">f4")
    floats = (codes / 32768.0).numpy(), (codes / 32768.0).double()
    for block in (codes, frozen, *floats, *swapped):
        assert timeless(list(toy.stream([block]))) == expected
    assert timeless(list(toy.stream([(codes, RATE)]))) == expected


# -- events ---------------------------------------------------------------------------------------


def test_partial_texts_grow_into_the_final_one(toy: StreamingRecognizer) -> None:
    *partials, final = toy.stream(SPOKEN.split(1600), StreamOptions(endpoint=None))
    assert isinstance(final, Final) and all(isinstance(p, Partial) for p in partials)
    texts = [p.text for p in partials]
    assert all(b.startswith(a) and a != b for a, b in itertools.pairwise(texts))
    assert final.text.startswith(texts[-1])


def test_words_have_the_times_of_their_frames_in_the_recording(toy: StreamingRecognizer) -> None:
    events = list(toy.stream(SPARSE.split(1600), StreamOptions(gate=GATE, endpoint=None)))
    first, second = (e for e in events if isinstance(e, Final))
    frame_s = 0.04
    for final in (first, second):
        assert final.text == " ".join(word.text for word in final.words)
        assert (final.start_s, final.end_s) == (final.words[0].start_s, final.words[-1].end_s)
        assert 0 < final.confidence <= 1
        for word in final.words:
            assert word.start_s / frame_s == pytest.approx(round(word.start_s / frame_s))
    early = 0.06 + 2 * frame_s  # what passes of the time before, in whole frames
    assert 0.25 - early <= first.start_s < first.end_s <= 0.95 + 0.3
    assert 1.75 - early <= second.start_s < second.end_s <= 2.35
    alone = list(toy.stream([SPARSE[25_600:]], StreamOptions(gate=GATE, endpoint=None)))
    assert second.text == alone[-1].text  # the encoder started anew
    ends = [e for e in events if isinstance(e, Endpoint)]
    assert [(e.rule, round(e.at_s, 2)) for e in ends] == [("silence", pytest.approx(1.25, abs=0.1))]


def test_endpoints_follow_their_final_text(toy: StreamingRecognizer) -> None:
    events = list(toy.stream(SPARSE.split(1600), StreamOptions(endpoint=ENDPOINTS, gate=None)))
    kinds = "".join(type(event).__name__[0] for event in events)
    assert kinds.count("E") >= 2 and "FE" in kinds
    assert kinds.replace("FE", "").count("E") == 0 and kinds.endswith(("F", "FE"))
    for final, end in itertools.pairwise(events):
        if isinstance(end, Endpoint):
            assert isinstance(final, Final) and end.at_s >= final.end_s
            assert end.rule in ("silence", "trailing_silence", "length")


def test_latency_is_the_audio_that_was_missing(
    toy: StreamingRecognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 3 frames of 40 ms, one frame of right context, 15 ms of window beyond it."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    options = StreamOptions(gate=None, endpoint=None)
    *partials, final = toy.stream(SPOKEN.split(1600), options)
    for partial in partials:
        last = round(partial.end_s / 0.04) - 1
        heard_s = (last // 3 * 3 + 3 + 1) * 0.04 + 0.015
        assert partial.latency_ms == pytest.approx(1000 * (heard_s - partial.end_s))
    assert final.latency_ms == pytest.approx(1000 * (1.5 - final.end_s))
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    slow = next(e for e in toy.stream(SPOKEN.split(1600), options))
    assert slow.latency_ms == pytest.approx(partials[0].latency_ms + 1000)


def test_a_resampler_s_delay_counts(
    toy: StreamingRecognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    options = StreamOptions(gate=None, endpoint=None)
    *partials, _ = toy.stream(SPOKEN[:16_000].split(1000), options, sample_rate=8_000)
    needed = [(round(p.end_s / 0.04 - 1) // 3 * 3 + 4) * 0.04 + 0.015 for p in partials]
    delays = [p.latency_ms / 1000 + p.end_s - n for p, n in zip(partials, needed, strict=True)]
    assert all(-1e-9 < delay < 0.15 for delay in delays) and max(delays) > 0.02


def test_latency_of_a_stream() -> None:
    words: tuple[Any, ...] = ()
    partials = [Partial("a", words, 1.0, 0.0, 0.0, float(ms)) for ms in (300, 100, 200, 900)]
    other = Final("a", words, 1.0, 0.0, 0.0, 5000.0)
    assert Latency.of([*partials, other]) == Latency(300.0, 250.0, 900.0)
    assert Latency.of(partials[:1]) == Latency(300.0, 300.0, 300.0)
    assert Latency.of([other]) == Latency(None, None, None)


# -- keeping a stream -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_stream_goes_on_elsewhere_as_if_nothing_had_happened(
    toy: StreamingRecognizer, options: StreamOptions
) -> None:
    """Saved after every block, in the midst of chunks, words, silence."""
    expected = toy.open(options)
    events = list(expected.read(SPARSE.split(1777)))
    moved, found = toy.open(options), list[Event]()
    for block in SPARSE.split(1777):
        found += moved.push(block)
        moved = toy.resume(moved.save(), options)
    found += moved.finish()
    assert timeless(found) == timeless(events)
    assert moved.trace == expected.trace
    assert moved.seconds > 0


def test_saving_changes_nothing_and_one_state_serves_twice(toy: StreamingRecognizer) -> None:
    stream = toy.open()
    stream.push(SPOKEN[:16_000])
    saved = stream.save()
    ends = [timeless(s.push(SPOKEN[16_000:]) + s.finish()) for s in (stream, toy.resume(saved))]
    assert (
        ends[0]
        == ends[1]
        == timeless((s := toy.resume(saved)).push(SPOKEN[16_000:])) + (timeless(s.finish()))
    )


def test_a_resampled_stream_goes_on_too(toy: StreamingRecognizer) -> None:
    expected = list(toy.stream(SPOKEN.split(4410), sample_rate=44_100))
    moved, found = toy.open(sample_rate=44_100), list[Event]()
    for block in SPOKEN.split(4410):
        found += moved.push(block)
        moved = toy.resume(moved.save())
    assert finals(found + moved.finish()) == finals(expected) != ""


def test_a_state_of_another_stream_is_refused(toy: StreamingRecognizer) -> None:
    stream = toy.open(StreamOptions(beam_size=2))
    stream.push(SPOKEN[:8000])
    saved = stream.save()
    with pytest.raises(InputError, match="opened with other options or for another model"):
        toy.resume(saved)
    with pytest.raises(InputError, match="opened with other options or for another model"):
        recognizer().resume(saved, StreamOptions(beam_size=2))
    stream.finish()
    with pytest.raises(InputError, match="the stream has ended, so there is nothing"):
        stream.save()


def test_a_state_of_other_weights_or_pieces_is_refused(toy: StreamingRecognizer) -> None:
    """Though their shapes are the same."""
    stream = toy.open()
    stream.push(SPOKEN[:8000])
    saved = stream.save()
    trained = copy.deepcopy(toy.model)
    trained.joiner.tokens.bias[0] += 1e-3
    others = (
        StreamingRecognizer(trained, toy.pieces),
        StreamingRecognizer(WeightQuantization(4).apply(toy.model), toy.pieces),
        StreamingRecognizer(toy.model, (*toy.pieces[:-1], "h")),
    )
    for other in others:
        with pytest.raises(InputError, match="opened with other options or for another model"):
            other.resume(saved)
    same = StreamingRecognizer(copy.deepcopy(toy.model), toy.pieces).resume(saved)
    assert timeless(same.finish()) == timeless(stream.finish())


def _dropped(saved: dict[str, Tensor]) -> None:
    del saved["search.predictor.0"]


def _uncounted(saved: dict[str, Tensor]) -> None:
    saved["counts"] -= 5


def _halved(saved: dict[str, Tensor]) -> None:
    saved["samples"] = saved["samples"][::2].clone()


def _renamed(saved: dict[str, Tensor]) -> None:
    saved["encoder.key"] = saved.pop("encoder.keys")


def _not_a_number(saved: dict[str, Tensor]) -> None:
    saved["encoder.keys"][0, 0, 0, 0] = math.nan


def _shaped(saved: dict[str, Tensor]) -> None:
    saved["search.scores"] = saved["search.scores"].flatten()


def _typed(saved: dict[str, Tensor]) -> None:
    saved["search.counts"] = saved["search.counts"].int()


DAMAGE = (_dropped, _uncounted, _halved, _renamed, _not_a_number, _shaped, _typed)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(
    toy: StreamingRecognizer, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    stream = toy.open()
    stream.push(SPOKEN[:8000])
    tensors = tensors_of(stream.save())
    damage(tensors)
    with pytest.raises(InputError, match="the saved stream is damaged; give what Stream"):
        toy.resume(bytes_of(tensors))


def test_a_state_of_another_version_is_refused(
    toy: StreamingRecognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, but not what this version looks for."""
    stream = toy.open()
    stream.push(SPOKEN[:8000])
    theirs = stream.tensors()
    del theirs["samples"]
    monkeypatch.setattr(stream, "tensors", lambda: theirs)
    with pytest.raises(InputError, match=r"of another version of offramp \(\w+\); go on with"):
        toy.resume(stream.save())


def test_what_is_no_state_is_refused(toy: StreamingRecognizer) -> None:
    stream = toy.open()
    stream.push(SPOKEN[:8000])
    saved = stream.save()
    for damaged in (saved[:100], b"", saved[:-4], b"x" * 1000, None):
        with pytest.raises(InputError, match="the saved stream cannot be read") as caught:
            toy.resume(damaged)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


# -- what breaks ----------------------------------------------------------------------------------


def test_a_stream_that_breaks_gives_its_final_text(toy: StreamingRecognizer) -> None:
    def broken() -> Iterator[Tensor]:
        yield from SPOKEN[:16_500].split(1600)
        raise ConnectionError("the line is dead")

    found = []
    with pytest.raises(ConnectionError, match="the line is dead"):
        for event in toy.stream(broken()):
            found.append(event)
    whole = list(toy.stream([SPOKEN[:16_500]]))
    assert timeless(found) == timeless(whole) and isinstance(found[-1], Final)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (torch.tensor([0.1, math.nan]), "the block at 1.00 s has samples that are NaN, infinite"),
        (torch.tensor([math.inf]), "the block at 1.00 s has samples that are NaN, infinite"),
        (torch.tensor([1e7]), r"beyond 1e\+06; push finite samples in \[-1, 1\]"),
        ([0.1, 0.2], "the block at 1.00 s is list; push a tensor or an array"),
        (None, "the block at 1.00 s is NoneType; push a tensor or an array"),
        (np.zeros(9, dtype=complex), "the block at 1.00 s is complex128; push a tensor or an"),
        (np.array(["a"]), "the block at 1.00 s is <U1; push a tensor or an array"),
        (np.zeros(9, dtype=np.longdouble), "at 1.00 s is float128; push a tensor or an array"),
        ((SPOKEN, 8_000), "at 1.00 s has a sample rate of 8000 Hz, the stream 16000 Hz; open"),
        (torch.zeros(2, 100), r"at 1.00 s is torch.float32 \[2, 100\]; push mono samples"),
        (np.zeros(100, dtype=np.int32), r"at 1.00 s is torch.int32 \[100\]; push mono samples"),
    ],
    ids=[
        *(
            "NaN",
            "infinite",
            "loud",
            "a list",
            "nothing",
            "complex",
            "text",
            "long",
            "another rate",
        ),
        *("stereo", "32 bits"),
    ],
)
def test_bad_samples_are_refused_by_name_and_nothing_is_lost(
    toy: StreamingRecognizer, block: Any, says: str
) -> None:
    found = []
    with pytest.raises(AudioError, match=says) as caught:
        for event in toy.stream([SPOKEN[:16_000], block, SPOKEN]):
            found.append(event)
    assert "\n" not in str(caught.value)
    assert timeless(found) == timeless(list(toy.stream([SPOKEN[:16_000]])))
    stream = toy.open()
    said = stream.push(SPOKEN[:16_000])
    with pytest.raises(AudioError):
        stream.push(*block) if isinstance(block, tuple) else stream.push(block)
    said += stream.push(SPOKEN[16_000:]) + stream.finish()  # as it was
    assert timeless(said) == timeless(list(toy.stream([SPOKEN])))


@pytest.mark.parametrize("size", [1600, 10**6])
def test_an_encoding_that_is_not_finite_ends_the_stream_with_its_text(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Also the texts of utterances that ended in the same push."""
    toy = recognizer(factorised_blank=True, time_reduction=4)
    options = StreamOptions(gate=None, endpoint=ENDPOINTS)
    samples = torch.cat((SPARSE, SPOKEN))
    whole = list(toy.stream(samples.split(800), options))
    encoder, heard = toy.model.encoder, 0

    def overflow(norm: nn.Module, _: Any, output: Tensor) -> Tensor:
        nonlocal heard
        heard += 1
        return output if heard < 24 else output * math.nan

    hook = encoder.output_norm.register_forward_hook(overflow)
    stream, found = toy.open(options), list[Event]()
    with pytest.raises(CheckpointError, match="the encoder's output is not finite: its weights"):
        for event in stream.read(samples.split(size)):
            found.append(event)
    hook.remove()
    said = [e.text for e in found if isinstance(e, Final)]
    assert len(said) > 2 and isinstance(found[-1], Final)
    expected = [e.text for e in whole if isinstance(e, Final)]
    assert said[:-1] == expected[: len(said) - 1] and expected[len(said) - 1].startswith(said[-1])
    assert stream.finish() == []
    with pytest.raises(InputError, match="the stream has ended"):
        stream.push(SPOKEN)
    for p in toy.model.encoder.output_norm.parameters():
        p.fill_(math.nan)
    with pytest.raises(CheckpointError, match="the encoder's output is not finite"):
        toy.transcribe(samples, options)


def test_what_was_not_given_out_comes_with_the_end(toy: StreamingRecognizer) -> None:
    """Whoever reads the events may be interrupted between any two."""
    options = StreamOptions(gate=None, endpoint=ENDPOINTS)
    whole = timeless(list(toy.stream([SPARSE], options)))
    stream = toy.open(options)
    events = stream.read([SPARSE])
    found = [next(events), next(events)]
    assert timeless(found + stream.finish()) == whole
    assert list(events) == []


def test_an_ended_stream_takes_no_more(toy: StreamingRecognizer) -> None:
    stream = toy.open()
    assert stream.finish() == stream.finish() == []
    with pytest.raises(InputError, match="the stream has ended; open another"):
        stream.push(SPOKEN)


def state_bytes(stream: Stream) -> int:
    return sum(tensor.nbytes for tensor in stream.tensors().values())


def test_silence_costs_nothing_and_writes_nothing(toy: StreamingRecognizer) -> None:
    stream = toy.open()
    stream.push(babble(0.5))
    sizes = []
    for second in range(20):
        events = stream.push(torch.zeros(RATE))
        if second > 6:
            assert events == []
            sizes.append(state_bytes(stream))
    assert len(set(sizes)) == 1
    trace = stream.trace
    assert trace.audio_s == 20.5 and 2.7 < trace.vad_active_s < 3.0
    assert trace.enc_frames == round(trace.vad_active_s / 0.04)
    # Later words are written, and in their own time.
    final = (stream.push(babble(1.0, 3)) + stream.finish())[-1]
    assert isinstance(final, Final) and 20.0 <= final.start_s < final.end_s <= 21.5


@pytest.mark.parametrize("db", [-math.inf, -60.0])
def test_ten_minutes_of_silence(toy: StreamingRecognizer, db: float) -> None:
    """Digital, and the steady noise of a room, of which the first seconds may be speech."""
    generator, stream, sizes = torch.Generator().manual_seed(0), toy.open(), []
    for second in range(600):
        events = stream.push(10 ** (db / 20) * torch.randn(RATE, generator=generator))
        if second > 10 or db < -100:
            assert events == []
            sizes.append(state_bytes(stream))
    assert max(sizes[20:]) == min(sizes[20:]) < 100_000
    assert stream.finish() == [] and stream.trace.vad_active_s < 10
