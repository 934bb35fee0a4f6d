"""Folders of transformers' audio language models write what transformers writes."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from commands import offramp
from damage import Damage, tensors
from offramp.audio.io import SAMPLE_RATE
from offramp.audio.vad import VadOptions
from offramp.decoding.speech_lm import SpeechLMOptions, available_drafts
from offramp.errors import CheckpointError, InputError
from offramp.models.hf_checkpoint import quiet
from offramp.models.hf_speech_lm import (
    FAMILIES,
    AudioLM,
    AudioTower,
    MelReader,
    is_audio_lm,
    load_audio_lm,
)
from offramp.models.speech_lm_checkpoint import load_speech_lm
from offramp.recognizers import is_speech_lm, transcriber
from offramp.speech_lm_recognizer import SpeechLMRecognizer
from thinned import thinned
from toy_encoder import randomize

QWEN = "qwen2_audio"
KINDS = thinned(FAMILIES.keys(), keep=(QWEN,))
SECONDS, MELS, L, D = 2, 16, 2, 32  # the window of the tower, and its sizes
LENGTHS = (32_000, 9_111, 20_481)  # samples: the whole window, and less
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", "<sound>")
V, EOS_IDS = 270, list(range(10, 26))
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'audio' %}<sound>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
OPTIONS = SpeechLMOptions(vad=VadOptions(detector="energy"))


def tokenizer() -> Tokenizer:
    """Bytes, and the special tokens of both families behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made


def save(folder: Path, kind: str) -> Path:
    """A random model with its processor, as transformers writes them."""
    import transformers

    qwen, tokens, name = kind == QWEN, tokenizer(), FAMILIES[kind].name
    audio = transformers.AutoConfig.for_model(
        f"{kind}_encoder", num_mel_bins=MELS, max_source_positions=50 * SECONDS
    )
    audio.hidden_size, audio.num_hidden_layers, audio.num_attention_heads = D, L, 4
    audio.intermediate_size = 48
    text = transformers.Qwen2Config(
        vocab_size=V,
        hidden_size=40,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
    )
    placeholder = tokens.token_to_id("<|AUDIO|>" if qwen else "<sound>")
    which = {"audio_token_index" if qwen else "audio_token_id": placeholder}
    model = getattr(transformers, name)(
        getattr(transformers, name.replace("ForConditionalGeneration", "Config"))(
            audio_config=audio, text_config=text, **which
        )
    )
    randomize(model, 0)
    for parameter, p in model.named_parameters():  # or its texts settle on one token
        if ".language_model.layers." in parameter and p.ndim == 2:
            p.data *= 3.0
    model.generation_config.update(eos_token_id=EOS_IDS, pad_token_id=0)
    with quiet():
        model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<|im_end|>")
    make = getattr(transformers, name.replace("ForConditionalGeneration", "Processor"))
    make(extractor, fast, chat_template=None if qwen else TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> its folder."""
    place = tmp_path_factory.mktemp("audio_lms")
    return cache(lambda kind: save(place / kind, kind))


@pytest.fixture(scope="module")
def loaded(saved: Callable[[str], Path]) -> Callable[[str], AudioLM]:
    return cache(lambda kind: load_audio_lm(saved(kind)))


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(saved(QWEN), tmp_path / "m"))


def waves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in LENGTHS]


def puffs(seconds: float) -> io.BytesIO:
    """Noise in four puffs a second, as a file: steady noise would be no speech."""
    swell = (torch.arange(round(seconds * SAMPLE_RATE)) * (4 * torch.pi / SAMPLE_RATE)).sin() ** 2
    noise = torch.randn(len(swell), generator=torch.Generator().manual_seed(1))
    file = io.BytesIO()
    samples = (0.1 * swell * noise).numpy().astype(np.float32)
    soundfile.write(file, samples, SAMPLE_RATE, "FLOAT", format="WAV")
    file.seek(0)
    return file


class Theirs:
    """transformers' own model and processor, on the prompt of ours."""

    def __init__(self, folder: Path, name: str, prompt: str) -> None:
        import transformers

        with quiet():
            self.model = getattr(transformers, name).from_pretrained(folder)
            self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.prompt = prompt.replace("{audio}", self.processor.audio_token)

    def inputs(self, wave: Tensor) -> Any:
        return self.processor(
            text=[self.prompt], audio=[wave.numpy()], sampling_rate=SAMPLE_RATE, return_tensors="pt"
        )

    def embeddings(self, wave: Tensor) -> Tensor:
        """[m, D] of the whole prompt, as its decoder reads them."""
        seen: list[Tensor] = []
        hook = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        self.model(**self.inputs(wave))
        hook.remove()
        return seen[0][0]

    def text(self, wave: Tensor, most: int) -> list[int]:
        """At most so many tokens, without the one that ends them."""
        inputs = self.inputs(wave)
        made = self.model.generate(**inputs, max_new_tokens=most, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :].tolist()
        return new[:-1] if new[-1] in EOS_IDS else new


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_decoder_reads_and_writes_what_it_does_in_transformers(
    kind: str, saved: Callable[[str], Path], loaded: Callable[[str], AudioLM]
) -> None:
    """The prompt too is transformers' own, token by token; in a batch as alone."""
    ours = loaded(kind)
    model, recognizer = ours.model, SpeechLMRecognizer(ours)
    theirs = Theirs(saved(kind), FAMILIES[kind].name, model.config.prompt)
    inputs, lengths = ours.reader.inputs(waves())
    together = model.prefixes(model.hear(inputs, lengths))
    # Their time is the last axis.
    rolled = [x.roll(inputs.shape[2] - int(n), 1) for x, n in zip(inputs, lengths, strict=True)]
    left = model.prefixes(model.hear(torch.stack(rolled), lengths, padding="left"))
    assert all(map(torch.equal, left, together))
    last = model.decoder.embed(torch.tensor([[model.first_token]]))[0]
    texts, ends = [], set()
    for wave, prefix in zip(waves(), together, strict=True):
        inputs, lengths = ours.reader.inputs([wave])
        (alone,) = model.prefixes(model.hear(inputs, lengths))
        wanted = theirs.embeddings(wave)
        for found in (prefix, alone):
            torch.testing.assert_close(torch.cat((found, last)), wanted, atol=1e-5, rtol=1e-4)
        frames = model.encoder.config.output_frames(int(lengths))
        texts.append(theirs.text(wave, frames + 1))
        ends.add(len(texts[-1]) == frames + 1)
    assert ends == {True, False} or len({len(text) for text in texts}) > 1, "or little is shown"
    for draft in available_drafts(model):
        plan = recognizer.plan(replace(OPTIONS, draft=draft))
        made, _ = recognizer.decode(waves(), plan)
        assert [list(text.tokens) for text in made] == texts
        for wave, want in zip(waves(), texts, strict=True):
            (single,) = recognizer.decode([wave], plan)[0]
            assert list(single.tokens) == want
    beam, _ = recognizer.decode(waves(), recognizer.plan(replace(OPTIONS, beam_size=1)))
    assert [list(text.tokens) for text in beam] == texts


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_stopped_and_resumed_the_tower_is_the_same_and_costs_what_is_counted(
    kind: str, loaded: Callable[[str], AudioLM]
) -> None:
    """Against torch's own count of floating-point operations: two for a multiply-accumulate."""
    made = loaded(kind)
    tower = made.model.encoder
    assert isinstance(tower, AudioTower)
    inputs, lengths = made.reader.inputs(waves()[1:2])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        whole = tower.run(tower.embed(inputs, lengths), 0, L)
    assert counter.get_total_flops() == 2 * tower.config.macs(int(lengths))
    with sdpa_kernel(SDPBackend.MATH):
        halfway = tower.run(tower.embed(inputs, lengths), 0, 1)
        again = tower.run(tower.run(halfway, 1, 1), 1, L)
    assert torch.equal(again.h, whole.h) and again.lengths.tolist() == whole.lengths.tolist()
    assert whole.h.shape[1] == tower.config.output_frames(int(lengths)) == 14
    with pytest.raises(InputError, match="layers 0 to 2 were asked for after 1 layers"):
        tower.run(halfway, 0, L)
    with pytest.raises(InputError, match="exit_layer is 1; this encoder has no CTC to read"):
        made.model.hear(inputs, lengths, exits=(1,))
    wrong = (
        (inputs[..., :-1], lengths, r"input is \[1, 16, 199\]; it must be \[B, 16, 200\]"),
        (inputs, lengths * 0 + 2, "one true length per row, 3 to 200"),
        (inputs, lengths * 0 + 201, r"lengths are \[201\]"),
    )
    for features, counts, message in wrong:
        with pytest.raises(InputError, match=message):
            tower.embed(features, counts)


def test_the_reader_takes_no_more_than_the_window(loaded: Callable[[str], AudioLM]) -> None:
    reader = loaded(QWEN).reader
    assert isinstance(reader, MelReader)
    assert (reader.frame_s, reader.first_frame_s) == (0.04, 0.0)
    assert [reader.num_inputs(n) for n in (0, 320, 321, 32_000)] == [0, 0, 3, 200]
    with pytest.raises(InputError, match=r"an utterance of 2.1 s is longer than .* window of 2 s"):
        reader.inputs([torch.zeros(33_000)])
    with pytest.raises(InputError, match="320 samples give no frame; leave such a recording out"):
        reader.inputs([torch.zeros(9_000), torch.zeros(320)])


def test_a_long_recording_is_cut_where_the_window_ends(
    capsys: pytest.CaptureFixture[str], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """The decoder alone would hear more."""
    folder, path = saved(QWEN), tmp_path / "a.wav"
    path.write_bytes(puffs(5.0).getbuffer())
    assert is_speech_lm(folder)
    words = ("transcribe", path, "--model", folder, "--detector", "energy", "--format", "json")
    status, out, err = offramp(capsys, *words)
    made = json.loads(out)
    assert (status, err, made["decoding"]["draft"]) == (0, "", "none")
    assert len(made["segments"]) >= 3 and any(s["text"] for s in made["segments"])
    for before, after in pairwise(made["segments"]):
        assert before["end_s"] == after["start_s"], "nothing is lost between them"
    assert SpeechLMRecognizer.load(folder).longest_s(20.0) == SECONDS
    assert all(s["end_s"] - s["start_s"] <= SECONDS for s in made["segments"])
    assert all(s["words"] == [] and s["macs"] > 0 for s in made["segments"])
    for option, message in (
        ("--draft ctc", "draft 'ctc' needs a CTC exit that .*; its drafts are exit, none"),
        ("--draft mtp", "draft 'mtp' needs heads .*; its drafts are exit, none"),
        ("--guard stop", "guard 'stop' needs a CTC exit"),
    ):
        status, out, err = offramp(capsys, *words, *option.split())
        assert (status, out, err.count("\n")) == (2, "", 1) and re.search(message, err)


# -- what a folder says, and what is missing -----------------------------------------------------


def test_the_prompt_may_be_ones_own(folder: Path) -> None:
    config(prompt="<|audio_bos|>{audio}<|audio_eos|>Go: ")(folder)
    model = load_audio_lm(folder).model
    bos, eos = (tokenizer().token_to_id(f"<|audio_{end}|>") for end in ("bos", "eos"))
    assert (model.prompt.before, model.prompt.after[0], len(model.prompt)) == ((bos,), eos, 6)


def test_files_of_either_spelling_and_of_half_floats_are_read(
    folder: Path, loaded: Callable[[str], AudioLM]
) -> None:
    """As transformers writes them, and as its modules name them."""
    stored = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in stored)
    newer = {}
    for name, x in stored.items():
        inner = name.replace("language_model.model.", "language_model.")
        to = "lm_head.weight" if name.endswith("lm_head.weight") else f"model.{inner}"
        newer[to] = x.bfloat16()
    save_file(newer, folder / "model.safetensors")
    whole = loaded(QWEN).model.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        state = load_audio_lm(folder, dtype=dtype).model.state_dict()
        assert state.keys() == whole.keys()
        for name, x in state.items():
            assert x.dtype == dtype and torch.equal(x, whole[name].bfloat16().to(dtype)), name


def config(**changes: Any) -> Damage:
    """A dict changes a part's settings."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for name, value in changes.items():
            values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
        path.write_text(json.dumps(values))

    return change


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


DAMAGE: dict[str, tuple[Damage, str]] = {
    "of another type": (
        config(model_type="llama"),
        "of type 'llama'; choose one of qwen2",
    ),
    "no weights": (gone("model.safetensors"), "has neither model.safetensors"),
    "no tokenizer": (gone("tokenizer.json"), "cannot load how .* reads and writes"),
    "no extractor": (gone("processor_config.json"), "cannot load how .* reads and writes"),
    "no tensor of the tower": (
        tensors(lambda t: t.pop("audio_tower.conv2.bias")),
        "lacks the tensor audio_tower.conv2.bias; the checkpoint is incomplete",
    ),
    "no projector": (
        tensors(lambda t: t.pop("multi_modal_projector.linear.weight")),
        "lacks the tensor multi_modal_projector.linear.weight",
    ),
    "no tensor of the decoder": (
        tensors(lambda t: t.pop("language_model.model.layers.1.self_attn.k_proj.bias")),
        "lacks the tensor model.layers.1.self_attn.k_proj.bias",
    ),
    "one too many": (
        tensors(lambda t: t.update({"audio_tower.extra": torch.zeros(2)})),
        r"holds 1 tensors that config.json does not explain \(first: audio_tower.extra\)",
    ),
    "not a number": (
        tensors(lambda t: t["audio_tower.conv1.weight"].fill_(torch.nan)),
        "holds numbers that are not finite",
    ),
    "another width": (config(audio_config={"d_model": 16}), "has shape .* config.json says"),
    "another window": (
        config(audio_config={"max_source_positions": 300}),
        "makes 16 features in 200 frames at 16000 Hz; the audio tower reads 16 in 600 at 16000",
    ),
    "another tower": (
        config(audio_config={"model_type": "whisper"}),
        "audio tower is of type 'whisper'; it must be 'qwen2_audio_encoder'",
    ),
    "another decoder": (
        config(text_config={"model_type": "gpt2"}),
        "model_type is 'gpt2'; supported: llama, mistral, qwen2, qwen3",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "gptq"}),
        r"the checkpoint is quantised \(gptq\)",
    ),
    "a prompt without audio": (config(prompt="Go:"), r"must have \{audio\} once"),
    "a chat template that fails": (
        lambda f: (f / "chat_template.jinja").write_text("{{ nothing.at.all }}"),
        r"the chat template makes no prompt \(.*\); set prompt in config.json",
    ),
    "a chat template without audio": (
        lambda f: (f / "chat_template.jinja").write_text("Hello"),
        r"prompt is 'Hello'; it must have \{audio\} once",
    ),
    "no end of a text": (gone("generation_config.json"), "the decoder has no eos_ids"),
}
KEPT = ("no extractor", "no tensor of the decoder", "another tower", "a chat template that fails")


@pytest.mark.parametrize("case", thinned(DAMAGE, KEPT))
def test_damage_is_named(folder: Path, case: tuple[Damage, str]) -> None:
    damage, message = case
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_audio_lm(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("ultravox", "needs the code in its folder, which is never run"),
        ("granite_speech", "hears through a windowed Q-Former"),
        ("voxtral", "has Mistral's own tokenizer and no tokenizer.json"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str, why: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    message = f"a model of type '{kind}', which {why}; supported: qwen2_audio, audioflamingo3, or"
    for refuse in (is_audio_lm, is_speech_lm, transcriber, load_speech_lm):
        with pytest.raises(CheckpointError, match=message):
            refuse(tmp_path)


def test_it_is_for_transcribing_and_not_for_training(saved: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="which transcribes and is not trained here; join a"):
        load_speech_lm(saved(QWEN))
