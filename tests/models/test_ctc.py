"""The encoder's laws: stop and resume anywhere, pad and batch anyhow, and the result is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import toy_encoder
from offramp.config import EncoderConfig
from offramp.errors import InputError
from offramp.models.ctc import CTCEncoder, early_exit_baseline, improved, splitformer
from thinned import thinned
from toy_encoder import KEPT, OURS, VARIANTS, encoder, every_exit, features

L = 5
every_variant = pytest.mark.parametrize("changes", thinned(VARIANTS, KEPT))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CTCEncoder(config).parameters())


# -- sizes -------------------------------------------------------------------------------------


def test_the_published_models_have_the_published_number_of_parameters() -> None:
    assert parameters(early_exit_baseline()) == 31_536_128
    assert parameters(splitformer()) == 36_683_264


def test_each_part_of_the_published_model_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        model = CTCEncoder(splitformer())
    layer = model.layers[0]
    sizes = {
        "feed-forward": (layer.first_feed_forward, 1_051_392),
        "attention": (layer.attention, 263_168 + 512),
        "convolution": (layer.convolution, 206_592),
        "final norm": (layer.norm, 512),
        "layer": (layer, 2_573_568),
        "layers": (model.layers, 30_882_816),
        "branches": (model.branches, 5_147_136),
        "first convolution": (model.subsampling.convs[0], 61_696),
        "second convolution": (model.subsampling.convs[1], 196_864),
        "heads": (model.heads, 394_752),
    }
    counted = {name: sum(p.numel() for p in part.parameters()) for name, (part, _) in sizes.items()}
    assert counted == {name: size for name, (_, size) in sizes.items()}


def test_full_rate_branches_are_the_control_with_equal_parameters() -> None:
    half, full = (
        toy_encoder.config(branches=(2, 5)),
        toy_encoder.config(**VARIANTS["full-rate branches"]),
    )
    assert parameters(half) == parameters(full) > parameters(toy_encoder.config())


# -- stopping and resuming ---------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("lengths", [[61, 40, 33], [50, 50]], ids=["ragged", "even"])
def test_stopping_and_resuming_anywhere_changes_no_bit(changes: Any, lengths: list[int]) -> None:
    model, (x, n) = encoder(**changes), features(lengths)

    def run(*stops: int) -> Tensor:
        state = model.embed(x, n)
        for stop in (*stops, L):
            state = model.run(state, state.layer, stop)
        return model.log_probs(state, L)

    whole = run()
    assert whole.dtype == torch.float32
    assert all(torch.equal(run(stop), whole) for stop in range(L + 1))
    assert torch.equal(run(1, 2, 3, 4), whole)


@every_variant
def test_leaving_at_an_exit_reads_what_the_full_run_reads_there(changes: Any) -> None:
    model, (x, n) = encoder(**changes), features([61, 40])
    passed, _ = every_exit(model, x, n)
    for exit_layer in model.config.exits:
        state = model.run(model.embed(x, n), 0, exit_layer)
        assert torch.equal(model.log_probs(state, exit_layer), passed[exit_layer])
    assert not torch.allclose(passed[2], passed[5], atol=0.1)


@every_variant
def test_nothing_beyond_the_exit_runs(changes: Any) -> None:
    model, (x, n) = encoder(**changes), features([61, 40])
    ran: dict[str, int] = {}
    for name, module in model.named_modules():

        def count(*_: Any, name: str = name) -> None:
            ran[name] = ran.get(name, 0) + 1

        module.register_forward_hook(count)
    for exit_layer in model.config.exits:
        ran.clear()
        state = model.embed(x, n)
        for stop in range(1, exit_layer + 1):
            state = model.run(state, state.layer, stop)
        model.log_probs(state, exit_layer)
        passed = [e for e in model.config.exits if e < exit_layer]
        layers = [name for name in ran if name.startswith("layers.") and name.count(".") == 1]
        assert layers == [f"layers.{i}" for i in range(exit_layer)]
        assert all(ran[name] == 1 for name in layers)
        branches = {name for name in ran if name.startswith("branches.") and name.count(".") == 1}
        assert branches == {f"branches.{e}" for e in model.config.branches if e <= exit_layer}
        feedback = model.config.feedback
        assert ran.get("feedback", 0) == (len(passed) if feedback else 0)
        heads = sum(ran.get(f"heads.{i}", 0) for i in range(len(model.heads)))
        assert heads == (len(passed) if feedback else 0) + 1


@every_variant
def test_utterances_that_stay_are_not_disturbed_by_those_that_left(changes: Any) -> None:
    lengths = [41, 70, 33, 52]
    model, (x, n) = encoder(**changes), features(lengths)
    alone = []
    for row, length in enumerate(lengths):
        found, _ = every_exit(model, x[row : row + 1, :length], n[row : row + 1])
        alone.append(found[L][0])
    for stop in range(L):
        for rows in ([3, 0, 2], [1]):
            state = model.run(model.embed(x, n), 0, stop).select(rows)
            longest = max(model.config.output_frames(lengths[row]) for row in rows)
            assert state.h.shape[1] == longest
            assert state.lengths.tolist() == [model.config.output_frames(lengths[r]) for r in rows]
            state = model.run(state, stop, L)
            together = model.log_probs(state, L)
            for at, row in enumerate(rows):
                close(together[at, : len(alone[row])], alone[row])


# -- padding -----------------------------------------------------------------------------------


@every_variant
def test_a_batch_gives_what_single_utterances_give_at_every_exit(changes: Any) -> None:
    """Odd and even lengths on every rate; the padding of `features` is NaN."""
    lengths = [16, 75, 61, 40, 33, 68]
    model, (x, n) = encoder(**changes), features(lengths)
    together, state = every_exit(model, x, n)
    assert state.lengths.tolist() == [model.config.output_frames(length) for length in lengths]
    for row, length in enumerate(lengths):
        alone, single = every_exit(model, x[row : row + 1, :length], n[row : row + 1])
        T = model.config.output_frames(length)
        for exit_layer in model.config.exits:
            assert alone[exit_layer].shape == (1, T, 11)
            close(together[exit_layer][row, :T], alone[exit_layer][0])
        assert single.frames.real is None


@every_variant
@pytest.mark.parametrize("extra", [1, 64])
def test_extra_padding_changes_nothing(changes: Any, extra: int) -> None:
    model, (x, n) = encoder(**changes), features([61, 40])
    padded = torch.cat((x, torch.full((2, extra, 8), torch.inf)), dim=1)
    expected, _ = every_exit(model, x, n)
    found, _ = every_exit(model, padded, n)
    for exit_layer, log_probs in found.items():
        T = expected[exit_layer].shape[1]
        assert log_probs.shape[1] == T
        assert log_probs.isfinite().all()
        close(log_probs, expected[exit_layer])


@every_variant
def test_branches_see_half_the_true_frames_rounded_up(changes: Any) -> None:
    model = encoder(**changes)
    state = model.embed(*features([61, 64, 70, 33]))
    factor = model.config.branch_factor
    if model.config.branches:
        assert state.branch_frames is not None
        expected = [-(-n // factor) for n in state.lengths.tolist()]
        assert state.branch_frames.lengths.tolist() == expected
    else:
        assert state.branch_frames is None


@pytest.mark.parametrize("name", ["splitformer", "ours", "subsampling of 8"])
def test_audio_of_any_length_passes(name: str) -> None:
    """Down to a single frame, and beyond the reference's table of 2,000 positions."""
    model = encoder(**VARIANTS[name])
    least = 2 * model.config.subsampling - 1
    for length in (least, least + 1, 9000):
        found, _ = every_exit(model, *features([length]))
        for log_probs in found.values():
            assert log_probs.shape[1] == model.config.output_frames(length) >= 1
            assert log_probs.isfinite().all()


# -- options -----------------------------------------------------------------------------------


def test_a_branch_scaled_by_zero_leaves_the_plain_early_exit_model() -> None:
    changes = {**OURS, "branch_scale": 0.3}
    branched, plain = encoder(**changes), encoder(**{**OURS, "branches": ()})
    kept = {k: v for k, v in branched.state_dict().items() if not k.startswith("branches.")}
    plain.load_state_dict(kept)
    batch = features([61, 40])
    expected, _ = every_exit(plain, *batch)
    different, _ = every_exit(branched, *batch)
    for branch in branched.branches.values():
        branch.scale.zero_()
    found, _ = every_exit(branched, *batch)
    for exit_layer in plain.config.exits:
        assert torch.equal(found[exit_layer], expected[exit_layer])
        assert not torch.allclose(different[exit_layer], expected[exit_layer], atol=1e-2)


def test_a_branch_of_scale_one_is_the_published_unscaled_one() -> None:
    scaled, published = encoder(branches=(2, 5), branch_scale=1.0), encoder(branches=(2, 5))
    for branch in scaled.branches.values():
        branch.scale.fill_(1.0)
    state = {k: v for k, v in scaled.state_dict().items() if not k.endswith("scale")}
    published.load_state_dict(state)
    batch = features([61, 40])
    for a, b in zip(*(every_exit(m, *batch)[0].values() for m in (scaled, published)), strict=True):
        assert torch.equal(a, b)


def test_feedback_adds_the_posteriors_of_every_exit_passed() -> None:
    """Without its matrix the model is the one without feedback; its bias alone is a shift."""
    model, plain = encoder(**OURS), encoder(**{**OURS, "feedback": False})
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("feedback.")}
    plain.load_state_dict(state)
    x, n = features([61, 40])
    with_feedback, _ = every_exit(model, x, n)
    expected, at_exit = {}, plain.embed(x, n)
    for exit_layer in plain.config.exits:
        at_exit = plain.run(at_exit, at_exit.layer, exit_layer)
        expected[exit_layer] = plain.log_probs(at_exit, exit_layer)
        assert model.feedback is not None
        h = at_exit.h + model.feedback(expected[exit_layer].exp())
        at_exit = type(at_exit)(h, exit_layer, at_exit.frames, at_exit.branch_frames)
    for exit_layer, log_probs in with_feedback.items():
        close(log_probs, expected[exit_layer])
    without, _ = every_exit(plain, x, n)
    assert torch.equal(without[2], with_feedback[2])
    assert not torch.allclose(without[5], with_feedback[5], atol=1e-2)


def test_exits_share_one_norm_and_head_or_have_their_own() -> None:
    own, shared = encoder(), encoder(shared_head=True)
    assert (len(own.heads), own.norm) == (3, None)
    assert len(shared.heads) == 1
    state = shared.run(shared.embed(*features([61])), 0, 3)
    assert shared.norm is not None
    close(shared.log_probs(state, 3), shared.heads[0](shared.norm(state.h)).log_softmax(-1))
    state = own.run(own.embed(*features([61])), 0, 3)
    close(own.log_probs(state, 3), own.heads[1](state.h).log_softmax(-1))


def test_absolute_positions_are_added_once_and_rotary_ones_never() -> None:
    """With equal frames everywhere, only positions can tell them apart."""
    for positions, same in (("absolute", False), ("rotary", True)):
        h = encoder(positions=positions).embed(torch.ones(1, 50, 8), torch.tensor([50])).h
        assert torch.allclose(h, h[:, :1].expand_as(h), atol=1e-5) == same


@pytest.mark.parametrize("subsampling", [2, 4, 8])
def test_padded_edges_lose_no_frame_of_the_features(subsampling: int) -> None:
    """Every frame of every length has a say; without them the last ones may have none."""
    model = encoder(pad_edges=True, subsampling=subsampling)
    for length in range(1, 40):
        x, n = features([length])
        state = model.embed(x.requires_grad_(), n)
        assert state.h.shape[1] == -(-length // subsampling) == model.config.output_frames(length)
        state.h.square().sum().backward()
        assert x.grad is not None and bool((x.grad.abs().sum(-1) > 0).all())
    cut = encoder(pad_edges=False, subsampling=subsampling)
    x, n = features([39])
    cut.embed(x.requires_grad_(), n).h.square().sum().backward()
    assert x.grad is not None and bool((x.grad[:, -1] == 0).all()) == (
        39 % subsampling != subsampling - 1
    )


def test_improved_changes_every_option_and_no_size() -> None:
    ours = improved(early_exit_baseline())
    assert (ours.d_model, ours.num_layers, ours.exits) == (256, 12, (2, 4, 6, 8, 10, 12))
    assert {name: getattr(ours, name) for name in OURS} == OURS | {"branches": (2, 12)}


# -- training ----------------------------------------------------------------------------------


def test_padding_stays_out_of_the_statistics_of_training() -> None:
    """Batch norm: one utterance padded to twice its length updates what it updates alone."""
    alone, padded = encoder(branches=(2,)).train(), encoder(branches=(2,)).train()
    x, n = features([47])
    wide = torch.cat((x, torch.full((1, 50, 8), 7.0)), dim=1)
    pair = torch.cat((wide, wide[:, :]), dim=0)
    expected, _ = every_exit(alone, x.expand(2, -1, -1), n.expand(2))
    found, _ = every_exit(padded, pair, n.expand(2))
    for exit_layer, log_probs in found.items():
        close(log_probs, expected[exit_layer])
    # Beside a longer neighbour there is padding inside the tower as well.
    x, n = features([47, 80])
    model = encoder(branches=(2,)).train()
    reference = encoder(branches=(2,)).train()
    every_exit(model, x, n)
    x[0, 47:] = 1e4
    every_exit(reference, x, n)
    for name, value in model.named_buffers():
        close(value.float(), reference.get_buffer(name).float())


def test_rows_that_skip_a_layer_keep_their_state() -> None:
    model = encoder(**{**OURS, "feedback": False, "branches": ()})
    x, n = features([61, 40, 52])
    survivors = torch.ones(L, 3, dtype=torch.bool)
    assert torch.equal(
        model.run(model.embed(x, n), 0, L, survivors).h, model.run(model.embed(x, n), 0, L).h
    )
    survivors[1] = torch.tensor([True, False, True])
    before = model.run(model.embed(x, n), 0, 1)
    after, full = model.run(before, 1, 2, survivors), model.run(before, 1, 2)
    assert torch.equal(after.h[1], before.h[1])
    T = int(full.lengths[2])
    close(after.h[0], full.h[0])
    close(after.h[2, :T], full.h[2, :T])


@every_variant
def test_every_parameter_is_trained(changes: Any) -> None:
    model = encoder(**changes).requires_grad_(True).train()
    found, _ = every_exit(model, *features([61, 40]))
    sum(log_probs[0].square().sum() for log_probs in found.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_initial_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> list[Tensor]:
        model = CTCEncoder(toy_encoder.config(**OURS))
        model.init_weights(seed)
        return list(model.state_dict().values())

    assert all(map(torch.equal, weights(3), weights(3)))
    assert not all(map(torch.equal, weights(3), weights(4)))
    model = CTCEncoder(toy_encoder.config(**OURS))
    toy_encoder.randomize(model, 0)
    model.init_weights(0)
    assert torch.equal(model.branches["2"].scale, torch.full((16,), 0.5))
    assert not model.branches["2"].down.scores.any()
    assert torch.equal(model.layers[0].norm.weight, torch.ones(16))
    assert not model.layers[0].attention.qkv.bias.any()
    limit = (6 / (16 + 24)) ** 0.5
    up = model.layers[0].first_feed_forward.up.weight
    assert 0.9 * limit < up.abs().max() <= limit


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2), (1, 2)])
def test_layers_out_of_turn_are_refused(start: int, stop: int) -> None:
    model = encoder()
    state = model.embed(*features([61]))
    with pytest.raises(InputError, match=f"layers {start} to {stop} .*from 0, where .*most 5"):
        model.run(state, start, stop)


@pytest.mark.parametrize(("ran", "asked"), [(2, 3), (4, 4), (0, 0), (5, 2)])
def test_an_exit_that_was_not_just_reached_is_refused(ran: int, asked: int) -> None:
    model = encoder(**OURS)
    state = model.run(model.embed(*features([61])), 0, ran)
    with pytest.raises(InputError, match=f"exit layer is {asked}, and {ran} layers ran; .*2, 3, 5"):
        model.log_probs(state, asked)


@pytest.mark.parametrize("lengths", [[6, 20], [21, 9], [0], [-3, 20], [20, 20, 20]])
def test_lengths_that_cannot_be_are_refused(lengths: list[int]) -> None:
    x = torch.zeros(max(1, min(2, len(lengths))), 20, 8)
    with pytest.raises(InputError, match=r"lengths are \[.*each row needs 7 to 20 frames"):
        encoder().embed(x, torch.tensor(lengths))


@pytest.mark.parametrize("shape", [(1, 20, 9), (20, 8), (0, 20, 8)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \[batch, frames, 8\]"):
        encoder().embed(torch.zeros(shape), torch.full((shape[0],), 20))


def test_selecting_nobody_is_refused() -> None:
    with pytest.raises(InputError, match="select got no rows"):
        encoder().embed(*features([61])).select([])
