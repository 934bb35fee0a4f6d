"""Speech becomes a prompt for the decoder: the same in every batch, and in training as decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

import toy_hf
import toy_speech_lm
from offramp.config import EncoderConfig
from offramp.config_speech_lm import ProjectorConfig
from offramp.errors import ConfigError, InputError
from offramp.models.ctc import CTCEncoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.speech_lm import PromptTokens, SpeechLM
from offramp.nn.cache import KVCache
from offramp.nn.projector import CTCProjector, token_runs
from offramp.tokenizer import TextTokenizer
from thinned import thinned
from toy_encoder import features
from toy_speech_lm import BOS_ID, KEPT, LENGTHS, TEXTS, VARIANTS

of_all = pytest.mark.parametrize("changes", thinned(VARIANTS, KEPT))


def double(**changes: Any) -> SpeechLM:
    return toy_speech_lm.speech_lm(**changes).double()


def decoded(model: SpeechLM, prefix: Tensor, text: list[int]) -> Tensor:
    """The top layer's states [U + 1, D] as decoding finds them, token after token over a cache."""
    L, tokens = model.config.decoder.num_layers, [model.first_token, *text]
    cache = KVCache(model.config.decoder, 1, len(prefix) + len(tokens), dtype=model.dtype)
    if len(prefix):
        model.decoder.run(prefix[None], 0, L, cache)
    steps = [model.decoder.embed(torch.tensor([[token]])) for token in tokens]
    return torch.cat([model.decoder.run(h, 0, L, cache)[0] for h in steps])


@of_all
def test_a_batch_gives_what_each_utterance_gives_alone(changes: dict[str, Any]) -> None:
    model, (x, lengths) = double(**changes), features(LENGTHS)
    heard = model.hear(x, lengths)
    together, states = model.prefixes(heard), model.read(heard, TEXTS)
    assert states.shape == (3, 5, 32)
    for b, (length, text) in enumerate(zip(LENGTHS, TEXTS, strict=True)):
        one = model.hear(x[b : b + 1, :length], lengths[b : b + 1])
        torch.testing.assert_close(heard.audio[b], one.audio[0])
        torch.testing.assert_close(together[b], model.prefixes(one)[0])
        torch.testing.assert_close(states[b, : len(text) + 1], model.read(one, [text])[0])
        assert not states[b, len(text) + 1 :].any()
        assert int(heard.frames[b]) == int(one.frames[0])
        if heard.ctc_log_probs is not None and one.ctc_log_probs is not None:
            real = heard.ctc_log_probs[b, : heard.frames[b]]
            torch.testing.assert_close(real, one.ctc_log_probs[0])


def left_padded(inputs: Tensor, lengths: Tensor, axis: int = 1) -> Tensor:
    """The same utterances with padding, of no use, before them."""
    made = torch.full_like(inputs, torch.nan)
    T = inputs.shape[axis]
    for row, real, n in zip(made, inputs, lengths.tolist(), strict=True):
        row.narrow(axis - 1, T - n, n).copy_(real.narrow(axis - 1, 0, n))
    return made


@pytest.mark.parametrize("name", ["every frame", "by the tokens of CTC"])
def test_padding_may_stand_on_either_side(name: str) -> None:
    model, (x, lengths) = double(**VARIANTS[name]), features(LENGTHS)
    right, left = (
        model.hear(x, lengths),
        model.hear(left_padded(x, lengths), lengths, padding="left"),
    )
    assert torch.equal(left.frames, right.frames)
    for b, n in enumerate(LENGTHS):
        one = model.hear(x[b : b + 1, :n], lengths[b : b + 1], padding="left")
        torch.testing.assert_close(left.audio[b], right.audio[b])
        torch.testing.assert_close(left.audio[b], one.audio[0])


def test_padding_on_another_side_or_of_another_batch_is_refused() -> None:
    model, (x, lengths) = toy_speech_lm.speech_lm(), features(LENGTHS)
    with pytest.raises(InputError, match="padding is 'both'; it must be 'right' or 'left'"):
        model.hear(x, lengths, padding="both")  # type: ignore[arg-type]
    for wrong in (lengths[:2], torch.tensor([62, 23, 40])):
        with pytest.raises(InputError):
            model.hear(x, wrong, padding="left")
    with pytest.raises(InputError):
        model.hear(x[0, :, 0], lengths, padding="left")


@of_all
def test_training_reads_what_decoding_reads(changes: dict[str, Any]) -> None:
    model = double(**changes)
    heard = model.hear(*features(LENGTHS))
    states = model.read(heard, TEXTS)
    for row, prefix, text in zip(states, model.prefixes(heard), TEXTS, strict=True):
        torch.testing.assert_close(row[: len(text) + 1], decoded(model, prefix, text))


@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        ("{audio}", (), (BOS_ID,)),
        ("{audio}w7", (), (7,)),
        ("{audio} w7 w8 w9", (), (7, 8, 9)),
        ("<|bos|> w3 {audio} w4 w5", (BOS_ID, 3), (4, 5)),
        ("w3{audio}", (3,), (BOS_ID,)),
    ],
)
def test_the_audio_stands_where_the_prompt_says(
    prompt: str, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    model = toy_speech_lm.speech_lm(prompt=prompt)
    assert model.prompt == PromptTokens(before, after)
    assert model.first_token == after[-1]
    heard = model.hear(*features(LENGTHS))
    embedding = model.decoder.embed
    for prefix, audio in zip(model.prefixes(heard), heard.audio, strict=True):
        first, middle, last = prefix.split([len(before), len(audio), len(after) - 1])
        assert torch.equal(first, embedding(torch.tensor([before], dtype=torch.long))[0])
        assert torch.equal(middle, audio)
        assert torch.equal(last, embedding(torch.tensor([after[:-1]], dtype=torch.long))[0])


@pytest.mark.parametrize("stack", [1, 2, 3, 50])
def test_the_audio_is_what_the_last_layer_says_a_few_frames_at_a_time(stack: int) -> None:
    model = double(projector=ProjectorConfig(stack, 24))
    x, lengths = features(LENGTHS)
    heard = model.hear(x, lengths)
    assert isinstance(model.encoder, CTCEncoder)
    state = model.encoder.run(model.encoder.embed(x, lengths), 0, 5)
    assert torch.equal(heard.frames, state.lengths)
    for audio, h, n in zip(heard.audio, state.h, state.lengths.tolist(), strict=True):
        assert len(audio) == -(-n // stack)
        torch.testing.assert_close(audio, model.projector(h[None, :n], torch.tensor([n]))[0])


def test_exits_are_read_on_the_way_and_no_layer_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, lengths) = toy_speech_lm.speech_lm(ctc_exit=3), features(LENGTHS)
    spans = []
    run = CTCEncoder.run

    def counted(self: CTCEncoder, state: Any, start: int, stop: int) -> Any:
        spans.append((start, stop))
        return run(self, state, start, stop)

    monkeypatch.setattr(CTCEncoder, "run", counted)
    alone = model.hear(x, lengths)
    assert spans == [(0, 3), (3, 5)]
    assert list(alone.exits) == [3]
    assert alone.ctc_log_probs is alone.exits[3]
    assert alone.exits[3].shape == (3, 16, 62)
    spans.clear()
    heard = model.hear(x, lengths, exits=(5, 2, 3))
    assert spans == [(0, 2), (2, 3), (3, 5), (5, 5)]
    assert list(heard.exits) == [2, 3, 5]
    assert heard.ctc_log_probs is heard.exits[3]
    assert torch.equal(heard.exits[3], alone.exits[3])
    assert all(map(torch.equal, heard.audio, alone.audio))
    none = model.hear(x, lengths, exits=())
    assert none.ctc_log_probs is None
    assert none.exits == {}
    assert toy_speech_lm.speech_lm().hear(x, lengths).ctc_log_probs is None


def test_gradients_reach_every_part_that_speaks() -> None:
    """The heads and the encoder's CTC have losses of their own."""
    model = toy_speech_lm.speech_lm(encoder={"feedback": False}).requires_grad_(True).train()
    heard = model.hear(*features(LENGTHS))
    model.decoder.logits(model.read(heard, TEXTS), 5).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {
        "encoder.heads.0.weight",
        "encoder.heads.0.bias",
        "encoder.norm.weight",
        "encoder.norm.bias",
    }
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_transformers_encoder_hears_too() -> None:
    encoder = toy_hf.toy("wav2vec2 layer norm first")
    made = toy_speech_lm.config()
    config = type(made)(None, made.projector, made.decoder)
    prompt = PromptTokens.of(config, toy_speech_lm.tokenizer())
    decoder = DecoderLM(made.decoder)
    decoder.init_weights(0)
    model = SpeechLM(config, prompt, encoder, decoder).requires_grad_(False).eval()
    x, lengths = toy_hf.inputs("wav2vec2 layer norm first", padding=torch.nan)
    heard = model.hear(x, lengths, exits=(2, 5))
    left = model.hear(left_padded(x, lengths), lengths, exits=(), padding="left")
    alone = toy_hf.all_exits(encoder, x, lengths)
    for b, n in enumerate(lengths.tolist()):
        one = model.hear(x[b : b + 1, :n], lengths[b : b + 1])
        torch.testing.assert_close(heard.audio[b], one.audio[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.audio[b], one.audio[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            heard.exits[2][b, : heard.frames[b]], alone[2][b, : heard.frames[b]]
        )


# -- limits --------------------------------------------------------------------------------------


def test_what_the_decoder_has_room_for() -> None:
    """Subsampling by 4, three frames an embedding, three tokens of prompt, 12 positions."""
    model = toy_speech_lm.speech_lm(prompt="w2 {audio} w3 w4", decoder={"max_positions": 12})
    assert [model.room(n) for n in (1, 12, 13, 96, 97)] == [8, 8, 7, 1, 0]
    assert [model.longest(k, 200) for k in (1, 2, 7, 8, 9)] == [96, 84, 24, 12, 0]
    assert model.longest(1, 50) == 50
    model.hear(*features([96, 20]))
    says = "of 97 input frames takes 12 positions with the prompt, and the decoder has 12; .* 96"
    with pytest.raises(InputError, match=says):
        model.hear(*features([20, 97]))


def test_a_prompt_that_leaves_no_room_is_refused_when_the_model_is_made() -> None:
    words = " ".join(["w2"] * 10)
    model = toy_speech_lm.speech_lm(prompt="{audio} " + words, decoder={"max_positions": 12})
    assert (len(model.prompt), model.room(1)) == (10, 1)
    says = "the prompt has 11 tokens, and the decoder has 12 positions for .* of at most 10"
    with pytest.raises(ConfigError, match=says):
        toy_speech_lm.speech_lm(prompt=words + " {audio} w3", decoder={"max_positions": 12})


def test_a_text_without_room_is_refused() -> None:
    model = toy_speech_lm.speech_lm(decoder={"max_positions": 12})
    heard = model.hear(*features([40, 12]))
    assert model.read(heard, [[2] * 7, []]).shape == (2, 8, 32)
    with pytest.raises(InputError, match="text take 13 positions, and the decoder has 12"):
        model.read(heard, [[2] * 8, []])
    with pytest.raises(InputError, match="there are 1 texts for 2 utterances"):
        model.read(heard, [[2]])


def test_an_utterance_too_short_for_the_encoder_is_refused() -> None:
    model = toy_speech_lm.speech_lm(encoder={"pad_edges": False})
    with pytest.raises(InputError, match="needs 7 to 20 frames"):
        model.hear(*features([20, 6]))


def test_parts_of_another_model_are_refused() -> None:
    config = toy_speech_lm.config()
    prompt = PromptTokens.of(config, toy_speech_lm.tokenizer())
    other = toy_speech_lm.config(encoder={"d_ff": 30}, decoder={"d_ff": 30})
    encoder, decoder = config.encoder, config.decoder
    assert isinstance(encoder, EncoderConfig)
    assert isinstance(other.encoder, EncoderConfig)
    with pytest.raises(ConfigError, match="the encoder given is EncoderConfig"):
        SpeechLM(config, prompt, CTCEncoder(other.encoder), DecoderLM(decoder))
    with pytest.raises(ConfigError, match="the decoder given is DecoderConfig"):
        SpeechLM(config, prompt, CTCEncoder(encoder), DecoderLM(other.decoder))
    with pytest.raises(ConfigError, match="the encoder given is None"):
        SpeechLM(config, prompt, toy_hf.toy("parakeet"), DecoderLM(decoder))


def test_a_tokenizer_that_cannot_write_the_prompt_is_refused() -> None:
    without = TextTokenizer(Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match="no tokens for ' hello' of the prompt"):
        PromptTokens.of(toy_speech_lm.config(prompt="{audio} hello"), without)
    large = toy_speech_lm.tokenizer([f"w{i}" for i in range(60)])
    with pytest.raises(ConfigError, match="the tokenizer has 62 tokens and the decoder 61"):
        PromptTokens.of(toy_speech_lm.config(), large)
    other = TextTokenizer(Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ConfigError, match=r"has 1 tokens and none for \[1\], which begin or end"):
        PromptTokens.of(toy_speech_lm.config(), other)


def test_what_ctc_wrote_is_spelled_in_the_decoders_own_embeddings() -> None:
    model = toy_speech_lm.speech_lm(projector=ProjectorConfig(1, 20, "ctc"), ctc_exit=3).double()
    (x, lengths) = features(LENGTHS)
    heard_by = x.double()
    heard = model.hear(heard_by, lengths, ())
    assert heard.ctc_log_probs is not None, "it is read whatever was asked for"
    assert isinstance(model.projector, CTCProjector)
    state = model.encoder.run(model.encoder.embed(heard_by, lengths), 0, 5)
    best = heard.ctc_log_probs.argmax(-1)
    labels = [row[:n] for row, n in zip(best, heard.frames, strict=True)]
    begins = [token_runs(row, toy_speech_lm.V) for row in labels]
    plain = model.projector(state.h, state.lengths, begins)
    for ours, audio, row, at in zip(heard.audio, plain, labels, begins, strict=True):
        spelled = [
            torch.zeros(model.config.decoder.d_model).double()
            if label == toy_speech_lm.V
            else model.decoder.embed(torch.tensor([[label]]))[0, 0]
            for label in row[at].tolist()
        ]
        torch.testing.assert_close(ours, audio + torch.stack(spelled))
