"""stream-tiny: a streaming transducer of 4.9 M parameters, on the data of asr-tiny, from nothing.

Chunks of 320 ms in use, of 160 ms to the whole utterance in training; 80 ms of right context. In
the first 1,000 steps CTC teaches the encoder more than the transducer does. Frames of 80 ms: with
40 ms a step takes half as much again, and asr-tiny learnt no worse from them.

A step on 60 s of audio takes about 0.8 s of one core (Zen 4, one thread, beside other work). From
nothing it did not learn in 2,900 steps: docs/log.md says what is missing before it.
"""

from offramp.config import Chunking, TransducerConfig
from offramp.data.augment_audio import AudioAugmentation
from offramp.train.augment import SpecAugment
from offramp.train.loop import TrainConfig
from offramp.train.speech import TransducerRecipe
from offramp.train.transducer import TransducerTraining

recipe = TransducerRecipe(
    name="stream-tiny",
    model=TransducerConfig(
        d_model=192,
        num_layers=10,
        num_heads=4,
        d_ff=512,
        vocab_size=256,
        d_predictor=192,
        d_joint=256,
        chunking=Chunking(chunk=4, left_context=16, right_context=1),
        predictor="stateless",
        time_reduction=8,
        positions="rotary",
        kernel_size=8,
        factorised_blank=True,
        ctc_head=True,
        dropout=0.05,
    ),
    sets=(
        "mini_librispeech_train_clean_5",
        "kathleen_arctic",
        "kathleen_more_takes",
        "ljspeech_excerpt",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    digit_strings=400,
    digits_in_string=(1, 7),
    synthetic_sentences=500,
    augmentation=AudioAugmentation(
        p_speed=0.8,
        p_reverberation=0.15,
        p_noise=0.3,
        snr_db=(10.0, 30.0),
        p_telephone=0.05,
        p_volume=0.5,
    ),
    batch_seconds=60.0,
    training=TransducerTraining(
        chunks=(2, 4, 4, 8, 0),
        window=5,
        ctc=0.3,
        ramp_steps=1000,
        fastemit=0.005,
        augment=SpecAugment(max_channels=12, time_masks=4, max_time=0.04),
        autocast="bf16",
    ),
    dev_sets=(
        "kathleen_arctic",
        "mini_librispeech_train_clean_5",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    train=TrainConfig(
        steps=12_000,
        lr=1.5e-3,
        warmup_steps=300,
        optimizer="muon",
        weight_decay=0.05,
        checkpoint_every=100,
        evaluate_every=500,
    ),
)
