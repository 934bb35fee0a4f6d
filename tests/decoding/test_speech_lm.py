"""Every draft of a Speech-LM writes what the slow reference writes, and is counted as it is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import toy_speech_lm
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.autoregressive import autoregress
from offramp.decoding.ctc import greedy
from offramp.decoding.guard import GuardOptions
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speech_lm import (
    BEAM_DRAFTS,
    DRAFTS,
    PartTimes,
    SpeechLMOptions,
    SpeechLMPlan,
    SpeechText,
    available_drafts,
)
from offramp.decoding.stopping import RowEnd, Stop
from offramp.decoding.tower_beam import TowerBeam, tower_beam
from offramp.errors import ConfigError, InputError, OfframpError
from offramp.models.speech_lm import SpeechLM
from offramp.models.speech_lm_checkpoint import SpeechLMCheckpoint
from offramp.results import DecoderCounts, DraftCounts
from thinned import thinned
from toy_speech_lm import EOS_ID, LENGTHS, V

WHOLE: dict[str, Any] = {"heads": HeadsConfig(), "ctc_exit": 3, "prompt": "w3 {audio} w4 w5"}


def checkpoint(**changes: Any) -> SpeechLMCheckpoint:
    """In float64, so that equality is no luck."""
    made = toy_speech_lm.varied(**WHOLE | changes)
    made.model.double()
    return made


@pytest.fixture(scope="module")
def toy() -> SpeechLMCheckpoint:
    return checkpoint()


def features(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor(lengths)


def decode(
    made: SpeechLMCheckpoint, inputs: tuple[Tensor, Tensor], **given: Any
) -> list[SpeechText]:
    options = SpeechLMOptions(**given)
    return SpeechLMPlan(made.model, made.tokenizer, options).decode(*inputs)[0]


def alone(inputs: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    x, lengths = inputs
    return x[row : row + 1, : lengths[row]], lengths[row : row + 1]


@torch.inference_mode()
def reference(model: SpeechLM, inputs: tuple[Tensor, Tensor], row: int) -> tuple[list[int], str]:
    """One utterance by itself, one token at a time: (tokens, why it ended)."""
    x, length = alone(inputs, row)
    heard = model.hear(x, length)
    (prefix,) = model.prefixes(heard)
    prompt = [model.first_token]
    end = RowEnd(Stop(int(heard.frames[0]) + 1, frozenset({EOS_ID})), None)
    chooser = Chooser(Sampling(), [prompt], [0], V, model.device)
    steps = list(autoregress(model.decoder, prompt, chooser, end, prefix))
    return [t for step in steps for t in step.tokens], str(end.reason)


BATCH = [61, 23, 40, 61, 12, 33, 50, 29]


@pytest.fixture(scope="module")
def references(toy: SpeechLMCheckpoint) -> list[tuple[list[int], str]]:
    found = [reference(toy.model, features(BATCH), row) for row in range(len(BATCH))]
    assert {reason for _, reason in found} == {"stop", "length"}, "or one is not looked at"
    return found


@pytest.mark.parametrize("draft", thinned([*DRAFTS, None], keep=("exit", "mtp", "ctc+mtp")))
def test_every_draft_writes_the_reference_alone_and_in_a_ragged_batch(
    toy: SpeechLMCheckpoint, references: list[tuple[list[int], str]], draft: Any
) -> None:
    inputs = features(BATCH)
    together = decode(toy, inputs, draft=draft)
    for row, (text, (tokens, reason)) in enumerate(zip(together, references, strict=True)):
        assert list(text.tokens) == [t for t in tokens if t != EOS_ID]
        assert (text.finish_reason, text.counts.tokens) == (reason, len(tokens))
        (single,) = decode(toy, alone(inputs, row), draft=draft)
        assert (single.tokens, single.counts.calls) == (text.tokens, text.counts.calls)


@pytest.mark.parametrize("draft", DRAFTS)
def test_calls_and_drafts_are_counted_as_they_are_run(
    toy: SpeechLMCheckpoint, draft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ran = toy.model.decoder, []
    run = decoder.run

    def counted(h: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        ran.append(stop)
        return run(h, start, stop, cache)

    monkeypatch.setattr(decoder, "run", counted)
    (made,) = decode(toy, alone(features(), 0), draft=draft)
    counts = made.counts
    assert counts.calls == ran.count(decoder.config.num_layers)
    assert (
        set(counts.sources)
        <= {
            "none": set(),
            "exit": {"exit"},
            "mtp": {"mtp"},
            "ctc": {"ctc"},
            "ctc+mtp": {"ctc", "mtp", "mtp+ctc"},
        }[draft]
    )
    assert (counts.drafted > 0) == (draft != "none") and counts.accepted <= counts.drafted
    assert counts.unverified == 0
    plain = decode(toy, alone(features(), 0), draft="none")[0].counts
    assert plain.calls == plain.tokens and counts.calls <= plain.calls


WAYS: list[dict[str, Any]] = [
    *({"draft": draft} for draft in DRAFTS),
    *({"draft": "mtp", "threshold": threshold} for threshold in (0.0, 0.02)),
    {"draft": "ctc+mtp", "guard": "stop", "guard_options": GuardOptions(2, min_odds=0.9)},
]


@pytest.mark.parametrize("given", WAYS, ids=str)
def test_every_token_is_a_calls_own_or_accepted_or_unverified(
    toy: SpeechLMCheckpoint, given: dict[str, Any]
) -> None:
    """A call's last token is its own, drafted or not; unverified ones are of lossy ways alone.
    So no draft costs more calls than plain decoding."""
    made = decode(toy, features(BATCH), **given)
    for counts in (text.counts for text in made):
        assert counts.tokens == counts.calls + counts.accepted + counts.unverified
        assert counts.unverified == 0 or "threshold" in given
    total = DecoderCounts.total(text.counts for text in made)
    assert total.tokens == total.calls + total.accepted + total.unverified


def test_a_batch_may_be_padded_on_the_left(toy: SpeechLMCheckpoint) -> None:
    x, lengths = features()
    left = torch.full_like(x, torch.nan)
    for row, real, n in zip(left, x, lengths.tolist(), strict=True):
        row[len(row) - n :] = real[:n]
    plan = SpeechLMPlan(toy.model, toy.tokenizer, SpeechLMOptions())
    assert plan.decode(left, lengths, "left")[0] == plan.decode(x, lengths)[0]


def test_a_whole_text_that_was_heard_rides_the_call_of_the_prompt(
    toy: SpeechLMCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = features()
    plain = decode(toy, inputs, draft="none")
    monkeypatch.setattr(SpeechLMPlan, "_said", lambda self, heard: [t.tokens for t in plain])
    for draft in ("ctc", "ctc+mtp"):
        for text, want in zip(decode(toy, inputs, draft=draft), plain, strict=True):
            assert (text.tokens, text.counts.calls) == (want.tokens, 1)
            # The last token is the call's own; a text that was cut leaves the rest of it.
            kept, behind = text.counts.tokens - 1, int(want.finish_reason == "length")
            assert text.counts.sources == {"ctc": DraftCounts(1, kept + behind, kept)}


@pytest.mark.parametrize("draft", [*BEAM_DRAFTS, None])
def test_a_beam_finds_the_same_with_every_draft_in_no_more_calls(
    toy: SpeechLMCheckpoint, draft: Any
) -> None:
    inputs = features()
    found = decode(toy, inputs, draft=draft, beam_size=3)
    model = toy.model
    with torch.inference_mode():
        heard = model.hear(*inputs)
        prefixes = model.prefixes(heard)
    for row, text in enumerate(found):
        most = int(heard.frames[row]) + 1
        beam = TowerBeam(most, frozenset({EOS_ID}), 3)
        (want,) = tower_beam(model.decoder, [model.first_token], beam, prefixes[row])
        assert text.tokens == tuple(t for t in want.tokens if t != EOS_ID)
        assert text.finish_reason == want.finish_reason
        assert text.counts.tokens == len(want.tokens) and text.counts.sources == {}
    plain = decode(toy, inputs, draft="none", beam_size=3)
    pairs = zip(found, plain, strict=True)
    assert all(a.counts.calls <= b.counts.calls for a, b in pairs)


def test_a_threshold_is_lossy_and_counts_what_nobody_verified(toy: SpeechLMCheckpoint) -> None:
    inputs = features()
    plain = decode(toy, inputs, draft="none")
    careful = decode(toy, inputs, draft="mtp", threshold=1.1)
    assert [t.tokens for t in careful] == [t.tokens for t in plain]
    assert sum(t.counts.unverified for t in careful) == 0
    hasty = decode(toy, inputs, draft="mtp", threshold=0.0)
    assert [t.tokens for t in hasty] != [t.tokens for t in plain]
    for text in hasty:
        assert text.counts.unverified == text.counts.tokens - text.counts.calls > 0
        assert text.counts.drafted == 0
    assert SpeechLMOptions("mtp", threshold=0.5).lossy and not SpeechLMOptions("mtp").lossy


def test_words_are_where_ctc_has_them_and_none_without_it(toy: SpeechLMCheckpoint) -> None:
    inputs = features()
    heard = toy.model.hear(*inputs)
    for row, made in enumerate(decode(toy, inputs)):
        assert made.spans is not None and len(made.spans) == len(made.parts) == len(made.tokens)
        assert [span.token for span in made.spans] == list(made.tokens)
        assert all(span.end <= heard.frames[row] for span in made.spans)
        assert made.text == " ".join(f"w{t}" for t in made.tokens if t > 1)
    without = checkpoint(ctc_exit=None)
    assert all(made.spans is None and made.flags == () for made in decode(without, inputs))


def test_a_guard_that_stops_cuts_the_text_where_one_that_flags_has_its_first_flag(
    toy: SpeechLMCheckpoint,
) -> None:
    inputs, strict = features(), GuardOptions(max_unheard=2, min_odds=0.9)
    for draft in DRAFTS:
        flagged = decode(toy, inputs, draft=draft, guard_options=strict)
        stopped = decode(toy, inputs, draft=draft, guard="stop", guard_options=strict)
        assert any(text.flags for text in flagged), "or nothing is shown"
        for whole, cut in zip(flagged, stopped, strict=True):
            n = len(cut.tokens)
            assert cut.tokens == whole.tokens[:n]
            if whole.flags:
                assert (cut.flags[0].start, n) == (whole.flags[0].start, cut.flags[0].stop)
                assert cut.finish_reason == "stop"
            else:
                assert (n, cut.flags) == (len(whole.tokens), ())


def test_a_short_context_cuts_the_text_and_says_so(toy: SpeechLMCheckpoint) -> None:
    tight = checkpoint(decoder={"max_positions": 14})
    x, lengths = features([40])
    room = tight.model.room(40)
    assert 0 < room < int(tight.model.hear(x, lengths).frames[0]) + 1
    (text,) = decode(tight, (x, lengths), draft="ctc+mtp")
    (whole,) = decode(toy, (x, lengths), draft="none")
    assert (text.counts.tokens, text.finish_reason) == (room, "length")
    assert text.tokens == whole.tokens[:room]
    with pytest.raises(InputError, match="and the decoder has 14; cut it"):
        decode(tight, features([400]))


def test_ctc_alone_drafts_what_it_wrote(toy: SpeechLMCheckpoint) -> None:
    x, lengths = features()
    heard = toy.model.hear(x, lengths)
    said = greedy(heard.ctc_log_probs, heard.frames, V)
    first = [min(len(s.tokens) + 1, int(n)) for s, n in zip(said, heard.frames, strict=True)]
    made = decode(toy, (x, lengths), draft="ctc")
    drafted = [text.counts.sources["ctc"].drafted for text in made]
    assert all(a >= b > 0 for a, b in zip(drafted, first, strict=True))


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "drafts", "default", "of_beam"),
    [
        ({}, {"ctc+mtp", "ctc", "mtp", "exit", "none"}, "ctc+mtp", "ctc"),
        ({"heads": None}, {"ctc", "exit", "none"}, "ctc", "ctc"),
        ({"ctc_exit": None}, {"mtp", "exit", "none"}, "mtp", "mtp"),
        ({"heads": None, "ctc_exit": None}, {"exit", "none"}, "none", "none"),
        ({"decoder": {"num_layers": 1}, "heads": None}, {"ctc", "none"}, "ctc", "ctc"),
    ],
)
def test_the_drafts_that_a_checkpoint_has(
    changes: dict[str, Any], drafts: set[str], default: str, of_beam: str
) -> None:
    made = toy_speech_lm.checkpoint(**WHOLE | changes)
    assert set(available_drafts(made.model)) == drafts
    for options, chosen in ((SpeechLMOptions(), default), (SpeechLMOptions(beam_size=2), of_beam)):
        assert SpeechLMPlan(made.model, made.tokenizer, options).draft == chosen
    for draft in set(DRAFTS) - drafts:
        with pytest.raises(InputError, match=r"this Speech-LM has none; its|must lie between"):
            SpeechLMPlan(made.model, made.tokenizer, SpeechLMOptions(draft))


def test_a_guard_needs_ctc() -> None:
    made = toy_speech_lm.checkpoint(**WHOLE | {"ctc_exit": None})
    for guard in ("flag", "stop"):
        with pytest.raises(InputError, match=f"guard '{guard}' needs a CTC exit"):
            SpeechLMPlan(made.model, made.tokenizer, SpeechLMOptions(guard=guard))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft": "ngram"}, r"draft is 'ngram'; allowed: ctc\+mtp, ctc, mtp, exit, none"),
        ({"guard": "off"}, "guard is 'off'; allowed: flag, stop"),
        ({"threshold": 0.5}, "threshold 0.5 is for draft 'mtp'"),
        ({"draft": "ctc+mtp", "threshold": 0.5}, "threshold 0.5 is for draft 'mtp'"),
        ({"draft": "mtp", "threshold": -0.1}, "threshold is -0.1; it must be a number of at least"),
        ({"draft": "mtp", "threshold": float("nan")}, "threshold is nan"),
        ({"draft": "mtp", "threshold": 0.5, "beam_size": 2}, "beam_size and threshold exclude"),
        ({"guard": "stop", "beam_size": 2}, "beam_size and guard 'stop' exclude"),
        ({"draft": "exit", "beam_size": 2}, "draft 'exit' cannot draft for a beam"),
        ({"draft": "ctc+mtp", "beam_size": 2}, "choose one of ctc, mtp, none"),
        ({"beam_size": 0}, "beam_size is 0"),
        ({"exit_layer": 2}, "exit_layer 2 is for draft 'exit'"),
        ({"draft": "exit", "exit_layer": 0}, "exit_layer is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message) as caught:
        SpeechLMOptions(**given)
    assert isinstance(caught.value, OfframpError) and "\n" not in str(caught.value)


def test_an_exit_layer_that_is_not_below_the_top_is_refused(toy: SpeechLMCheckpoint) -> None:
    with pytest.raises(InputError, match="to draft it must lie between 1 and 4"):
        SpeechLMPlan(toy.model, toy.tokenizer, SpeechLMOptions("exit", exit_layer=5))


def test_times_are_of_each_part(toy: SpeechLMCheckpoint) -> None:
    plan = SpeechLMPlan(toy.model, toy.tokenizer, SpeechLMOptions())
    times = plan.decode(*features())[1]
    assert min(times.encoder_s, times.ctc_s, times.decoder_s) > 0
    assert times + PartTimes(1.0, 2.0, 3.0) == PartTimes(
        times.encoder_s + 1, times.ctc_s + 2, times.decoder_s + 3
    )
