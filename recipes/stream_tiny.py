"""stream-tiny: a streaming transducer of 5.1 M parameters, on the data of asr-tiny, taught by it.

Chunks of 320 ms in use, of 160 ms to the whole utterance in training; 80 ms of right context.
Frames of 80 ms, as asr-tiny has them. Its CTC head learns from asr-tiny's posteriors more than from
the texts, and in the first 1,000 steps the encoder learns from that head more than from the
transducer. A step on 60 s of audio takes about 1 s of one core (Zen 4, beside other work).
"""

from offramp.config import Chunking, TransducerConfig
from offramp.data.augment_audio import AudioAugmentation
from offramp.train.augment import SpecAugment
from offramp.train.loop import TrainConfig
from offramp.train.speech import TransducerRecipe
from offramp.train.transducer import TransducerTraining

recipe = TransducerRecipe(
    name="stream-tiny",
    teacher="asr-tiny",
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
        subsampling="halving",
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
    synthetic_sentences=1500,
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
        ctc=0.5,
        ramp_steps=1000,
        distill=0.7,
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
        steps=6500,
        lr=2e-3,
        warmup_steps=200,
        optimizer="muon",
        weight_decay=0.05,
        average=0.999,
        checkpoint_every=100,
        evaluate_every=500,
    ),
)
