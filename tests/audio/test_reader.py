"""What our encoders read: lengths that the tower can take, and frames at their times."""

from __future__ import annotations

import pickle

import pytest
import torch

from offramp.audio.features import FeatureConfig, encoder_input
from offramp.audio.reader import LogMelReader
from offramp.errors import InputError
from toy_encoder import encoder

SHAPES = [
    {"subsampling": 4, "pad_edges": False},
    {"subsampling": 8, "pad_edges": False},
    {"subsampling": 8, "pad_edges": True},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_are_those_of_the_input_or_zero_where_the_tower_has_no_frame(shape: dict) -> None:
    model = encoder(**shape)
    reader, refused, longest = LogMelReader(model.config), 0, 160 * 30
    for num_samples in range(400, longest, 53):
        x, lengths = reader.inputs([torch.ones(num_samples)])
        if reader.num_inputs(num_samples):
            assert lengths.tolist() == [reader.num_inputs(num_samples)] == [x.shape[1]]
            frames = model.embed(x, lengths).lengths
            # Frames are where they are said to be: the last one starts inside the samples.
            last_s = reader.first_frame_s + reader.frame_s * (int(frames) - 1)
            assert 0.0 <= reader.first_frame_s <= last_s < num_samples / 16_000
        else:
            refused += 1
            with pytest.raises(InputError):
                model.embed(x, lengths)
    assert (refused > 0) != shape["pad_edges"]
    assert reader.num_inputs(399) == 0, "no window"


def test_a_batch_is_padded_features_and_the_reader_pickles() -> None:
    model = encoder(num_mels=12)
    samples = [torch.randn(n) for n in (3_000, 8_000)]
    found = pickle.loads(pickle.dumps(LogMelReader(model.config))).inputs(samples)
    for ours, theirs in zip(found, encoder_input(samples, FeatureConfig(num_mels=12)), strict=True):
        assert torch.equal(ours, theirs)
