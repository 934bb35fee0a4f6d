"""Transducer search: equal to slow searches, to itself in other chunks and batches, and counted."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

import toy_transducer
from offramp.decoding.ctc import Hypothesis, text, words
from offramp.decoding.lm import WordScorer, WordScorerOptions
from offramp.decoding.transducer import TransducerOptions, TransducerSearch
from offramp.decoding.transducer_state import SearchState
from offramp.errors import ConfigError, InputError
from toy_search import BLANK, Counted, TableJoiner, ToyJoiner, ToyPredictor, V, encoded

GREEDY = TransducerOptions()
BEAM = TransducerOptions(beam_size=4, n_best=4)
SEEDS = range(4)


def search(
    options: TransducerOptions = GREEDY, seed: int = 0, blank_bias: float = 0.0
) -> TransducerSearch:
    return TransducerSearch(ToyPredictor(seed), ToyJoiner(seed, blank_bias), BLANK, options)


def counted(options: TransducerOptions, seed: int = 0) -> tuple[TransducerSearch, Counted]:
    parts = Counted(ToyPredictor(seed), ToyJoiner(seed))
    return TransducerSearch(parts, parts, BLANK, options), parts


def read(by: TransducerSearch, enc: Tensor, chunks: tuple[int, ...] = ()) -> SearchState:
    """One stream; chunks: frames per step, over and over; (): all at once."""
    state, at = by.start(), 0
    sizes = itertools.cycle(chunks or (max(1, len(enc)),))
    while at < len(enc):
        piece = enc[at : at + next(sizes)]
        (state,) = by.step([state], piece[None], torch.tensor([len(piece)]))
        at += len(piece)
    return state


def same(ours: list[Hypothesis], theirs: list[Hypothesis]) -> None:
    assert [(h.tokens, h.frames) for h in ours] == [(h.tokens, h.frames) for h in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-9)
        assert a.confidences == pytest.approx(b.confidences, abs=1e-9)


# -- slow searches -----------------------------------------------------------------------------


def log_probs_after(by: TransducerSearch, frame: Tensor, tokens: tuple[int, ...]) -> list[float]:
    predictor, joiner = by._predictor, by._joiner
    assert isinstance(predictor, ToyPredictor)
    row: list[float] = joiner.log_probs(frame[None], predictor.after(tokens)[None])[0].tolist()
    return row


def slow_greedy(by: TransducerSearch, enc: Tensor, max_symbols: int) -> Hypothesis:
    found, score = [], 0.0
    for t, frame in enumerate(enc):
        for _ in range(max_symbols):
            row = log_probs_after(by, frame, tuple(token for token, _, _ in found))
            token = row.index(max(row))
            score += row[token]
            if token == BLANK:
                break
            found.append((token, t, math.exp(row[token])))
    tokens, frames, confidences = zip(*found, strict=True) if found else ((), (), ())
    return Hypothesis(tokens, frames, score, confidences)


def slow_beam(by: TransducerSearch, enc: Tensor, beam_size: int) -> list[Hypothesis]:
    """Every way on of every hypothesis, added up by tokens; the likelier alignment is kept."""
    beam = [Hypothesis((), (), 0.0, ())]
    for t, frame in enumerate(enc):
        ways: dict[tuple[int, ...], list[Hypothesis]] = defaultdict(list)
        for h in beam:
            for token, p in enumerate(log_probs_after(by, frame, h.tokens)):
                if token == BLANK:
                    way = Hypothesis(h.tokens, h.frames, h.score + p, h.confidences)
                else:
                    surely = (*h.confidences, math.exp(p))
                    way = Hypothesis((*h.tokens, token), (*h.frames, t), h.score + p, surely)
                ways[way.tokens].append(way)
        beam = []
        for tokens, group in ways.items():
            best = max(group, key=lambda h: h.score)
            total = math.log(sum(math.exp(h.score) for h in group))
            beam.append(Hypothesis(tokens, best.frames, total, best.confidences))
        beam = sorted(beam, key=lambda h: -h.score)[:beam_size]
    return beam


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_symbols", [1, 2, 5])
def test_greedy_equals_the_slow_search(max_symbols: int, seed: int) -> None:
    by = search(TransducerOptions(max_symbols=max_symbols), seed)
    want = slow_greedy(by, encoded(25, seed), max_symbols)
    assert len(want.tokens) > 2
    same(by.best(read(by, encoded(25, seed))), [want])


def test_more_symbols_may_share_a_frame() -> None:
    by = search(TransducerOptions(max_symbols=3), blank_bias=-1.0)
    (found,) = by.best(read(by, encoded(25)))
    most = max(found.frames.count(t) for t in found.frames)
    assert 1 < most <= 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beam_size", [1, 2, 4])
def test_the_beam_equals_the_slow_search(beam_size: int, seed: int) -> None:
    options = TransducerOptions(beam_size, beam_size, min_log_prob=-math.inf)
    by = search(options, seed)
    same(by.best(read(by, encoded(12, seed))), slow_beam(by, encoded(12, seed), beam_size))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wide_beam_adds_up_all_alignments(seed: int) -> None:
    """Of at most one token per frame, by walking through every one of them."""
    by = search(TransducerOptions(10_000, 10_000, min_log_prob=-math.inf), seed)
    enc, want = encoded(3, seed), defaultdict(float)
    for path in itertools.product(range(V), repeat=3):
        log_p, tokens = 0.0, ()
        for frame, move in zip(enc, path, strict=True):
            log_p += log_probs_after(by, frame, tokens)[move]
            tokens = tokens if move == BLANK else (*tokens, move)
        want[tokens] += math.exp(log_p)
    found = by.best(read(by, enc))
    assert {h.tokens: pytest.approx(math.exp(h.score)) for h in found} == want
    assert sum(math.exp(h.score) for h in found) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    one, greedy = search(TransducerOptions(beam_size=1), seed), search(GREEDY, seed)
    states = [read(by, encoded(40, seed)) for by in (one, greedy)]
    same(one.best(states[0]), greedy.best(states[1]))
    assert states[0].counts == states[1].counts


def test_the_most_probable_text_is_not_that_of_the_best_path() -> None:
    grid = torch.tensor([[0.4, 0.6], [0.4, 0.6]], dtype=torch.float64).log()
    found = {}
    for options in (GREEDY, TransducerOptions(beam_size=3, n_best=3)):
        by = TransducerSearch(ToyPredictor(), TableJoiner(), 1, options)
        found[options.beam_size] = by.best(read(by, grid))
    assert [h.tokens for h in found[None]] == [()]
    assert [h.tokens for h in found[3]] == [(0,), (), (0, 0)]
    assert [math.exp(h.score) for h in found[3]] == pytest.approx([0.48, 0.36, 0.16])


# -- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, TransducerOptions(max_symbols=3), BEAM])
@pytest.mark.parametrize("chunks", [(1,), (2,), (3, 1, 7), (29,)])
def test_chunks_change_nothing(options: TransducerOptions, chunks: tuple[int, ...]) -> None:
    by, enc = search(options), encoded(30)
    whole, streamed = read(by, enc), read(by, enc, chunks)
    assert by.best(streamed) == by.best(whole), "to the last bit"
    assert streamed.counts == whole.counts


@pytest.mark.parametrize("options", [GREEDY, TransducerOptions(max_symbols=3), BEAM])
def test_a_ragged_batch_equals_its_streams_alone(options: TransducerOptions) -> None:
    by, lengths = search(options), [11, 0, 30, 17]
    alone = [read(by, encoded(n, seed)) for seed, n in enumerate(lengths)]
    states, at = [by.start() for _ in lengths], 0
    for size in (4, 1, 10, 15):
        batch = torch.full((len(lengths), size, encoded(1).shape[1]), math.nan).double()
        here = [max(0, min(size, n - at)) for n in lengths]
        for seed, n in enumerate(here):
            batch[seed, :n] = encoded(lengths[seed], seed)[at : at + n]
        states, at = by.step(states, batch, torch.tensor(here)), at + size
    for together, apart in zip(states, alone, strict=True):
        same(by.best(together), by.best(apart))
        assert together.counts == apart.counts


def test_a_state_is_a_value() -> None:
    """It can be kept and gone on from twice; streams of different ages share a batch."""
    by, enc, one = search(BEAM), encoded(20), torch.tensor([10])
    (early,) = by.step([by.start()], enc[None, :10], one)
    before = (by.best(early), asdict(early.counts))
    late = [by.step([early], enc[None, 10:], one)[0] for _ in range(2)]
    assert (by.best(early), asdict(early.counts)) == before
    assert by.best(late[0]) == by.best(late[1]) == by.best(read(by, enc))
    both = by.step([early, by.start()], torch.stack((enc[10:], enc[:10])), torch.tensor([10, 10]))
    same(by.best(both[0]), by.best(late[0]))
    same(by.best(both[1]), by.best(early))


def test_no_frames_are_an_empty_text() -> None:
    by = search(BEAM)
    (state,) = by.step([by.start()], torch.zeros(1, 0, 6), torch.tensor([0]))
    assert by.best(state) == [Hypothesis((), (), 0.0, ())]
    assert by.step([], torch.zeros(0, 3, 6), torch.zeros(0, dtype=torch.long)) == []


def test_the_next_utterance_starts_empty_and_later() -> None:
    by, enc = search(), encoded(20)
    first = read(by, enc)
    second = by.restart(first)
    assert (second.utterance_frames, second.silent_frames) == (0, 0)
    (second,) = by.step([second], enc[None], torch.tensor([20]))
    (a,), (b,) = by.best(first), by.best(second)
    assert (b.tokens, b.frames) == (a.tokens, tuple(t + 20 for t in a.frames))
    assert second.counts.frames == 40
    assert second.counts.symbols == 2 * len(a.tokens)
    assert second.counts.predictor_calls == 1 + second.counts.symbols
    assert second.silent_frames == 40 - b.frames[-1] - 1
    assert second.utterance_frames == 20


def test_silence_leaves_nothing_behind() -> None:
    """A minute at 25 frames a second; the other hypotheses of the beam hold a token or two."""
    grid = torch.full((1_500, V), math.log(1e-9))
    grid[:, BLANK] = math.log1p(-4e-9)
    by = TransducerSearch(ToyPredictor(), TableJoiner(), BLANK, BEAM)
    state = read(by, grid, (8,))
    assert by.best(state)[0].tokens == ()
    assert state.silent_frames == state.utterance_frames == 1_500
    assert all(len(h.tokens) <= 2 for h in state.hypotheses)


# -- counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(1,), (4,), ()])
@pytest.mark.parametrize("max_symbols", [1, 3])
def test_greedy_runs_the_predictor_once_per_token(
    max_symbols: int, chunks: tuple[int, ...]
) -> None:
    by, parts = counted(TransducerOptions(max_symbols=max_symbols))
    state = read(by, encoded(30), chunks)
    (found,) = by.best(state)
    assert [token for (token,) in parts.steps] == [BLANK, *found.tokens]
    assert state.counts.predictor_calls == len(parts.steps) == 1 + state.counts.symbols
    assert state.counts.joiner_calls == state.counts.joiner_positions == len(parts.joins)
    assert state.counts.frames == 30
    assert parts.blanks == []
    if max_symbols == 1:
        assert len(parts.joins) == 30


@pytest.mark.parametrize("chunks", [(1,), (4,), ()])
def test_a_beam_runs_the_predictor_once_per_token_that_stays(chunks: tuple[int, ...]) -> None:
    by, parts = counted(BEAM)
    state = read(by, encoded(30), chunks)
    assert state.counts.predictor_calls == len(parts.steps)
    assert state.counts.predictor_positions == sum(map(len, parts.steps))
    assert state.counts.joiner_calls == len(parts.joins) == 30
    assert state.counts.joiner_positions == sum(parts.joins) > 60
    stayed = {h.tokens[:n] for h in state.hypotheses for n in range(1, 1 + len(h.tokens))}
    assert state.counts.symbols >= len(stayed), "those that left ran too"


@pytest.mark.parametrize("options", [GREEDY, BEAM])
def test_streams_of_a_batch_share_calls(options: TransducerOptions) -> None:
    """Each counts what it would have cost alone."""
    by, parts = counted(options)
    states = [by.start() for _ in range(3)]
    start = len(parts.steps)
    enc = torch.stack([encoded(10, seed) for seed in range(3)])
    states = by.step(states, enc, torch.tensor([10, 10, 10]))
    assert len(parts.joins) == 10
    assert sum(parts.joins) == sum(s.counts.joiner_positions for s in states)
    assert sum(map(len, parts.steps[start:])) == sum(s.counts.symbols for s in states)
    assert len(parts.steps[start:]) <= 10
    assert [s.counts.joiner_calls for s in states] == [10] * 3


# -- skipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_sure_blank_spares_the_labels(seed: int, threshold: float) -> None:
    """From 0.5 on no label can be likelier, so greedy search writes and scores the same."""
    by, parts = counted(TransducerOptions(blank_skip=threshold), seed)
    state, plain = read(by, encoded(40, seed)), search(seed=seed)
    same(by.best(state), plain.best(read(plain, encoded(40, seed))))
    counts = state.counts
    assert counts.joiner_calls == counts.joiner_positions == len(parts.joins)
    assert len(parts.blanks) == 40 == counts.joiner_calls + counts.joiner_blank_only
    assert counts.joiner_blank_only == counts.blank_only_positions > 0
    assert counts.joiner_calls >= counts.symbols > 0


def test_a_beam_scores_the_labels_of_those_that_are_not_sure() -> None:
    by, parts = counted(TransducerOptions(beam_size=4, blank_skip=0.6))
    counts = read(by, encoded(40)).counts
    assert counts.joiner_calls == len(parts.joins)
    assert counts.joiner_positions == sum(parts.joins)
    assert len(parts.blanks) == counts.joiner_calls + counts.joiner_blank_only == 40
    assert sum(parts.blanks) == counts.joiner_positions + counts.blank_only_positions
    assert min(counts.joiner_blank_only, counts.joiner_calls) > 0
    assert counts.blank_only_positions > counts.joiner_blank_only


@pytest.mark.parametrize("beam_size", [None, 4])
def test_skipping_no_blank_changes_nothing(beam_size: int | None) -> None:
    by = search(TransducerOptions(beam_size, blank_skip=1.0))
    plain = search(TransducerOptions(beam_size))
    same(by.best(read(by, encoded(30))), plain.best(read(plain, encoded(30))))


@pytest.mark.parametrize("beam_size", [None, 4])
def test_frames_that_ctc_calls_blank_are_as_good_as_absent(beam_size: int | None) -> None:
    by, parts = counted(TransducerOptions(beam_size, ctc_blank_skip=0.9))
    enc = encoded(30)
    posterior = torch.rand(30, generator=torch.Generator().manual_seed(0)) ** 0.3
    kept = (posterior < 0.9).nonzero()[:, 0]
    assert 5 < len(kept) < 25
    (state,) = by.step([by.start()], enc[None], torch.tensor([30]), posterior.log()[None])
    plain = search(TransducerOptions(beam_size))
    want = plain.best(read(plain, enc[kept]))
    (found,) = by.best(state)
    assert (found.tokens, found.score) == (want[0].tokens, pytest.approx(want[0].score))
    assert found.frames == tuple(kept[list(want[0].frames)].tolist())
    assert state.counts.frames == 30
    assert state.counts.skipped_frames == 30 - len(kept)
    assert state.counts.joiner_calls == len(parts.joins) == len(kept)


# -- hotwords ----------------------------------------------------------------------------------

PIECES = ["", " ca", "t", "r", " the", "s"]


def table(*frames: dict[str, float]) -> Tensor:
    """Log probabilities [T, V] of PIECES; what is not named is all but impossible."""
    grid = torch.full((len(frames), len(PIECES)), 1e-6, dtype=torch.float64)
    for row, frame in zip(grid, frames, strict=True):
        for piece, p in frame.items():
            row[PIECES.index(piece)] = p
    return (grid / grid.sum(-1, keepdim=True)).log()


def hot_search(beam_size: int | None, *hotwords: str, score: float = 4.0) -> TransducerSearch:
    scorer = WordScorer(PIECES, hotwords=hotwords, options=WordScorerOptions(hotword_score=score))
    options = TransducerOptions(beam_size)
    return TransducerSearch(ToyPredictor(), TableJoiner(), 0, options, scorer if hotwords else None)


def heard(by: TransducerSearch, grid: Tensor) -> str:
    return text(by.best(read(by, grid))[0].tokens, PIECES)


@pytest.mark.parametrize("beam_size", [None, 4])
def test_a_hotword_is_heard_where_it_nearly_was(beam_size: int | None) -> None:
    grid = table({" ca": 0.9, "": 0.1}, {"": 1.0}, {"t": 0.3, "r": 0.6, "": 0.1}, {"": 1.0})
    assert heard(hot_search(beam_size), grid) == "car"
    assert heard(hot_search(beam_size, "cat"), grid) == "cat"
    assert heard(hot_search(beam_size, "the"), grid) == "car"


def test_greedy_hotwords_write_nothing_where_the_joiner_hears_nothing() -> None:
    grid = table({" ca": 0.4, "": 0.6}, {"t": 0.45, "": 0.55})
    assert heard(hot_search(None, "cat", score=50.0), grid) == ""
    plain, hot = (read(hot_search(None, *words), grid) for words in ((), ("cat",)))
    assert plain.counts == hot.counts


def test_greedy_is_not_bound_to_a_hotword_that_it_began() -> None:
    """4 nats stand by for "cat" after " ca"; a beam would take them back, and so go on with "t".

    Only the third that "t" itself adds counts here, and "r" is 3 nats likelier."""
    grid = table({" ca": 1.0}, {"t": 0.04, "r": 0.9, "": 0.06})
    assert heard(hot_search(None, "cat", score=6.0), grid) == "car"
    assert heard(hot_search(4, "cat", score=6.0), grid) == "cat"
    assert heard(hot_search(None, "cat", score=12.0), grid) == "cat"


@pytest.mark.parametrize("beam_size", [None, 4])
def test_a_score_is_that_of_audio_and_hotwords(beam_size: int | None) -> None:
    grid = table({" ca": 0.9, "": 0.1}, {"t": 0.6, "r": 0.3, "": 0.1}, {"": 0.5, "s": 0.1})
    for hotwords, extra in ((("cat",), 4.0), (("cab",), 0.0), (("cat", "the"), 4.0)):
        by = hot_search(beam_size, *hotwords)
        (found,) = by.best(read(by, grid))
        (plain,) = hot_search(beam_size).best(read(hot_search(beam_size), grid))
        assert (found.tokens, found.score) == (plain.tokens, pytest.approx(plain.score + extra))


def test_a_scorer_that_forbids_every_label_leaves_the_blank() -> None:
    class Mute(WordScorer):
        def extend(self, state: object, token: int) -> tuple[object, float]:  # type: ignore[override]
            return state, -math.inf

    for beam_size in (None, 3):
        options = TransducerOptions(beam_size)
        by = TransducerSearch(ToyPredictor(), TableJoiner(), 0, options, Mute(PIECES))
        (found,) = by.best(read(by, table({" ca": 0.9, "": 0.1})))
        assert (found.tokens, found.score) == ((), pytest.approx(math.log(0.1), abs=1e-4))


# -- results -----------------------------------------------------------------------------------


def test_tokens_and_words_have_times_and_confidences() -> None:
    by = hot_search(None)
    grid = table({"": 1.0}, {" ca": 0.9, "": 0.1}, {"t": 0.6, "": 0.4}, {"": 1.0}, {" the": 1.0})
    (found,) = by.best(read(by, grid))
    assert found.frames == (1, 2, 4)
    assert found.confidences == pytest.approx((0.9, 0.6, 1.0), abs=1e-4)
    cat, the = words(found, PIECES, frame_s=0.04)
    assert (cat.text, cat.start_s, cat.end_s) == ("cat", 0.04, pytest.approx(0.12))
    assert cat.confidence == pytest.approx(math.sqrt(0.54), abs=1e-4)
    assert (the.text, the.start_s) == ("the", 0.16)


def test_n_best_is_sorted_and_distinct() -> None:
    by = search(TransducerOptions(beam_size=6, n_best=4))
    found = by.best(read(by, encoded(20)))
    assert len({h.tokens for h in found}) == 4
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.parametrize("variant", ["published", "stateless", "all together"])
@pytest.mark.parametrize("options", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_a_real_model_streams_what_it_reads_at_once(
    options: TransducerOptions, variant: str
) -> None:
    model = toy_transducer.transducer(3, **toy_transducer.VARIANTS[variant])
    by = TransducerSearch(model.predictor, model.joiner, model.config.blank_id, options)
    features = torch.randn(1, 50, model.config.num_mels, generator=torch.Generator().manual_seed(0))
    whole, lengths = model.encoder(features, torch.tensor([50]))
    (want,) = by.step([by.start()], whole, lengths)
    state = by.start()
    with model.streaming(1) as stream:
        for at in range(0, 50, 7):
            out, lengths = model.encoder.push(features[:, at : at + 7], stream)
            (state,) = by.step([state], out, lengths)
        (state,) = by.step([state], *model.encoder.finish(stream))
    found, expected = by.best(state), by.best(want)
    assert len(expected[0].tokens) > 0
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert state.counts == want.counts


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"beam_size": 0}, ConfigError, "beam_size is 0"),
        ({"max_symbols": 0}, ConfigError, "max_symbols is 0"),
        ({"beam_size": 4, "max_symbols": 2}, ConfigError, "max_symbols is 2 with beam_size 4"),
        ({"n_best": 2}, ConfigError, "n_best is 2; it must be at most the beam size, 1"),
        ({"beam_size": 2, "n_best": 3}, ConfigError, "at most the beam size, 2"),
        ({"min_log_prob": 0.0}, InputError, r"min_log_prob is 0\.0"),
        ({"blank_skip": 0.0}, InputError, r"blank_skip is 0\.0; it must be greater than 0"),
        ({"ctc_blank_skip": math.nan}, InputError, "ctc_blank_skip is nan"),
    ],
)
def test_impossible_options_are_refused(
    settings: dict[str, float], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        TransducerOptions(**settings)  # type: ignore[arg-type]


def test_frames_that_do_not_fit_the_streams_are_refused() -> None:
    by = search()
    for shape, lengths in (((2, 3, 6), [3]), ((1, 3, 6), [4]), ((1, 3, 6), [-1]), ((3, 6), [3])):
        with pytest.raises(InputError, match=r"encoded has shape .*; 1 streams need"):
            by.step([by.start()], torch.zeros(shape), torch.tensor(lengths))


def test_skipping_by_ctc_needs_the_head_and_the_head_its_use() -> None:
    enc, length = encoded(3)[None], torch.tensor([3])
    with pytest.raises(InputError, match="ctc_blank_skip is None, and the CTC head's blank is giv"):
        search().step([search().start()], enc, length, torch.zeros(1, 3))
    by = search(TransducerOptions(ctc_blank_skip=0.9))
    with pytest.raises(InputError, match=r"ctc_blank_skip is 0\.9, .* blank is not given"):
        by.step([by.start()], enc, length)
    with pytest.raises(InputError, match=r"ctc_blank has shape \[1, 2\]; it must be \[1, 3\]"):
        by.step([by.start()], enc, length, torch.zeros(1, 2))


def test_blank_skipping_needs_a_blank_of_its_own() -> None:
    model = toy_transducer.transducer()
    options = TransducerOptions(blank_skip=0.9)
    by = TransducerSearch(model.predictor, model.joiner, model.config.blank_id, options)
    with pytest.raises(InputError, match="needs a model with factorised_blank"):
        by.step([by.start()], torch.zeros(1, 1, model.config.d_joint), torch.tensor([1]))
