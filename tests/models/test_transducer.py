"""The transducer's laws: streams write what the whole writes, and the future changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toy_transducer
from offramp.audio.features import FeatureConfig, StreamingLogMel, log_mel
from offramp.config import Chunking
from offramp.errors import InputError
from offramp.models.transducer import FeatureNorm, Transducer, emformer_rnnt_base
from thinned import thinned
from toy_encoder import features
from toy_transducer import (
    CHUNKING,
    CHUNKINGS,
    ENCODERS,
    KEPT,
    KEPT_CHUNKINGS,
    VARIANTS,
    streamed,
    transducer,
)

every_variant = pytest.mark.parametrize("changes", thinned(VARIANTS, KEPT))
every_encoder = pytest.mark.parametrize("changes", thinned(ENCODERS, KEPT))
every_chunking = pytest.mark.parametrize("chunking", thinned(CHUNKINGS, KEPT_CHUNKINGS))


def same(found: Tensor, expected: Tensor, lengths: Tensor, atol: float) -> None:
    """Equal in the true frames of every row."""
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=atol)


# -- sizes -------------------------------------------------------------------------------------


def test_the_public_reference_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Transducer(emformer_rnnt_base())

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    encoder, predictor = model.encoder, model.predictor
    assert count(encoder.input) == 10_240
    assert [count(layer) for layer in encoder.layers] == [3_153_408] * 20
    assert count(encoder.output_projection) == count(predictor.output) == 525_312
    assert count(encoder.output_norm) == count(predictor.output_norm) == 2_048
    assert count(predictor.embedding) == 2_097_664
    assert count(predictor.input_norm) == 1_024
    assert [count(layer) for layer in predictor.layers] == [2_102_272] * 3
    assert count(encoder) == 63_605_760
    assert count(predictor) == 8_932_864
    assert count(model.joiner) == 4_199_425
    assert count(model) == 76_738_049


# -- streams -----------------------------------------------------------------------------------


@every_encoder
@every_chunking
def test_streams_write_what_the_whole_writes(changes: Any, chunking: Chunking) -> None:
    """Ragged rows that end in the middle of chunks, in pieces of any size; padding is NaN."""
    model = transducer(**changes)
    x, n = features([41, 40, 1, 23])
    for kind, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model.to(kind)
        whole, lengths = model.encoder(x, n, chunking)
        assert whole.dtype == kind
        found, counts = streamed(model, x, n, [7, 1, 16], chunking)
        assert counts.tolist() == lengths.tolist()
        assert found.shape == whole.shape
        same(found, whole, lengths, atol)


@pytest.mark.parametrize("pieces", [[1], [2, 0, 5], [100]], ids=str)
@pytest.mark.parametrize("length", [1, 6, 7, 8, 9, 12, 13])
def test_however_a_stream_is_cut_and_wherever_it_ends(pieces: list[int], length: int) -> None:
    """A chunk is 6 feature frames, and 2 more must have come."""
    model = transducer(**VARIANTS["rotary"])
    x, n = features([length])
    whole, lengths = model.encoder(x, n)
    found, counts = streamed(model, x, n, pieces)
    assert counts.tolist() == lengths.tolist() == [-(-length // 2)]
    same(found, whole, lengths, 1e-5)


def test_a_chunk_is_written_as_soon_as_it_and_its_right_context_came() -> None:
    model = transducer()
    x, _ = features([40])
    with model.streaming(1) as state:
        written = [model.encoder.push(x[:, t : t + 1], state)[0].shape[1] for t in range(40)]
        assert [t + 1 for t in range(40) if written[t]] == [8, 14, 20, 26, 32, 38]
        assert set(written) == {0, CHUNKING.chunk}
        assert state.chunks == 6
        rest, count = model.encoder.finish(state)
        assert rest.shape[1] == int(count) == 2
        assert model.encoder.finish(state)[0].shape[1] == 0, "nothing is written twice"


def test_the_audio_reaches_the_top_of_a_new_model() -> None:
    """Its own share there; with layers that add as much as they get it would be a thousandth."""
    model = Transducer(toy_transducer.config(num_layers=12, kernel_size=5, positions="rotary"))
    model.init_weights(0)
    encoder = model.requires_grad_(False).eval().encoder
    state = encoder.embed(*features([40]))
    bottom, top = state.h, encoder.run(state, 0, 12).h
    bottom = F.layer_norm(bottom, bottom.shape[-1:])
    assert F.cosine_similarity(bottom, top, dim=-1).mean() > 0.7


@every_encoder
@pytest.mark.parametrize("chunking", [CHUNKING, CHUNKINGS["memory"], CHUNKINGS["nothing around"]])
def test_the_future_never_changes_the_past(changes: Any, chunking: Chunking) -> None:
    encoder = transducer(**changes).double().encoder
    r, S = encoder.config.time_reduction, chunking.chunk
    x, n = features([40])
    whole, _ = encoder(x, n, chunking)
    for heard in range(1, 40, 3):
        other = x.clone()
        other[:, heard:] += 3.0
        moved = (encoder(other, n, chunking)[0] - whole).abs().amax(-1)[0] > 1e-10
        chunks = max(0, (heard // r - chunking.right_context) // S)
        assert not moved[: chunks * S].any()
        assert moved[chunks * S :].any(), "and what follows does depend on it"


@every_encoder
def test_a_batch_gives_what_single_utterances_give(changes: Any) -> None:
    lengths = [41, 75, 1, 33, 2]
    encoder = transducer(**changes).encoder
    x, n = features(lengths)
    for chunking in (CHUNKING, CHUNKINGS["memory"]):
        together, counts = encoder(x, n, chunking)
        assert together.isfinite().all(), "padding too"
        for row, length in enumerate(lengths):
            alone, count = encoder(x[row : row + 1, :length], n[row : row + 1], chunking)
            assert int(count) == int(counts[row]) == encoder.config.output_frames(length)
            same(together[row : row + 1], alone, count, 1e-5)


def test_samples_cut_anywhere_give_what_the_recording_gives() -> None:
    """From audio to the joiner's side: features are the same at the edges of chunks."""
    samples = 0.1 * torch.randn(9_000, generator=torch.Generator().manual_seed(0))
    config = FeatureConfig(num_mels=8)
    model = transducer(**VARIANTS["convolution"])
    x = log_mel(samples, config)[None]
    whole, lengths = model.encoder(x, torch.tensor([x.shape[1]]))
    stream, found = StreamingLogMel(config), []
    with model.streaming(1) as state:
        for piece in samples.split([1, 2_000, 399, 3_333, 160, 3_107]):
            found.append(model.encoder.push(stream.push(piece)[None], state)[0])
        found.append(model.encoder.finish(state)[0])
    same(torch.cat(found, dim=1), whole, lengths, 1e-5)


@pytest.mark.parametrize("chunking", [CHUNKING, CHUNKINGS["memory"]])
def test_a_stream_can_be_saved_and_resumed_anywhere(chunking: Chunking) -> None:
    model = transducer(**VARIANTS["all together"])
    x, _ = features([80, 80])
    whole, _ = model.encoder(x, torch.tensor([80, 80]), chunking)
    for stop in (0, 3, 16, 41, 79):
        with model.streaming(2, chunking) as state:
            first, _ = model.encoder.push(x[:, :stop], state)
            saved = state.tensors()
            model.encoder.push(torch.ones(2, 40, 8), state)  # what was saved is a copy
        with model.streaming(2, chunking) as state:
            state.restore(saved)
            second, _ = model.encoder.push(x[:, stop:], state)
            third, _ = model.encoder.finish(state)
        torch.testing.assert_close(
            torch.cat((first, second, third), dim=1), whole, rtol=0, atol=1e-5
        )
    assert saved["counts"].tolist() == [*vars(chunking).values(), 79 // 4 // 3]


def test_the_state_of_a_stream_does_not_grow() -> None:
    model = transducer(**VARIANTS["convolution"])
    x = torch.zeros(2, 6, 8)
    with model.streaming(2) as state:
        sizes = set()
        for _ in range(50):
            model.encoder.push(x, state)
            sizes.add(state.nbytes)
        # 3 layers of 4 keys, 4 values and 4 frames; the chunk that waits for its right context.
        assert sizes == {4 * 2 * (3 * (4 + 4 + 4) * 16 + 6 * 8) + 2 * 8 + 2}
        assert state.pending.untyped_storage().nbytes() == state.pending.nbytes


def test_rows_of_a_stream_do_not_touch_each_other() -> None:
    """NaN in one stream stays there."""
    model = transducer(**VARIANTS["all together"])
    x, _ = features([60])
    pair = torch.cat((x, torch.full_like(x, torch.nan)))
    alone, _ = streamed(model, x, torch.tensor([60]), [9])
    both, _ = streamed(model, pair, torch.tensor([60, 60]), [9])
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)


# -- the tower ---------------------------------------------------------------------------------


@every_encoder
@pytest.mark.parametrize("chunking", [CHUNKING, CHUNKINGS["memory"]])
def test_stopping_and_resuming_anywhere_changes_no_bit(changes: Any, chunking: Chunking) -> None:
    encoder = transducer(**changes).encoder
    x, n = features([61, 40])
    whole, _ = encoder(x, n, chunking)
    for stop in range(4):
        state = encoder.run(encoder.embed(x, n, chunking), 0, stop)
        assert torch.equal(encoder.output(encoder.run(state, stop, 3)), whole)


def test_chunkings_differ_in_what_is_heard() -> None:
    """Else one model could not be shown to serve them."""
    encoder = transducer(positions="rotary").encoder
    x, n = features([61])
    outputs = [encoder(x, n, chunking)[0] for chunking in CHUNKINGS.values()]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(encoder(x, n)[0], outputs[0])


# -- features ----------------------------------------------------------------------------------


def test_statistics_are_measured_over_all_frames() -> None:
    generator = torch.Generator().manual_seed(0)
    utterances = [5 + 3 * torch.randn(n, 8, generator=generator) for n in (200, 1, 0, 31)]
    norm = FeatureNorm(8)
    assert torch.equal(norm(utterances[0]), utterances[0])
    norm.measure(utterances)
    normal = norm(torch.cat(utterances))
    assert normal.mean(dim=0).abs().max() < 1e-4
    assert (normal.var(dim=0, correction=0) - 1).abs().max() < 1e-4
    norm.measure([torch.full((9, 8), -15.9)])
    assert norm(torch.full((9, 8), -15.9)).abs().max() < 1e-3, "what never varies is 0"


@pytest.mark.parametrize("utterances", [[], [torch.zeros(0, 8)], [torch.full((2, 8), torch.nan)]])
def test_statistics_of_nothing_are_refused(utterances: list[Tensor]) -> None:
    norm = FeatureNorm(8)
    with pytest.raises(InputError, match=r"cannot measure features over \d frames"):
        norm.measure(utterances)
    assert not norm.mean.any()


# -- the joiner --------------------------------------------------------------------------------


@every_variant
def test_a_joiner_broadcasts_and_normalises(changes: Any) -> None:
    model = transducer(**changes)
    generator = torch.Generator().manual_seed(1)
    encoded = torch.randn(2, 5, 1, 20, generator=generator)
    predicted = torch.randn(2, 1, 3, 20, generator=generator)
    log_probs = model.joiner.log_probs(encoded, predicted)
    assert log_probs.shape == (2, 5, 3, 11)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 5, 3))
    logits = model.joiner(encoded, predicted)
    torch.testing.assert_close(logits.log_softmax(-1), log_probs)
    single = model.joiner.log_probs(encoded[1, 4, 0], predicted[1, 0, 2])
    torch.testing.assert_close(single, log_probs[1, 4, 2])
    assert (
        transducer(**changes).half().joiner.log_probs(encoded.half(), predicted.half()).dtype
        == torch.float32
    )


@pytest.mark.parametrize("blank_id", [0, 4, 10])
def test_a_factorised_blank_leaves_the_rest_to_the_labels(blank_id: int) -> None:
    joiner = transducer(factorised_blank=True, blank_id=blank_id).joiner
    assert joiner.blank is not None
    generator = torch.Generator().manual_seed(1)
    e, p = (torch.randn(7, 20, generator=generator) for _ in range(2))
    h = (e + p).relu()
    blank = joiner.blank(h)[:, 0].sigmoid()
    labels = joiner.tokens(h).softmax(-1) * (1 - blank[:, None])
    probs = joiner.log_probs(e, p).exp()
    torch.testing.assert_close(probs[:, blank_id], blank)
    others = [v for v in range(11) if v != blank_id]
    torch.testing.assert_close(probs[:, others], labels)
    known = joiner.blank_logit(e, p)
    torch.testing.assert_close(known.sigmoid(), blank)
    scored = []
    joiner.blank.register_forward_hook(lambda *_: scored.append("blank"))
    torch.testing.assert_close(joiner.log_probs(e, p, known).exp(), probs)
    assert scored == []


def test_the_blank_can_be_scored_without_the_labels() -> None:
    model = transducer(factorised_blank=True)
    called = []
    model.joiner.tokens.register_forward_hook(lambda *_: called.append("labels"))
    assert model.joiner.blank_logit(torch.zeros(3, 20), torch.zeros(3, 20)).shape == (3,)
    assert called == []


def test_what_a_model_does_not_have_is_refused() -> None:
    model = transducer()
    with pytest.raises(InputError, match="needs a model with factorised_blank"):
        model.joiner.blank_logit(torch.zeros(1, 20), torch.zeros(1, 20))
    with pytest.raises(InputError, match="has no CTC head; set ctc_head"):
        model.ctc_log_probs(torch.zeros(1, 2, 20))


# -- training ----------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("memory", [0, 2])
def test_every_parameter_is_trained(changes: Any, memory: int) -> None:
    model = transducer(**changes).requires_grad_(True).train()
    encoded, lengths = model.encoder(*features([61, 40, 3]), replace(CHUNKING, memory=memory))
    predicted = model.predictor(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    loss = model.joiner.log_probs(encoded[:, :, None], predicted[:, None]).square().mean()
    if model.ctc_head is not None:
        loss = loss + model.ctc_log_probs(encoded).square().mean()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert lengths.tolist() == [model.config.output_frames(n) for n in (61, 40, 3)]


def test_dropout_is_for_training_alone() -> None:
    model = transducer(dropout=0.5)
    x, n = features([61])
    assert torch.equal(model.encoder(x, n)[0], transducer().encoder(x, n)[0])
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model.encoder(x, n)[0], model.encoder(x, n)[0])


def test_initial_weights_are_a_function_of_the_seed() -> None:
    changes = VARIANTS["all together"]

    def weights(seed: int) -> list[Tensor]:
        model = Transducer(toy_transducer.config(**changes))
        model.init_weights(seed)
        return list(model.state_dict().values())

    assert all(map(torch.equal, weights(3), weights(3)))
    assert not all(map(torch.equal, weights(3), weights(4)))
    model = transducer(**changes)
    mean = model.encoder.feature_norm.mean.clone()
    model.init_weights(0)
    assert torch.equal(model.encoder.feature_norm.mean, mean), "measured, not drawn"
    assert torch.equal(model.encoder.layers[0].norm.weight, torch.ones(16))
    assert not model.joiner.tokens.bias.any()
    assert 0.8 < float(model.predictor.embedding.weight.std()) < 1.2
    limit = (6 / (16 + 24)) ** 0.5
    assert 0.9 * limit < model.encoder.layers[0].feed_forward.up.weight.abs().max() <= limit


# -- refusals ----------------------------------------------------------------------------------


def test_a_stream_is_of_use_inside_its_scope_alone() -> None:
    model = transducer()
    with model.streaming(1) as state:
        pass
    for use in (model.encoder.finish, lambda s: model.encoder.push(torch.zeros(1, 1, 8), s)):
        with pytest.raises(InputError, match="the stream is closed"):
            use(state)
    with pytest.raises(InputError, match="the stream is closed"):
        state.tensors()
    assert state.nbytes == 0
    with pytest.raises(RuntimeError, match="mine"), model.streaming(1) as state:
        raise RuntimeError("mine")
    assert state.closed
    with pytest.raises(InputError, match="batch_size is 0"), model.streaming(0):
        pass


def test_an_ended_row_gets_no_more() -> None:
    model = transducer()
    with model.streaming(2) as state:
        model.encoder.push(torch.zeros(2, 5, 8), state, torch.tensor([5, 3]))
        model.encoder.push(torch.zeros(2, 5, 8), state, torch.tensor([5, 0]))
        with pytest.raises(InputError, match=r"of which \[1\] have ended"):
            model.encoder.push(torch.zeros(2, 5, 8), state)
        with pytest.raises(InputError, match=r"rows \[5\] came to 2 streams"):
            model.encoder.push(torch.zeros(1, 5, 8), state)
        model.encoder.finish(state)
        with pytest.raises(InputError, match=r"of which \[0, 1\] have ended"):
            model.encoder.push(torch.zeros(2, 5, 8), state)


def test_a_state_of_another_stream_is_refused() -> None:
    model = transducer(**VARIANTS["convolution"])
    with model.streaming(2) as state:
        model.encoder.push(torch.zeros(2, 5, 8), state)
        saved = state.tensors()
        for wrong, says in (
            (
                {k: v for k, v in saved.items() if k != "keys"},
                "the saved stream holds chunks|count",
            ),
            ({**saved, "keys": saved["keys"][:2]}, "keys of the saved stream is torch.float32 .2,"),
            ({**saved, "values": saved["values"].double()}, "values of .* is torch.float64"),
            ({**saved, "counts": torch.tensor([2, 4, 1, 0, 5])}, r"has Chunking\(chunk=2, .*same"),
        ):
            with pytest.raises(InputError, match=says):
                state.restore(wrong)
        assert all(torch.equal(v, saved[k]) for k, v in state.tensors().items())
    with model.streaming(1) as state, pytest.raises(InputError, match="another model or batch"):
        state.restore(saved)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (3, 2), (1, 2)])
def test_layers_out_of_turn_are_refused(start: int, stop: int) -> None:
    encoder = transducer().encoder
    state = encoder.embed(*features([61]))
    with pytest.raises(InputError, match=f"layers {start} to {stop} .*from 0, where .*most 3"):
        encoder.run(state, start, stop)
    with pytest.raises(InputError, match="0 layers ran; the output follows all 3"):
        encoder.output(state)


@pytest.mark.parametrize("lengths", [[0, 20], [21, 9], [20], [-3, 20], [20, 20, 20]])
def test_lengths_that_cannot_be_are_refused(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=r"lengths are \[.*each row needs 1 to 20 frames"):
        transducer().encoder(torch.zeros(2, 20, 8), torch.tensor(lengths))


@pytest.mark.parametrize("shape", [(1, 20, 9), (20, 8), (0, 20, 8)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \[batch, frames, 8\]"):
        transducer().encoder(torch.zeros(shape), torch.full((shape[0],), 20))
