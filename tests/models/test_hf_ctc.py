"""Exits on transformers' CTC models: the last is transformers', the others are the tower's laws."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from offramp.energy.hf_cost import shape_mac_cost, shape_trail_macs
from offramp.errors import ConfigError, InputError
from offramp.models.hf_ctc import PretrainedCTCEncoder, attach_exits
from thinned import thinned
from toy_hf import KEPT, LENGTHS, MODELS, L, V, all_exits, inputs, theirs, toy

transformers = pytest.importorskip("transformers")


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@pytest.fixture(params=thinned(MODELS.keys(), keep=("wavlm layer norm first", "parakeet")))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


# -- equal to transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", thinned(MODELS.keys(), KEPT))
def test_the_last_exit_is_transformers_own(name: str) -> None:
    x, lengths = inputs(name)
    encoder = toy(name)
    for row, n in enumerate(lengths.tolist()):
        own, alone = encoder.base(x[row : row + 1, :n]).logits, torch.tensor([n])
        state = encoder.embed(x[row : row + 1, :n], alone)
        state = encoder.run(state, 0, L)
        assert state.lengths.tolist() == [own.shape[1]]
        assert_close(encoder.logits(state, L), own, 1e-4)
        assert own.std() > 0.05  # random weights that do something


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_a_batch_is_transformers_own_where_padding_does_not_matter_to_it(name: str) -> None:
    x, lengths = inputs(name)
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    encoder = toy(name)
    own = encoder.base(x.clone(), attention_mask=mask.long()).logits
    state = encoder.run(encoder.embed(x, lengths), 0, L)
    ours = encoder.logits(state, L)
    differences = [
        float((a[:n] - b[:n]).abs().max())
        for a, b, n in zip(ours, own, state.lengths.tolist(), strict=True)
    ]
    if MODELS[name][2]:
        assert max(differences) < 1e-4
    else:  # ours gives what the row gives alone, which is why these differ
        assert max(differences) > 1e-3


def test_every_layer_is_transformers_own(name: str) -> None:
    """Through exits everywhere, against transformers' record of its hidden states."""
    x, lengths = inputs(name)
    x, lengths = x[1:2], lengths[1:2]
    encoder = toy(name, exits=tuple(range(1, L + 1)))
    hidden = encoder.base(x, output_hidden_states=True).hidden_states
    state = encoder.embed(x, lengths)
    for layer in range(L):
        assert_close(state.h, hidden[layer], 1e-4)
        state = encoder.run(state, layer, layer + 1)
    if MODELS[name][1].get("do_stable_layer_norm") is None:  # else the last one is normed
        assert_close(state.h, hidden[L], 1e-4)


# -- a tower -------------------------------------------------------------------------------------


def test_a_batch_gives_what_each_utterance_gives_alone(name: str) -> None:
    encoder = toy(name)
    x, lengths = inputs(name)
    batched = all_exits(encoder, x, lengths)
    frames = encoder.embed(x, lengths).lengths
    for row, n in enumerate(lengths.tolist()):
        alone = all_exits(encoder, x[row : row + 1, :n], torch.tensor([n]))
        for exit_layer, log_probs in alone.items():
            assert log_probs.shape[1] == frames[row]
            assert_close(batched[exit_layer][row, : frames[row]], log_probs[0])


def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    encoder = toy(name)
    clean, lengths = inputs(name)
    dirty, _ = inputs(name, padding=torch.nan)
    wide = torch.cat((dirty, torch.full_like(dirty, 7.0)), dim=1)
    expected, found = all_exits(encoder, clean, lengths), all_exits(encoder, wide, lengths)
    frames = encoder.embed(clean, lengths).lengths
    for exit_layer, log_probs in expected.items():
        for row, T in enumerate(frames.tolist()):
            assert_close(found[exit_layer][row, :T], log_probs[row, :T])


def test_resumed_is_whole_and_no_layer_runs_twice(name: str) -> None:
    encoder = toy(name)
    x, lengths = inputs(name)
    layers = encoder.base.encoder if MODELS[name][0] == "Parakeet" else encoder._family._encoder
    calls: list[int] = []
    for i, layer in enumerate(layers.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    start = encoder.embed(x, lengths)
    assert calls == []
    whole = encoder.run(start, 0, L)
    assert calls == list(range(L))
    calls.clear()
    state = encoder.run(encoder.run(start, 0, 2), 2, 2)
    encoder.log_probs(state, 2)
    assert calls == [0, 1]  # nothing beyond the exit
    state = encoder.run(encoder.run(state, 2, 3), 3, L)
    assert calls == list(range(L))
    assert torch.equal(state.h, whole.h) and state.layer == L


@pytest.mark.parametrize("rows", [[2, 0], [1]])
def test_selected_rows_go_on_as_they_would_have(name: str, rows: list[int]) -> None:
    encoder = toy(name)
    state = encoder.run(encoder.embed(*inputs(name)), 0, 2)
    expected = encoder.log_probs(encoder.run(state, 2, L), L)
    some = state.select(rows)
    assert some.h.shape[1] == int(state.lengths[rows].max())
    found = encoder.log_probs(encoder.run(some, 2, L), L)
    for row, now in zip(rows, range(len(rows)), strict=True):
        T = int(state.lengths[row])
        assert_close(found[now, :T], expected[row, :T])
    again = some.select([0]).select(torch.tensor([0]))  # also after it was trimmed
    T = int(state.lengths[rows[0]])
    assert_close(encoder.log_probs(encoder.run(again, 2, L), L)[0, :T], expected[rows[0], :T])


def test_log_probabilities_are_float32_and_sum_to_1(name: str) -> None:
    encoder = toy(name).bfloat16()
    x, lengths = inputs(name)
    for log_probs in all_exits(encoder, x, lengths).values():
        assert log_probs.dtype == torch.float32 and log_probs.shape[2] == V
        assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))


def test_states_and_exits_are_checked() -> None:
    encoder = toy("parakeet")
    x, lengths = inputs("parakeet")
    state = encoder.run(encoder.embed(x, lengths), 0, 2)
    for start, stop in ((0, 2), (2, 1), (2, L + 1), (3, 4)):
        with pytest.raises(InputError, match="after 2 layers"):
            encoder.run(state, start, stop)
    for exit_layer in (4, 3, L):
        with pytest.raises(InputError, match="after 2 layers"):
            encoder.log_probs(state, exit_layer)
    with pytest.raises(InputError, match="no rows"):
        state.select([])
    with pytest.raises(InputError, match=r"features \[B, T, 16\]"):
        encoder.embed(x[..., :9], lengths)
    for wrong in ((x, lengths + 99), (x, lengths[:2]), (x[:0], lengths[:0])):
        with pytest.raises(InputError, match="one true length"):
            encoder.embed(*wrong)
    with pytest.raises(InputError, match="no frame"):
        toy("wavlm group norm").embed(torch.zeros(2, 400), torch.tensor([400, 9]))


# -- exits ---------------------------------------------------------------------------------------


def test_default_exits_are_every_second_layer() -> None:
    assert attach_exits(theirs("parakeet")).config.exits == (2, 4, 5)
    even = theirs("hubert group norm", num_hidden_layers=4)
    assert attach_exits(even).config.exits == (2, 4)
    for exits in ((), (0, L), (2, 4), (3, 3, L), (4, 2, L), (2, L, L + 1)):
        with pytest.raises(ConfigError, match="exits"):
            attach_exits(even if exits == (2, L, L + 1) else theirs("parakeet"), exits)


def test_a_new_exit_reads_through_a_copy_of_the_last_norm_and_head() -> None:
    for name, norm in (("wav2vec2 layer norm first", True), ("parakeet", False)):
        encoder = attach_exits(theirs(name))
        state = encoder.run(encoder.embed(*inputs(name)), 0, 2)
        h = state.h
        if norm:
            last = encoder.base.lm_head(encoder.base.wav2vec2.encoder.layer_norm(h))
        else:
            last = encoder.base.ctc_head(torch.nn.functional.layer_norm(h, h.shape[-1:]))
        assert_close(encoder.logits(state, 2), last)


def test_what_decoding_needs_to_know() -> None:
    config = toy("parakeet").config
    assert (config.blank_id, config.vocab_size, config.num_layers) == (V - 1, V, L)
    assert (config.input_size, config.hop, config.family) == (16, 8, "parakeet_ctc")
    config = toy("wavlm layer norm first").config
    assert (config.blank_id, config.input_size, config.hop) == (0, None, 20)


# -- compute -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_macs_are_those_of_the_products_that_run(name: str) -> None:
    """Against torch's own count of floating-point operations: two for a multiply-accumulate."""
    encoder = toy(name, exits=(2, 4, L))
    encoder.base.set_attn_implementation("eager")  # torch does not count fused attention
    for n in LENGTHS:
        x, _ = inputs(name)
        alone = x[1:2, : n // 10] if x.ndim == 3 else x[1:2, :n]
        length, spent = alone.shape[1], 0.0
        cost = shape_mac_cost(encoder.config.shape)
        with FlopCounterMode(display=False) as counter:
            state = encoder.embed(alone, torch.tensor([length]))
            for exit_layer in (2, 4, L):
                before, start = counter.get_total_flops(), state.layer
                state = encoder.run(state, start, exit_layer)
                encoder.log_probs(state, exit_layer)
                tested = tuple(e for e in (2, 4, L) if e <= exit_layer)
                macs = shape_trail_macs(encoder.config.shape, length, tested)
                assert macs == counter.get_total_flops() / 2
                spent = counter.get_total_flops() - before
                T = int(state.lengths)
                if start:
                    assert cost(start, exit_layer, T) == spent / 2
        assert encoder.config.output_frames(length) == T
        most = encoder.config.shape.most_inputs(T)
        frames = [encoder.config.output_frames(most + more) for more in (0, 1)]
        assert frames == [T, T + 1] and most >= length
        assert cost(0, 2, T) == shape_trail_macs(encoder.config.shape, most, (2,))


def test_inputs_without_a_frame_are_known() -> None:
    config = toy("wavlm group norm").config
    assert [config.output_frames(n) for n in (0, 9, 100)] == [0, 0, 4]


# -- training ------------------------------------------------------------------------------------


def gradients(encoder: PretrainedCTCEncoder, name: str) -> set[str]:
    """Names of the parameters that a CTC loss over all exits reaches."""
    x, lengths = inputs(name)
    frames = encoder.embed(x, lengths).lengths
    targets, sizes = torch.tensor([[1, 2], [3, 1], [2, 3]]), torch.tensor([2, 2, 2])
    loss = sum(
        torch.nn.functional.ctc_loss(
            p.transpose(0, 1), targets, frames, sizes, encoder.config.blank_id
        )
        for p in all_exits(encoder, x, lengths).values()
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    return {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}


def test_heads_alone_or_everything_can_be_trained(name: str) -> None:
    encoder = toy(name).requires_grad_(True).train()
    reached = gradients(encoder, name)
    unused = {n for n, _ in encoder.named_parameters()} - reached
    # A key's bias shifts all its row's scores alike; the mask vector is SpecAugment's.
    assert all(re.search(r"k_proj\.bias|masked_spec_embed", n) for n in unused), unused
    encoder.zero_grad(set_to_none=True)
    encoder.freeze_base()
    assert gradients(encoder, name) == {n for n, _ in encoder.named_parameters() if "heads." in n}


def test_a_frozen_model_stays_as_it_is_in_training() -> None:
    encoder = toy("parakeet").train()
    encoder.freeze_base()
    before = {k: v.clone() for k, v in encoder.base.state_dict().items()}
    a, b = (all_exits(encoder, *inputs("parakeet"))[L] for _ in range(2))
    assert torch.equal(a, b)  # no dropout
    after = encoder.base.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # no new statistics
    assert encoder.training and not encoder.base.training
    encoder.freeze_base(False)
    assert encoder.base.training and all(p.requires_grad for p in encoder.base.parameters())
    a, b = (all_exits(encoder, *inputs("parakeet"))[L] for _ in range(2))
    assert not torch.equal(a, b)


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'Linear'"):
        attach_exits(torch.nn.Linear(2, 2))
    own = theirs("wav2vec2 group norm")
    with pytest.raises(ConfigError, match="Wav2Vec2Model; it must be a Wav2Vec2ForCTC"):
        attach_exits(own.wav2vec2)
    with pytest.raises(ConfigError, match="add_adapter"):
        attach_exits(theirs("wav2vec2 group norm", add_adapter=True, num_adapter_layers=1))
    own.config.pad_token_id = None
    with pytest.raises(ConfigError, match="blank"):
        attach_exits(own)
