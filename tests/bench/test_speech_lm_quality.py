"""Error rates of a Speech-LM by draft: what single utterances give, and one liar found out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toy_speech
import toy_speech_lm
from offramp.audio.io import read_audio
from offramp.bench.asr import AsrData
from offramp.bench.speech_lm_quality import Tally, run
from offramp.bench.wer import error_rate, word_edits
from offramp.config_speech_lm import HeadsConfig
from offramp.data.manifest import read_manifest
from offramp.decoding.speech_lm import SpeechLMOptions, SpeechLMPlan, SpeechText
from offramp.errors import InputError
from offramp.results import DecoderCounts
from offramp.speech_lm_recognizer import SpeechLMRecognizer

DRAFTS = ["none", "exit", "mtp", "ctc", "ctc+mtp"]
BEAMS = ["beam_none", "beam_mtp", "beam_ctc"]
FIGURES = {
    "wer",
    "wer_ci95",
    "cer",
    "identical",
    "differing",
    "decoder_calls_per_utterance",
    "rtf",
    "rtf_split",
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_speech.write_corpus(tmp_path_factory.mktemp("corpus"), ["do", "mi do"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("speech_lm") / "toy"
    toy_speech_lm.varied(0, 1.0, heads=HeadsConfig(), ctc_exit=3).save(made)
    return made


def test_every_draft_is_what_single_utterances_give(folder: Path, manifest: Path) -> None:
    heard: list[tuple[int, int]] = []
    report = run(str(folder), AsrData(manifest), 2, on_progress=lambda *p: heard.append(p))
    assert list(report.ways) == DRAFTS + BEAMS and report.identical
    assert heard[-1] == (2, 2)
    one, utterances = SpeechLMRecognizer.load(folder), read_manifest(manifest)
    references = [u.text for u in utterances]
    for name, made in report.ways.items():
        draft: Any = name.removeprefix("beam_")
        options = SpeechLMOptions(draft, beam_size=2 if name in BEAMS else None)
        plan = one.plan(options)
        alone = [one.decode([read_audio(u.path)], plan)[0][0] for u in utterances]
        assert made.wer == error_rate(word_edits(references, [t.text for t in alone]))
        assert made.counts.calls == sum(t.counts.calls for t in alone)
        assert made.calls_per_utterance == made.counts.calls / 2
        assert made.differing == (None if draft == "none" else 0)
        assert made.counts.tokens == DecoderCounts.total(t.counts for t in alone).tokens
    calls = {name: way.counts.calls for name, way in report.ways.items()}
    assert all(calls[name] <= calls["none"] for name in ("mtp", "ctc", "ctc+mtp"))
    assert calls["mtp"] < calls["none"] == report.ways["none"].counts.tokens
    assert all(calls[name] <= calls["beam_none"] for name in BEAMS)


@pytest.mark.slow
def test_json_has_the_figures_of_every_draft(folder: Path, manifest: Path) -> None:
    told = json.loads(json.dumps(run(str(folder), AsrData(manifest, limit=2)).to_dict()))
    assert (told["utterances"], told["left_out"], told["identical"]) == (2, 0, True)
    assert list(told["drafts"]) == DRAFTS
    for figures in told["drafts"].values():
        assert set(figures) == FIGURES | set(DecoderCounts().to_dict())
        split = figures["rtf_split"]
        assert set(split) == {"encoder", "ctc", "decoder"} and min(split.values()) > 0
        assert figures["rtf"] == pytest.approx(sum(split.values()))


@pytest.mark.slow
def test_a_draft_that_changes_the_text_is_found_out(
    folder: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SpeechLMPlan.decode

    def lying(self: SpeechLMPlan, *given: Any) -> Any:
        texts, times = decode(self, *given)
        if self.draft != "mtp":
            return texts, times
        return [replace(t, tokens=(), parts=()) for t in texts[:1]] + texts[1:], times

    monkeypatch.setattr(SpeechLMPlan, "decode", lying)
    report = run(str(folder), AsrData(manifest))
    assert not report.identical and not report.to_dict()["identical"]
    differing = {name: way.differing for name, way in report.ways.items()}
    assert differing == {"none": None, "exit": 0, "mtp": 1, "ctc": 0, "ctc+mtp": 0}
    assert report.ways["mtp"].to_dict()["identical"] is False


def test_a_text_that_wavers_differs_whichever_way_wrote_it() -> None:
    text = SpeechText((5,), ("do",), None, (), DecoderCounts(), "stop")
    steady, wavering = Tally({0: text, 1: text}), Tally({0: text, 1: text}, {1})
    assert steady.differing(steady) == []
    assert steady.differing(wavering) == wavering.differing(steady) == [1]


@pytest.mark.slow
def test_only_drafts_that_the_model_has_take_part(tmp_path: Path, manifest: Path) -> None:
    toy_speech_lm.varied(0, 1.0, ctc_exit=3).save(tmp_path / "headless")
    report = run(str(tmp_path / "headless"), AsrData(manifest, limit=1), 2)
    assert list(report.ways) == ["none", "exit", "ctc", "beam_none", "beam_ctc"]


def test_what_the_decoder_has_no_room_for_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    long = toy_speech.write_corpus(tmp_path, ["do", "do mi " * 12])
    with pytest.raises(InputError, match=r"1\.wav lasts 10\.1 s, .* holds 3\.\d s") as caught:
        run(str(folder), AsrData(long))
    assert "\n" not in str(caught.value)


def test_a_text_is_its_parts_without_outer_spaces() -> None:
    made = SpeechText((1, 2, 3), (" the", "re  ", "is "), None, (), DecoderCounts(), "stop")
    assert made.text == "there is"
