"""Second stage of asr-tiny: 6.6 h of real speech from a hundred speakers, after synthetic speech.

The four stages, each from the checkpoint of the one before:

offramp train recipes/splitformer_synthetic.py
offramp train recipes/splitformer_tiny.py
offramp train recipes/splitformer_tiny_longer.py
offramp train recipes/splitformer_tiny_consistency.py
"""

from offramp.train.augment import SpecAugment
from offramp.train.ctc import CTCTraining
from offramp.train.loop import TrainConfig
from offramp.train.speech import SpeechRecipe

recipe = SpeechRecipe(
    name="splitformer-tiny",
    encoder="runs/splitformer-synthetic/checkpoint",
    sets=(
        "mini_librispeech_train_clean_5",
        "kathleen_arctic",
        "kathleen_more_takes",
        "ljspeech_excerpt",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    digit_strings=300,
    synthetic_sentences=1_000,
    batch_seconds=120.0,
    training=CTCTraining(augment=SpecAugment(), distill=0.1, autocast="bf16"),
    dev_sets=(
        "kathleen_arctic",
        "mini_librispeech_train_clean_5",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    train=TrainConfig(
        steps=5200,
        lr=1.5e-3,
        warmup_steps=200,
        optimizer="muon",
        weight_decay=0.05,
        checkpoint_every=100,
        evaluate_every=400,
    ),
)
