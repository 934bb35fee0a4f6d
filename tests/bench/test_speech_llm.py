"""The bench of Speech-LMs: figures that add up, and no claim that could not come out false."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import toy_speech
import toy_speech_lm
from commands import offramp
from offramp import terminal, terminal_speech_lm
from offramp.audio.io import read_audio
from offramp.bench import speech_llm
from offramp.bench.speech_llm import DATA, SpeechLLMOptions, ragged, run
from offramp.bench.speech_llm_exact import (
    Draws,
    GarbagePlan,
    SampledPlan,
    SamplingReport,
    Searched,
    SearchPlan,
    homogeneity,
)
from offramp.bench.speech_llm_peers import GREEDY, TransformersDecoder, gap
from offramp.bench.speech_llm_report import BEAM, GARBAGE, Figures, SpeechLLMReport
from offramp.bench.speech_lm_quality import Tally
from offramp.config_speech_lm import HeadsConfig
from offramp.data.manifest import Utterance
from offramp.decoding.speech_lm import PartTimes, SpeechLMOptions, SpeechText
from offramp.decoding.tower_beam import TextHypothesis
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.plots import plot_thresholds
from offramp.results import DecoderCounts
from offramp.speech_lm_recognizer import SpeechLMRecognizer

KEYS = {
    "suite",
    "utterances",
    "identical",
    "decoder_calls_per_utterance",
    "call_reduction",
    "decoder_speedup",
    "speedup_vs_transformers",
    "wer",
    "rtf_split",
    "details",
}
DRAFTS = ["none", "exit", "mtp", "ctc", "ctc+mtp"]
SAID = "do mi"


@pytest.fixture(scope="module")
def recognizer() -> SpeechLMRecognizer:
    made = toy_speech_lm.varied(0, 1.6, heads=HeadsConfig(), ctc_exit=3)
    return SpeechLMRecognizer(made)


@pytest.fixture(scope="module")
def heard(recognizer: SpeechLMRecognizer) -> tuple[torch.Tensor, torch.Tensor]:
    return recognizer.reader.inputs([toy_speech.speak(SAID)])


# -- figures of made-up runs ---------------------------------------------------------------------


def wrote(tokens: tuple[int, ...], calls: int, words: str = "") -> SpeechText:
    parts = (words,) if words else ()
    return SpeechText(tokens, parts, None, (), DecoderCounts(len(tokens) + 1, calls), "stop")


def tally(texts: list[SpeechText], decoder_s: float) -> Tally:
    return Tally(dict(enumerate(texts)), times=PartTimes(1.0, 0.5, decoder_s), audio_s=100.0)


def searched(score: float = -1.0, calls: int = 5, tokens: tuple[int, ...] = (7, 1)) -> Searched:
    return Searched(TextHypothesis(tokens, score, "stop"), "do", calls)


def figures(**changes: Any) -> Figures:
    """Two utterances: six and two words, of which plain decoding writes one wrong."""
    plain = [wrote((2, 3), 9, "do mi do mi do do"), wrote((4,), 3, "do mi")]
    fast = [
        replace(text, counts=DecoderCounts(3, calls))
        for text, calls in zip(plain, (2, 1), strict=True)
    ]
    bold = [wrote((2, 3), 1, "do"), wrote((4,), 1, "do mi")]
    found = {
        "draft": "mtp",
        "references": ("do mi do mi do mi", "do mi"),
        "left_out": 1,
        "alone": {
            "none": tally(plain, 8.0),
            "mtp": tally(fast, 2.0),
            GREEDY: tally(plain, 6.0),
        },
        "together": {
            "none": tally(plain, 4.0),
            "mtp": tally(fast, 2.0),
            "threshold_0.9": tally(fast, 1.0),
            "threshold_0.5": tally(bold, 1.0),
            GARBAGE: tally(plain, 9.0),
        },
        "searched": {
            "none": {0: searched(), 1: searched()},
            "mtp": {0: searched(calls=2), 1: searched(-1.0 + 1e-5, calls=1)},
        },
        "recognized": ("do", "mi"),
        "gaps": {GREEDY: [1e-6, 0.5]},
    }
    return Figures(**(found | changes))


def report(**changes: Any) -> SpeechLLMReport:
    made: dict[str, Any] = {
        "model": "toy",
        "draft": "mtp",
        "recognizer": "asr-toy",
        "threads": 1,
        "rounds": 3,
        "sets": {"a": figures(), "b": figures()},
        "sampling": SamplingReport(Draws(), ("a.wav",), {"mtp": [0.4, None]}),
        "refused": {"transformers_early_exit": "RuntimeError: cannot reshape [1, 0]"},
        "versions": {"torch": "2"},
    }
    return SpeechLLMReport(**(made | changes))


def test_the_figures_are_those_of_the_counts_and_times() -> None:
    made = figures()
    assert made.headline() == {
        "utterances": 2,
        "identical": {"none": True, "mtp": True},
        "decoder_calls_per_utterance": {"none": 6.0, "mtp": 1.5},
        "call_reduction": {"none": 1.0, "mtp": 4.0},
        "decoder_speedup": {"none": 1.0, "mtp": 4.0},
        "speedup_vs_transformers": 3.0,
        "wer": {"none": 1 / 8, "mtp": 1 / 8, "threshold_0.5": 5 / 8, "threshold_0.9": 1 / 8}
        | {BEAM: 6 / 8},
        "rtf_split": {"encoder": 0.01, "ctc": 0.005, "decoder": 0.02},
    }
    told = made.details()
    assert told["decoder_speedup_batch_8"] == {"none": 1.0, "mtp": 2.0}
    assert [
        (p["threshold"], p["decoder_calls_per_utterance"]) for p in told["threshold_curve"]
    ] == [
        (0.5, 1.0),
        (0.9, 1.5),
    ]
    assert told["garbage"] == {"decoder_calls_per_utterance": 6.0, "utterances_above_plain": 0}
    assert told["beam"]["mtp"]["decoder_calls_per_utterance"] == 1.5
    assert told["transformers"][GREEDY] == {
        "decoder_speedup_of_ours": 3.0,
        "decoder_speedup_of_ours_without_drafts": 0.75,
        "differing": 2,
        "differing_at_near_ties": 1,
        "largest_gap": 0.5,
    }
    assert told["recognizer"]["wer"] == 6 / 8
    assert told["recognizer"]["ours_minus_its"]["difference"] == -5 / 8


def test_sets_are_joined_by_utterance() -> None:
    """A set twice is the same rates over twice the utterances; one of two counts by its size."""
    one, both = figures(), Figures.joined([figures(), figures()])
    assert both.headline() == one.headline() | {"utterances": 4}
    assert both.words == 16 and both.left_out == 2 and len(both.gaps[GREEDY]) == 4
    assert both.beam_equal("mtp") and both.beam_calls("mtp") == one.beam_calls("mtp")
    slow = figures(alone=one.alone | {"mtp": replace(one.alone["mtp"], times=PartTimes(1, 0, 14))})
    mixed = Figures.joined([one, slow])
    assert mixed.decoder_speedup("mtp") == 16 / 16
    assert Figures.joined([one, other_text(one, "together")]).identical == {
        "none": True,
        "mtp": False,
    }


def other_text(made: Figures, where: str) -> Figures:
    """Where one text of draft `mtp` is not that of plain decoding."""
    told = dict(getattr(made, where))
    texts = dict(told["mtp"].written)
    texts[1] = replace(texts[1], tokens=(5,))
    return replace(made, **{where: told | {"mtp": replace(told["mtp"], written=texts)}})


LIES: dict[str, Callable[[Figures], Figures]] = {
    "a text alone": lambda made: other_text(made, "alone"),
    "a text in a batch": lambda made: other_text(made, "together"),
    "a round of its own": lambda made: replace(
        made, alone=made.alone | {"mtp": replace(made.alone["mtp"], unsteady={1})}
    ),
    "a text that was cut": lambda made: replace(
        made,
        together=made.together
        | {
            "mtp": Tally(
                {
                    r: replace(t, finish_reason="length")
                    for r, t in made.alone["mtp"].written.items()
                }
            )
        },
    ),
    "garbage that costs a call": lambda made: replace(
        made, together=made.together | {GARBAGE: tally([wrote((2, 3), 8), wrote((4,), 4)], 1.0)}
    ),
    "a beam's text": lambda made: replace(
        made, searched=made.searched | {"mtp": {0: searched(), 1: searched(tokens=(8, 1))}}
    ),
    "a beam's score": lambda made: replace(
        made, searched=made.searched | {"mtp": {0: searched(), 1: searched(-1.1)}}
    ),
    "a beam's calls": lambda made: replace(
        made, searched=made.searched | {"mtp": {0: searched(), 1: searched(calls=6)}}
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_is_not_equal_is_found_out(lie: Callable[[Figures], Figures]) -> None:
    assert figures().holds and report().overall.holds
    assert not report(sets={"a": figures(), "b": lie(figures())}).overall.holds


def test_the_table_says_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    for name in ("out", "err"):
        console = Console(file=shown, width=200, highlight=False)
        monkeypatch.setattr(terminal, name, console)
    terminal_speech_lm.show_speech_llm(report())
    text = shown.getvalue()
    assert "4.00 / 4.00" in text and "threshold_0.5" in text and "asr-toy" in text
    assert "every draft: yes" in text and "mtp equal, 1.5 calls" in text
    assert "least p 0.4\n" in text and "cannot reshape [1, 0]" in text
    assert "4 texts differing, 2 of them at a near-tie" in text
    assert "2 utterances left out" in text
    shown.truncate(0)
    wrong = SamplingReport(Draws(), ("a.wav",), {"mtp": [1e-6]})
    lies = other_text(figures(), "alone")
    terminal_speech_lm.show_speech_llm(report(sets={"a": lies}, sampling=wrong))
    assert "every draft: NO (mtp)" in shown.getvalue()
    assert "least p 1e-06 NOT THE SAME" in shown.getvalue()


@pytest.mark.parametrize("lies", [False, True])
def test_the_command_writes_all_of_it_and_fails_where_something_is_not_equal(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lies: bool,
) -> None:
    sets = {"a": figures(), "b": other_text(figures(), "together") if lies else figures()}
    made, given = report(sets=sets), []
    monkeypatch.setattr(speech_llm, "run", lambda *told: given.append(told) or made)
    words = ("bench", "speech-llm", "--data", "fsdd", "--limit", 7, "--rounds", 1)
    status, out, err = offramp(capsys, *words, "--json", tmp_path / "r.json")
    assert status == lies and "mtp" in out and err.count("\n") == 1
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(made.to_dict()))
    ((model, options, _),) = given
    assert (model, options) == (
        "speech-llm-tiny",
        SpeechLLMOptions(("fsdd",), limit=7, rounds=1),
    )


@pytest.mark.slow
def test_the_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_thresholds(report().sets, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_json_has_the_keys_of_the_issue() -> None:
    told = json.loads(json.dumps(report().to_dict()))
    assert set(told) == KEYS and told["suite"] == "speech-llm" and told["utterances"] == 4
    assert set(told["rtf_split"]) == {"encoder", "ctc", "decoder"}
    assert list(told["details"]["by_set"]) == ["a", "b"]
    for made in told["details"]["by_set"].values():
        assert KEYS - {"suite", "details"} <= set(made)


# -- chi-square ----------------------------------------------------------------------------------


def counts(**drawn: int) -> Counter[tuple[int, ...]]:
    return Counter({(ord(name),): n for name, n in drawn.items()})


def test_the_p_value_is_that_of_pearsons_test() -> None:
    """Of two cells: erfc(sqrt(x / 2)), x by the formula of a table of two rows and two columns."""
    a, b, c, d = 30, 70, 45, 55
    x = 200 * (a * d - b * c) ** 2 / ((a + b) * (c + d) * (a + c) * (b + d))
    found = homogeneity(counts(x=a, y=b), counts(x=c, y=d))
    assert found == pytest.approx(math.erfc(math.sqrt(x / 2)))
    # Three cells: exp(-x / 2).
    p, q = counts(x=20, y=30, z=50), counts(x=30, y=30, z=40)
    x = 2 * 5**2 / 25 + 2 * 5**2 / 45
    assert homogeneity(p, q) == pytest.approx(math.exp(-x / 2))
    assert homogeneity(p, p) == 1.0 and homogeneity(counts(x=50), counts(x=50)) is None
    rare = homogeneity(counts(x=95, r=2, s=3), counts(x=90, t=4, u=6))
    assert rare == pytest.approx(homogeneity(counts(x=95, y=5), counts(x=90, y=10)))


def test_sampling_is_exact_unless_chance_hardly_ever_gives_such_draws() -> None:
    many = {"mtp": [0.004, 0.5, None], "ctc": [0.9, 0.2, None]}
    assert SamplingReport(Draws(), ("a",), many).exact, "one of four tests"
    assert not SamplingReport(Draws(), ("a",), {"mtp": [0.004]}).exact
    assert SamplingReport(Draws(), ("a",), {"mtp": [None]}).exact


def test_draws_of_another_distribution_are_found_out(
    recognizer: SpeechLMRecognizer, heard: tuple[torch.Tensor, torch.Tensor]
) -> None:
    def drawn(draft: Any, temperature: float, first_row: int) -> Counter[tuple[int, ...]]:
        plan = SampledPlan(recognizer.model, recognizer.tokenizer, SpeechLMOptions(draft))
        return plan.beginnings(*heard, Draws(200, 2, temperature), first_row)

    plain = drawn("none", 0.3, 0)
    assert plain.total() == 200 and len(plain) > 1 and max(map(len, plain)) == 2
    assert drawn("ctc+mtp", 0.3, 0) == plain, "with the same noise drafts draw the very same"
    same, other = drawn("ctc+mtp", 0.3, 200), drawn("ctc+mtp", 3.0, 200)
    assert same != plain and (homogeneity(plain, same) or 0.0) > 0.001
    assert (homogeneity(plain, other) or 0.0) < 1e-6


# -- beams, garbage, transformers ----------------------------------------------------------------


def test_a_search_with_its_score_is_what_transcribe_searches(
    recognizer: SpeechLMRecognizer, heard: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for draft in ("none", "mtp", "ctc"):
        options = SpeechLMOptions(draft, beam_size=4)
        (text,), _ = recognizer.plan(options).decode(*heard)
        found = SearchPlan(recognizer, draft).search(*heard)
        assert (found.text, found.calls) == (text.text, text.counts.calls)
        assert found.found.finish_reason == text.finish_reason and found.found.score < 0


def test_garbage_is_drafted_at_every_call(
    recognizer: SpeechLMRecognizer, heard: tuple[torch.Tensor, torch.Tensor]
) -> None:
    plain = SpeechLMOptions("none")
    (want,), _ = recognizer.plan(plain).decode(*heard)
    (got,), _ = GarbagePlan(recognizer.model, recognizer.tokenizer, plain).decode(*heard)
    assert got.tokens == want.tokens and got.counts.calls <= want.counts.calls
    assert got.counts.drafted >= 3 * (got.counts.calls - 2) > 0
    assert got.counts.accepted < 0.2 * got.counts.drafted


def test_transformers_writes_what_we_write_of_the_same_embeddings(
    recognizer: SpeechLMRecognizer,
) -> None:
    samples = [toy_speech.speak(said) for said in ("do", "mi do mi")]
    peer = TransformersDecoder(recognizer)
    ways, refused = peer.ways(samples[1])
    assert set(ways) | set(refused) == {
        GREEDY,
        f"{GREEDY}_prompt_lookup",
        f"{GREEDY}_early_exit",
    }
    assert GREEDY in ways and all("Error: " in said for said in refused.values())
    ours, _ = recognizer.decode(samples, recognizer.plan(SpeechLMOptions("none")))
    for way in ways.values():
        theirs, times = way(samples)
        assert [(t.tokens, t.finish_reason, t.text) for t in theirs] == [
            (t.tokens, t.finish_reason, t.text) for t in ours
        ]
        assert times.decoder_s > 0 and times.encoder_s > 0


def test_the_gap_is_that_of_the_logits_where_texts_part(recognizer: SpeechLMRecognizer) -> None:
    samples, model = toy_speech.speak(SAID), recognizer.model
    (ours,), _ = recognizer.decode([samples], recognizer.plan(SpeechLMOptions("none")))
    assert gap(recognizer, samples, ours, ours) == 0.0
    L = model.config.decoder.num_layers
    with torch.inference_mode():
        heard = model.hear(*recognizer.reader.inputs([samples]))
        logits = model.decoder.logits(model.read(heard, [ours.tokens]), L)[0]
    other = (ours.tokens[1] + 1) % toy_speech_lm.V
    changed = replace(ours, tokens=(ours.tokens[0], other, 3))
    want = logits[1, ours.tokens[1]] - logits[1, other]
    assert gap(recognizer, samples, ours, changed) == pytest.approx(float(want), rel=1e-4)
    # Where one of them ends: the token that ends a text.
    cut = replace(ours, tokens=ours.tokens[:2], finish_reason="stop")
    want = logits[2, ours.tokens[2]] - logits[2, toy_speech_lm.EOS_ID]
    assert gap(recognizer, samples, cut, ours) == pytest.approx(float(want), rel=1e-4)


# -- what is decoded -----------------------------------------------------------------------------


def test_a_ragged_batch_has_short_and_long_utterances() -> None:
    def spoken(seconds: float) -> Utterance:
        return Utterance(Path("a.wav"), seconds, "s", "dev", "do")

    utterances = [spoken(1 + (7 * n) % 19) for n in range(19)]
    batches = ragged(utterances)
    assert sorted(row for batch in batches for row in batch) == list(range(19))
    assert len(batches) == 3 and max(map(len, batches)) <= 8
    for batch in batches:
        seconds = [utterances[row].seconds for row in batch]
        assert max(seconds) - min(seconds) >= 15
    assert ragged(utterances[:1]) == [[0]]


def test_the_sets_are_those_of_the_claim() -> None:
    assert {name: data.limit for name, data in SpeechLLMOptions().sets().items()} == DATA
    fewer = SpeechLLMOptions(limit=60).sets().values()
    assert [data.limit for data in fewer] == [60, 60, 50]
    assert {data.split for data in fewer} == {"dev"}
    named = SpeechLLMOptions(("mini_librispeech_train_clean_5", "a.tsv")).sets()
    assert [data.limit for data in named.values()] == [None, None]
    for wrong, error, message in (
        ({"data": ("nonsense",)}, InputError, "there is no set 'nonsense' with transcripts"),
        ({"data": ("picovoice_barista_slu",)}, InputError, "with transcripts; give a manifest"),
        ({"limit": 0}, ConfigError, "limit is 0"),
        ({"rounds": 0}, ConfigError, "rounds is 0"),
        ({"thresholds": (1.5,)}, ConfigError, "threshold is 1.5"),
    ):
        with pytest.raises(error, match=message):
            SpeechLLMOptions(**wrong)


def test_a_model_without_heads_has_no_curve(tmp_path: Path) -> None:
    toy_speech_lm.varied(0, 1.6, ctc_exit=3).save(tmp_path / "m")
    with pytest.raises(InputError, match="has no heads, and so no curve"):
        run(str(tmp_path / "m"), SpeechLLMOptions(curve=True))
    with pytest.raises(CheckpointError, match="'llama', not 'offramp-speech-lm'"):
        run("lm-tiny")


def test_all_ways_on_recordings(tmp_path: Path, recogniser_folder: Path) -> None:
    """Every figure is there, of every utterance; what counts can tell is what decoding told."""
    folder = tmp_path / "m"
    toy_speech_lm.varied(0, 3.0, heads=HeadsConfig(), ctc_exit=3).save(folder)
    manifest = toy_speech.write_corpus(tmp_path, ["do", "mi do"])
    passes: list[tuple[int, int]] = []
    options = SpeechLLMOptions(
        (str(manifest),),
        rounds=1,
        thresholds=(0.0, 0.9),
        draws=Draws(12, 2),
        recognizer=str(recogniser_folder),
    )
    made = run(str(folder), options, lambda *told: passes.append(told))
    assert passes == [(n, 9) for n in (1, 2, 4, 5, 6, 8, 9)], "a batch, and a set, at once"
    overall = made.overall
    assert overall.drafts == DRAFTS and overall.holds and made.draft == "ctc+mtp"
    assert set(overall.wer) == {*DRAFTS, "threshold_0", "threshold_0.9", BEAM}
    assert overall.recognized == ("do", "mi do") and overall.recognizer_wer.rate == 0.0
    assert set(made.sampling.p_values) == set(DRAFTS) - {"none"}
    one = SpeechLMRecognizer.load(folder)
    for draft in DRAFTS:
        name: Any = draft
        plan = one.plan(SpeechLMOptions(name))
        alone = [one.decode([read_audio(tmp_path / f"{n}.wav")], plan)[0][0] for n in range(2)]
        assert overall.calls(draft) == sum(text.counts.calls for text in alone) / 2
    told = json.loads(json.dumps(made.to_dict()))
    assert set(told) == KEYS and told["identical"] == dict.fromkeys(DRAFTS, True)
    assert told["speedup_vs_transformers"] > 0 and min(told["rtf_split"].values()) > 0
    assert told["details"]["transformers"][GREEDY]["differing"] == 0
