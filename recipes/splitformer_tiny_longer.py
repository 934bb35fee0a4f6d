"""Third stage of asr-tiny, after splitformer_tiny.py: little augmentation, single digits.

Edges are padded from here on, and nothing is dropped out. The second stage underfitted (training
loss 2.6 under its augmentation, dev 1.7) and lost up to 140 ms at either end of an utterance.
"""

from offramp.data.augment_audio import AudioAugmentation
from offramp.train.augment import SpecAugment
from offramp.train.ctc import CTCTraining
from offramp.train.loop import TrainConfig
from offramp.train.speech import SpeechRecipe
from offramp.train.trainee import Continued

recipe = SpeechRecipe(
    name="splitformer-tiny-longer",
    encoder=Continued("runs/splitformer-tiny/checkpoint", dropout=0.0, pad_edges=True),
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
    training=CTCTraining(
        early_exit_scale=0.5,
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
        steps=7000,
        lr=1.5e-3,
        warmup_steps=200,
        optimizer="muon",
        weight_decay=0.05,
        checkpoint_every=100,
        evaluate_every=500,
    ),
)
