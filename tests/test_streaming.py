"""A streaming recogniser: what its streams count, which folders it is loaded from, its options."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
from torch import nn

import toy_streaming
from offramp import api
from offramp.compress.checkpoint import save_compressed
from offramp.compress.quantize import WeightQuantization
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.errors import CheckpointError
from offramp.models.transducer_checkpoint import save_transducer
from offramp.stream_events import Event, Final
from offramp.streaming import StreamingRecognizer
from thinned import thinned
from toy_encoder import encoder as toy_ctc
from toy_streaming import GATE, OPTIONS, RATE, SPARSE, SPOKEN, finals, recognizer, timeless


@pytest.fixture(scope="module")
def toy() -> StreamingRecognizer:
    """Its frames last 40 ms."""
    return recognizer(factorised_blank=True, time_reduction=4)


# -- the trace ------------------------------------------------------------------------------------


class Witness:
    """Counts by hooks and wrappers what the parts of a model are asked."""

    def __init__(self, toy: StreamingRecognizer) -> None:
        model = toy.model
        self.chunks = self.rows = self.steps = self.stepped = 0
        self.joins: list[int] = []
        self.blanks: list[int] = []
        self.kept = 0
        self._hooks = [
            model.encoder.layers[0].register_forward_hook(self._layer),
            model.predictor.output_norm.register_forward_hook(self._step),
            model.joiner.tokens.register_forward_hook(self._join),
        ]
        if model.joiner.blank is not None:
            self._hooks.append(model.joiner.blank.register_forward_hook(self._blank))

    def _layer(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        h, cache = inputs[0], inputs[3]
        self.chunks += h.shape[1]
        self.rows += h.shape[1] * h.shape[2]
        self.kept += cache.keys.nbytes + cache.values.nbytes + cache.frames.nbytes

    def _step(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        self.steps += 1
        self.stepped += inputs[0].shape[:-1].numel()

    def _join(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        self.joins.append(len(inputs[0]))

    def _blank(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        self.blanks.append(len(inputs[0]))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@pytest.mark.parametrize(
    "options", thinned(OPTIONS, ("plain", "beam", "three tokens per frame", "blank skip"))
)
@pytest.mark.parametrize("kernel_size", thinned([0, 4], keep=[4]))
def test_the_trace_is_what_hooks_count(options: StreamOptions, kernel_size: int) -> None:
    toy = recognizer(factorised_blank=True, time_reduction=4, kernel_size=kernel_size)
    witness, stream = Witness(toy), toy.open(options)
    events = list(stream.read(SPARSE.split(1600)))
    witness.remove()
    trace, layers = stream.trace, toy.config.num_layers
    assert trace.audio_s == len(SPARSE) / RATE
    assert trace.enc_chunks == witness.chunks
    # Each chunk computes 3 rows of its own and 1 of right context; the last may be cut short.
    assert witness.rows == 4 * witness.chunks and trace.right_ctx_frames == witness.chunks
    assert 3 * witness.chunks - 3 * 3 < trace.enc_frames <= 3 * witness.chunks
    assert trace.kv_bytes_read == layers * witness.kept
    written = 2 * min(3, 4) + min(3, max(0, kernel_size - 1))  # rows of D float32
    assert trace.kv_bytes_written == layers * witness.chunks * written * 16 * 4
    assert (trace.predictor_calls, trace.predictor_positions) == (witness.steps, witness.stepped)
    assert (trace.joiner_calls, trace.joiner_positions) == (
        len(witness.joins),
        sum(witness.joins),
    )
    if options.blank_skip is None:
        assert trace.joiner_blank_only == 0 and witness.blanks == witness.joins
    else:
        assert trace.joiner_blank_only > 0
        assert len(witness.blanks) == trace.joiner_blank_only + trace.joiner_calls
        assert sum(witness.blanks) == trace.blank_only_positions + trace.joiner_positions
    again = trace.joiner_calls + trace.joiner_blank_only - trace.enc_frames
    assert again == 0 if options.max_symbols is None else 0 < again <= trace.tokens
    if options.beam_size is None:
        said = sum(len(e.text.replace(" ", "")) for e in events if isinstance(e, Final))
        assert trace.tokens == trace.predictor_calls - 1 and 0 < trace.tokens <= said
    silent = options.gate == GATE
    assert (trace.vad_active_s < 2.0) == silent
    assert all(count >= 0 for count in astuple(trace))


def test_no_predictor_call_is_repeated_at_chunk_edges(toy: StreamingRecognizer) -> None:
    counts = set()
    for chunk_ms in (40, 120, 200):
        stream = toy.open(StreamOptions(chunk_ms=chunk_ms, endpoint=None))
        list(stream.read([SPOKEN]))
        counts.add(stream.trace.predictor_calls - stream.trace.tokens)
        stream.trace.rates(blank_head=True)
    assert counts == {1}


# -- models and options ---------------------------------------------------------------------------


def test_a_folder_is_loaded_plain_or_compressed(tmp_path: Path) -> None:
    folder = toy_streaming.save(tmp_path / "m", factorised_blank=True)
    toy = StreamingRecognizer.load(folder)
    expected = list(toy.stream([SPOKEN]))
    assert timeless(list(api.stream(write(tmp_path), model=folder))) == timeless(expected)
    small = WeightQuantization(8, "int8").apply(toy.model)
    files = {"tokenizer.json": toy_streaming.tokenizer().to_json()}
    save_compressed(small, tmp_path / "small", files)
    eco = StreamingRecognizer.load(tmp_path / "small")
    assert eco.pieces == toy.pieces
    assert finals(list(eco.stream(SPOKEN.split(999)))) == eco.transcribe(SPOKEN) != ""


def test_a_checkpoint_says_how_its_streams_run_and_options_say_otherwise(tmp_path: Path) -> None:
    made = toy_streaming.model(factorised_blank=True)
    chunking = replace(made.config.chunking, chunk=5)
    made.config = replace(made.config, chunking=chunking, blank_skip=0.25)
    files = {"tokenizer.json": toy_streaming.tokenizer().to_json()}
    save_compressed(made, tmp_path / "m", files)
    loaded = StreamingRecognizer.load(tmp_path / "m")
    assert loaded.config == loaded.model.encoder.config == made.config
    plain = StreamingRecognizer(toy_streaming.model(factorised_blank=True), loaded.pieces)

    def run(toy: StreamingRecognizer, **options: Any) -> tuple[list[Event], int, int]:
        stream = toy.open(StreamOptions(endpoint=None, gate=None, **options))
        events = timeless(list(stream.read([SPOKEN[:8000]])))
        return events, stream.trace.joiner_blank_only, stream.trace.enc_chunks

    skipping, never = run(loaded), run(loaded, blank_skip=1.0)
    assert skipping == run(plain, blank_skip=0.25, chunk_ms=100.0)
    assert run(loaded, chunk_ms=60.0) == run(plain, blank_skip=0.25)
    assert never == run(plain, chunk_ms=100.0)
    assert skipping[1] > never[1] == 0


def write(folder: Path) -> Path:
    soundfile.write(folder / "a.wav", SPOKEN.numpy(), RATE, subtype="FLOAT")
    return folder / "a.wav"


def test_what_is_no_streaming_recogniser_is_refused(tmp_path: Path) -> None:
    folder = toy_streaming.save(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        StreamingRecognizer.load(folder)
    other = toy_streaming.tokenizer().to_json()
    save_transducer(toy_streaming.model(blank_id=4), folder, files={"tokenizer.json": other})
    with pytest.raises(CheckpointError, match=r"pieces, blank 0; config.json says at most 11, bl"):
        StreamingRecognizer.load(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of type 'llama', not 'offramp-transducer'"):
        StreamingRecognizer.load(folder)
    save_compressed(toy_ctc(), tmp_path / "ctc")
    with pytest.raises(CheckpointError, match="a compressed CTCEncoder, not a Transducer; give"):
        StreamingRecognizer.load(tmp_path / "ctc")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk_ms": 50.0}, "chunk_ms is 50; this model hears whole frames of 20 ms: give a mul"),
        ({"chunk_ms": 1.0}, "a multiple, such as 20"),
        ({"blank_skip": 0.5}, "blank_skip is 0.5, and this model scores the blank among the lab"),
        ({"hotwords": ("xylophone",)}, "hotword 'xylophone' cannot be recognised"),
        ({"hotwords": "do"}, "hotwords are 'do'; give a tuple of phrases"),
        ({"beam_size": 0}, "beam_size is 0"),
        ({"chunk_ms": 0}, "chunk_ms is 0"),
        ({"blank_skip": 1.5}, "blank_skip is 1.5; it must be greater than 0 and at most 1"),
        ({"max_symbols": 0}, "max_symbols is 0"),
        ({"max_symbols": 2, "beam_size": 3}, "max_symbols is 2 with beam_size 3; a beam writes"),
        ({"n_best": 4, "beam_size": 3}, "n_best is 4; it must be at most the beam size, 3"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], says: str) -> None:
    toy = recognizer()
    with pytest.raises(Exception, match=says) as caught:
        toy.open(StreamOptions(**options))
    assert type(caught.value).__module__ == "offramp.errors" and "\n" not in str(caught.value)


def test_hotwords_are_heard(toy: StreamingRecognizer) -> None:
    plain, hot = (
        finals(list(toy.stream([SPOKEN], StreamOptions(hotwords=words))))
        for words in ((), ("mi mi",))
    )
    assert hot.count("mi") > plain.count("mi")


@pytest.mark.parametrize(
    ("time_reduction", "most"),
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        (4, 1),
        pytest.param(8, 2, marks=pytest.mark.slow),
        (16, 4),
    ],
)
def test_longer_frames_may_have_more_tokens(time_reduction: int, most: int) -> None:
    """One for every 40 ms, 25 a second; a beam writes one per frame."""
    toy = recognizer(time_reduction=time_reduction)
    wanted = {None: most, 2: 1}
    for beam_size, symbols in wanted.items():
        plan = StreamPlan(toy.model, toy.pieces, StreamOptions(beam_size=beam_size))
        assert plan.search.options.max_symbols == symbols
    one, more, default = (
        toy.open(StreamOptions(max_symbols=symbols)) for symbols in (1, most, None)
    )
    texts = [finals(list(stream.read([SPOKEN]))) for stream in (one, more, default)]
    assert texts[2] == texts[1] and (texts[0] == texts[1]) == (most == 1)
    assert one.trace.joiner_calls == one.trace.enc_frames
    assert default.trace == more.trace
    if most > 1:
        assert (
            one.trace.joiner_calls
            < more.trace.joiner_calls
            <= (more.trace.enc_frames + more.trace.tokens)
        )


def test_a_beam_tells_what_else_was_perhaps_said(toy: StreamingRecognizer) -> None:
    """Texts, not spellings, each once; the best one as without."""
    plain, wide = (list(toy.stream([SPOKEN], StreamOptions(beam_size=6, n_best=n))) for n in (1, 6))
    assert finals(plain) == finals(wide)
    (only,), (final,) = ([e for e in events if isinstance(e, Final)] for events in (plain, wide))
    assert only.alternatives == ()
    texts = [final.text, *(other.text for other in final.alternatives)]
    assert 3 < len(texts) == len(set(texts)) <= 6
    scores = [0.0, *(other.score for other in final.alternatives)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("part", ["encoder.output_projection", "predictor.output", "joiner.tokens"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, part: str, compressed: bool
) -> None:
    made = toy_streaming.model()
    made.get_submodule(part).bias[1] = math.nan
    files = {"tokenizer.json": toy_streaming.tokenizer().to_json()}
    save = save_compressed if compressed else save_transducer
    save(made, tmp_path / "m", files=files)
    with pytest.raises(CheckpointError, match=rf"{part}\.bias holds numbers that are not finite"):
        StreamingRecognizer.load(tmp_path / "m")
