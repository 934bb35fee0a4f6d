"""First stage of asr-tiny: our Splitformer on synthetic speech alone.

Unlimited text in 67 timbres and 8 accents teaches letters and words before the few hours of real
speech are heard (recipes/splitformer_tiny.py). Frames of 80 ms: at this size an exit costs half of
what it does at 40 ms, and in equal time the encoder learns more.
"""

from dataclasses import replace

from offramp.config import EncoderConfig
from offramp.models.ctc import improved
from offramp.train.augment import SpecAugment
from offramp.train.ctc import CTCTraining
from offramp.train.loop import TrainConfig
from offramp.train.speech import SpeechRecipe

recipe = SpeechRecipe(
    name="splitformer-synthetic",
    # The edges of the features were padded from the third stage on.
    encoder=replace(
        improved(
            EncoderConfig(
                d_model=128,
                num_layers=12,
                num_heads=4,
                d_ff=512,
                kernel_size=15,
                vocab_size=256,
                exits=(2, 4, 6, 8, 10, 12),
                dropout=0.05,
                subsampling=8,
            )
        ),
        pad_edges=False,
    ),
    synthetic_sentences=20_000,
    batch_seconds=80.0,
    training=CTCTraining(augment=SpecAugment(), distill=0.1, autocast="bf16"),
    dev_sets=("kathleen_arctic", "mini_librispeech_train_clean_5"),
    train=TrainConfig(
        steps=1400,
        lr=2e-3,
        warmup_steps=100,
        optimizer="muon",
        weight_decay=0.05,
        checkpoint_every=100,
        evaluate_every=100,
    ),
)
