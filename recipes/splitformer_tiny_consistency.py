"""Fourth stage of asr-tiny, after splitformer_tiny_longer.py, which had learnt by heart.

Against overfitting: dropout, and CR-CTC, which hears every utterance twice, masked in two ways, and
wants the same text (with half the audio a step takes as long as in the third stage). With
SpecAugment's full masks and the default augmentation it learnt too slowly (dev loss 1.95 after
2,000 steps, where the third stage had 1.65).
"""

from offramp.data.augment_audio import AudioAugmentation
from offramp.train.augment import SpecAugment
from offramp.train.ctc import CTCTraining
from offramp.train.loop import TrainConfig
from offramp.train.speech import SpeechRecipe
from offramp.train.trainee import Continued

recipe = SpeechRecipe(
    name="splitformer-tiny-consistency",
    encoder=Continued("runs/splitformer-tiny-longer/checkpoint", dropout=0.1),
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
    synthetic_sentences=1_000,
    augmentation=AudioAugmentation(
        p_speed=0.8,
        p_reverberation=0.2,
        p_noise=0.4,
        snr_db=(8.0, 30.0),
        p_telephone=0.05,
        p_volume=0.5,
    ),
    batch_seconds=50.0,
    training=CTCTraining(
        early_exit_scale=0.5,
        consistency=0.2,
        augment=SpecAugment(max_channels=20, time_masks=4),
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
        steps=6000,
        lr=1e-3,
        warmup_steps=200,
        optimizer="muon",
        weight_decay=0.05,
        checkpoint_every=100,
        evaluate_every=500,
    ),
)
