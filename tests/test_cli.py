"""The command line: output, options, and one-line errors with exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import toy_speech
from commands import offramp


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Recordings: a.wav "do mi", b.wav "mi", silence.wav; text.wav, cut.wav are none."""
    folder = tmp_path_factory.mktemp("spoken")
    for name, said in (("a", "do mi"), ("b", "mi"), ("silence", "")):
        toy_speech.write(folder / f"{name}.wav", toy_speech.speak(said))
    (folder / "text.wav").write_text("not a recording")
    (folder / "cut.wav").write_bytes((folder / "a.wav").read_bytes()[:20_000])
    return folder


def transcribe(recogniser_folder, *words):
    """The command's words; the toy's tones are no speech to Silero."""
    model = ("--model", str(recogniser_folder), "--detector", "energy")
    return ["transcribe", *map(str, words), *model]


def test_generate_streams_the_same_text_with_and_without_drafts(capsys, checkpoint):
    words = ("generate", "--model", str(checkpoint), "the count", "--max-tokens", "12")
    status, drafted, _ = offramp(capsys, *words, "--exit-layer", "2")
    plain = offramp(capsys, *words, "--draft", "none")
    assert status == 0 and drafted == plain[1] != "\n"


def test_generate_json_has_events_and_stats(capsys, checkpoint):
    words = ("generate", "--model", str(checkpoint), "the count", "--max-tokens", "8", "--json")
    status, out, _ = offramp(capsys, *words)
    *steps, done = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {s["event"] for s in steps} == {"step"} and done["event"] == "done"
    assert [t for s in steps for t in s["tokens"]] == done["tokens"]
    assert done["stats"]["generated_tokens"] == len(done["tokens"])


@pytest.mark.slow
def test_the_prompt_may_come_from_standard_input(checkpoint):
    words = [sys.executable, "-m", "offramp", "generate", "--model", str(checkpoint)]
    made = subprocess.run(
        [*words, "--max-tokens", "4"],
        input="the count",
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "a", "--model", "no-such-model"], "lm-tiny"),
        (["eval", "exits", "--model", "no-such-model"], "there is no checkpoint"),
        (["eval", "exits", "--model", "{toy}"], "there is no default data"),
        (["eval", "exits", "--model", "{toy}", "--data", "{empty}"], "the text is empty"),
        (["generate", "a", "--model", "{toy}", "--exit-layer", "0"], "between 1 and 4"),
        (["generate", "a", "--model", "{toy}", "--exit-layer", "5"], "between 1 and 4"),
        (["generate", "a", "--model", "{toy}", "--early-exit", "6"], "between 1 and 5"),
        (["generate", "", "--model", "{toy}"], "empty"),
        (["generate", "the count " * 60, "--model", "{toy}"], "context is 64"),
        (["generate", "a", "--model", "{toy}", "--temperature", "-1"], "temperature is -1"),
        (["generate", "a", "--model", "{toy}", "--threads", "0"], "threads is 0"),
        (["generate", "a", "--nonsense"], "nonsense"),
        (["generate", "--model", "{toy}", "--max-tokens", "many"], "max-tokens"),
        (["nonsense"], "nonsense"),
        (["train", "no-such-recipe.py"], "no recipe file"),
        (["train", "{recipe}", "--set", "steps"], "key=value"),
        (["train", "{recipe}", "--set", "nonsense=1"], "nonsense"),
        (["train", "{recipe}", "--set", "steps=0"], "steps is 0"),
        (["train", "{recipe}", "--set", "lr=fast"], "lr is 'fast'"),
        (["eval", "exits", "--model", "{toy}", "--data", "no-such-file.txt"], "no-such-file.txt"),
        (["eval", "exits", "--model", "{toy}", "--json", "no/such/folder.json"], "no/such"),
        (["fetch", "no-such-corpus"], "no-such-corpus"),
        (["generate", "a", "--model", "{asr}"], "speech recogniser"),
        (["transcribe", "{wav}", "--model", "{toy}"], "of type 'llama'"),
        (["transcribe", "{wav}", "--model", "lm-tiny"], "of type 'llama'"),
        (["transcribe", "{wav}", "--model", "no-such-model"], "no-such-model"),
        (["transcribe", "no.wav", "--model", "{asr}"], "no.wav is missing"),
        (["transcribe", "{text}", "--model", "{asr}"], "not a recording"),
        (["transcribe", "{wav}", "--model", "{asr}", "--exit-layer", "9"], "exits at 1, 2, 3"),
        (
            ["transcribe", "{wav}", "--model", "{asr}", "--exit-layer", "2", "--budget-ms", "9"],
            "exit_layer 2 fixes",
        ),
        (["transcribe", "{wav}", "--model", "{asr}", "--exit-policy", "entropy"], "calibration"),
        (["transcribe", "{wav}", "{wav}", "--model", "{asr}", "--format", "srt"], "-o"),
        (["transcribe", "{wav}", "{wav}", "--model", "{asr}", "-o", "o"], "several files"),
        (["transcribe", "{wav}", "--model", "{asr}", "-o", "{text}"], "cannot write to"),
        (["transcribe", "{wav}", "--model", "{asr}", "-o", "{text}/x"], "cannot write to"),
        (["transcribe", "{wav}", "--model", "{asr}", "--trail"], "trail goes into json only"),
        (["transcribe", "--model", "{asr}"], "FILES"),
        (["transcribe", "{wav}", "--model", "{asr}", "--lm-weight", "1"], "lm_weight needs"),
        (["transcribe", "{wav}", "--model", "{asr}", "--beam-size", "0"], "beam_size is 0"),
        (["transcribe", "{wav}", "--model", "{asr}", "--lm", "none.arpa"], "none.arpa is missing"),
        (["train-ngram", "none.txt", "-o", "lm.arpa"], "none.txt is missing"),
        (["train-ngram", "{text}", "-o", "no/lm.arpa"], "no folder you may write to"),
        (["train-ngram", "{text}", "-o", "lm.arpa", "--order", "9"], "order is 9"),
        (["train-ngram", "{empty}", "-o", "lm.arpa"], "no words to learn from"),
        (["train-ngram", "-o", "lm.arpa"], "TEXTS"),
        (["transcribe", "{wav}", "--model", "{asr}", "--nonsense", "1"], "--nonsense"),
        (["eval", "asr", "--model", "{asr}", "--data", "none.tsv"], "none.tsv"),
        (["eval", "asr", "--model", "{asr}", "--data", "{text}"], "must end in .tsv"),
        (
            ["calibrate", "--model", "{asr}", "--data", "none.tsv", "--max-wer-increase", "1"],
            "none.tsv",
        ),
        (
            ["calibrate", "--model", "{asr}", "--data", "a.tsv", "--max-wer-increase", "0"],
            "max_wer_increase is 0",
        ),
    ],
)
def test_errors_are_one_line_and_status_2(
    monkeypatch, capsys, tmp_path, checkpoint, recogniser_folder, spoken, words, message
):
    recipe = Path(__file__).parents[1] / "recipes" / "layerskip_books.py"
    places = {"toy": checkpoint, "asr": recogniser_folder, "recipe": recipe}
    places |= {"wav": spoken / "a.wav", "text": spoken / "text.wav"}
    places["empty"] = tmp_path.parent / "empty.txt"
    places["empty"].write_text("")
    filled = [w.format(**places) for w in words]
    monkeypatch.chdir(tmp_path)
    status, out, err = offramp(capsys, *filled)
    assert status == 2, err
    assert out == ""
    assert err.startswith("offramp: ") and err.count("\n") == 1, err
    assert message in err
    assert list(tmp_path.iterdir()) == []


# -- speech --------------------------------------------------------------------------------------


def test_text_of_one_recording_is_all_that_is_printed(capsys, recogniser_folder, spoken):
    assert offramp(capsys, *transcribe(recogniser_folder, spoken / "a.wav")) == (0, "do mi\n", "")
    silent = offramp(capsys, *transcribe(recogniser_folder, spoken / "silence.wav"))
    assert silent == (0, "", "")


def test_standard_input_may_be_transcribed(capsys, monkeypatch, recogniser_folder, spoken):
    with open(spoken / "b.wav") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert offramp(capsys, *transcribe(recogniser_folder, "-")) == (0, "mi\n", "")


@pytest.mark.slow
def test_a_pipe_may_be_transcribed(recogniser_folder, spoken):
    words = [sys.executable, "-m", "offramp", *transcribe(recogniser_folder, "-")]
    made = subprocess.run(
        words, input=(spoken / "b.wav").read_bytes(), capture_output=True, check=False
    )
    assert (made.returncode, made.stdout) == (0, b"mi\n"), made.stderr


@pytest.mark.parametrize("format", ["txt", "srt", "vtt", "tsv", "json"])
def test_a_file_per_recording_in_every_format(capsys, tmp_path, recogniser_folder, spoken, format):
    files = [spoken / "a.wav", spoken / "b.wav"]
    words = transcribe(recogniser_folder, *files, "--format", format, "-o", tmp_path / "o")
    assert offramp(capsys, *words) == (0, "", "")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [f"a.{format}", f"b.{format}"]
    assert "mi" in (tmp_path / "o" / f"b.{format}").read_text()
    one = offramp(capsys, *transcribe(recogniser_folder, files[1], "--format", format))
    if format != "json":  # its processing time differs
        assert one[1] == (tmp_path / "o" / f"b.{format}").read_text()


def test_json_has_words_exit_and_costs(capsys, recogniser_folder, spoken):
    words = transcribe(recogniser_folder, spoken / "a.wav", "--format", "json", "--trail")
    status, out, _ = offramp(capsys, *words, "--exit-policy", "agreement", "--threshold", "1")
    made = json.loads(out)
    (segment,) = made["segments"]
    assert status == 0 and made["text"] == segment["text"] == "do mi"
    assert [w["text"] for w in segment["words"]] == ["do", "mi"]
    assert segment["exit_layer"] == 2 and segment["macs"] > 0 and made["rtf"] > 0
    assert [t["text"] for t in segment["trail"]] == ["do mi", "do mi"]


def test_several_files_on_one_output_are_named(capsys, recogniser_folder, spoken):
    files = [spoken / "a.wav", spoken / "b.wav"]
    status, out, _ = offramp(capsys, *transcribe(recogniser_folder, *files))
    assert status == 0
    assert out == f"==> {files[0]} <==\ndo mi\n==> {files[1]} <==\nmi\n"
    _, out, _ = offramp(capsys, *transcribe(recogniser_folder, *files, "--format", "json"))
    made = [json.loads(line) for line in out.splitlines()]
    assert [(m["file"], m["text"]) for m in made] == [
        (str(files[0]), "do mi"),
        (str(files[1]), "mi"),
    ]


def test_bad_files_among_good_ones_are_named_at_the_end(
    capsys, tmp_path, recogniser_folder, spoken
):
    names = ("a", "text", "gone", "cut", "b")
    files = [spoken / f"{name}.wav" for name in names]
    status, out, err = offramp(capsys, *transcribe(recogniser_folder, *files, "-o", tmp_path))
    assert (status, out) == (1, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    assert (tmp_path / "b.txt").read_text() == "mi\n"
    lines = err.splitlines()
    assert lines[-1] == "offramp: 3 of 5 files failed" and len(lines) == 4
    for line, name in zip(lines, ("text", "gone", "cut"), strict=False):
        assert line.startswith(f"offramp: {spoken / name}.wav is ")


def test_calibrate_saves_what_transcribe_uses(capsys, tmp_path, recogniser_folder, spoken):
    manifest = toy_speech.write_corpus(tmp_path / "dev", toy_speech.random_texts(12, 3))
    target = tmp_path / "c.json"
    words = ["calibrate", "--model", str(recogniser_folder), "--data", str(manifest)]
    words += ["--out", str(target), "--max-wer-increase"]
    status, out, _ = offramp(capsys, *words, "0.5")
    assert status == 1 and out.startswith("cannot certify +0.5 % WER") and not target.exists()
    status, out, _ = offramp(capsys, *words, "10")
    assert status == 0 and out.startswith("expected excess error") and "saves" in out
    asked = transcribe(recogniser_folder, spoken / "a.wav", "--format", "json")
    asked += ["--calibration", str(target), "--max-wer-increase"]
    status, out, _ = offramp(capsys, *asked, "10")
    made = json.loads(out)
    assert status == 0 and made["mean_exit_layer"] == 1 and made["text"] == "do mi"
    status, _, err = offramp(capsys, *asked, "5")
    assert status == 2 and "certifies +10 % WER" in err


def test_eval_asr_writes_its_figures(capsys, tmp_path, recogniser_folder):
    manifest = toy_speech.write_corpus(tmp_path / "dev", toy_speech.random_texts(4, 3))
    words = ["eval", "asr", "--model", str(recogniser_folder), "--data", str(manifest)]
    words += ["--split", "dev", "--json", str(tmp_path / "r.json"), "--confidence", "0"]
    status, out, _ = offramp(capsys, *words)
    read = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and "WER" in out and "exit_1" in out
    assert read["model"] == str(recogniser_folder) and read["data"] == str(manifest)
    assert read["policies"]["confidence"]["mean_exit_layer"] == 1
    assert read["policies"]["exit_3"]["wer"] == 0.0
    assert "beam" not in read["policies"]
    status, _, _ = offramp(capsys, *words, "--beam-size", "4", "--limit", "2")
    made = json.loads((tmp_path / "r.json").read_text())["policies"]["beam"]
    assert status == 0 and set(made) == set(read["policies"]["exit_3"]) and made["wer"] == 0.0


def test_a_language_model_from_texts_goes_into_the_search(
    capsys, tmp_path, recogniser_folder, spoken
):
    (tmp_path / "a.txt").write_text("Do mi! Do\nmi do.\n\nMi do. It is 5.\n")
    (tmp_path / "b.txt").write_text("mi\ndo mi\n")
    target = tmp_path / "lm.arpa"
    texts = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    words = ("train-ngram", *texts, "--min-count", "1", "--out", str(target))
    status, out, _ = offramp(capsys, *words)
    assert status == 0 and "5 words, 6 groups of 2, 6 groups of 3" in out, out
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="flashlight-text")
    files = transcribe(recogniser_folder, spoken / "a.wav", "--lm", target, "--lm-weight", "0.1")
    assert offramp(capsys, *files) == (0, "do mi\n", "")


def test_the_extra_that_a_language_model_needs_is_named(
    capsys, monkeypatch, tmp_path, recogniser_folder, spoken
):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    words = transcribe(recogniser_folder, spoken / "a.wav", "--lm", tmp_path / "lm.arpa")
    status, out, err = offramp(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "flashlight-text: pip install" in err and "offramp[lm]" in err


def test_a_terminal_shows_the_same_text_as_it_comes(capsys, monkeypatch, recogniser_folder, spoken):
    files = [spoken / f"{name}.wav" for name in ("a", "silence", "b")]
    words = transcribe(recogniser_folder, *files)
    piped = offramp(capsys, *words)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert offramp(capsys, *words) == piped
    assert offramp(capsys, *transcribe(recogniser_folder, files[0]))[1] == "do mi\n"
