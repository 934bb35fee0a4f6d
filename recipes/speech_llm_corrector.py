"""speech-llm-tiny, second stage: its decoder learns to correct what a recogniser wrote.

Nine sentences of ten stand before BOS too, with a quarter of their tokens wrong: the form in which
the next stage shows it what asr-tiny's CTC heard. A step takes about 1.3 s of one core.
"""

from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import TrainConfig
from offramp.train.schedules import ExitCurriculum
from offramp.train.text import TextRecipe

recipe = TextRecipe(
    name="speech-llm-corrector",
    model="runs/speech-llm-decoder/checkpoint",
    corpus="sentences",
    misheard=0.9,
    batch_size=48,
    layerskip=LayerSkipConfig(
        early_exit_scale=0.1,
        curriculum=ExitCurriculum("all", exits=(2, 3, 4), weighting="uniform"),
        distill=0.2,
    ),
    train=TrainConfig(
        steps=1400,
        lr=3e-3,
        warmup_steps=100,
        optimizer="muon",
        checkpoint_every=100,
        evaluate_every=200,
    ),
)
