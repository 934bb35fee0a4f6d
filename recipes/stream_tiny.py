"""stream-tiny: a streaming transducer of 4.9 M parameters, on the data of asr-tiny, from nothing.

Chunks of 320 ms in use, of 160 ms to the whole utterance in training; 80 ms of right context. In
the first 1,000 steps CTC teaches the encoder more than the transducer does.

A step on 90 s of audio takes 1.6 s of one core (Zen 4, one thread, beside other work): encoder
forward 0.45, joiners and losses 0.15, backward 0.75, optimizers 0.23; making the batch takes 0.22
more. Why so, on ten times 10 s: the exact loss takes 1.02 s, pruned to 5 nodes 0.14. The encoder
at 25 frames a second takes 1.03 s, at 12.5 it would take 0.65; twice the left context 1.18.
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
        chunking=Chunking(chunk=8, left_context=32, right_context=2),
        predictor="stateless",
        time_reduction=4,
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
    batch_seconds=100.0,
    training=TransducerTraining(
        chunks=(4, 8, 8, 16, 0),
        window=5,
        ctc=0.3,
        ramp_steps=1000,
        fastemit=0.005,
        augment=SpecAugment(max_channels=15, time_masks=5, max_time=0.04),
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
