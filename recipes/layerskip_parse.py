"""parse-tiny: lm-tiny fine-tuned to turn an utterance into its TOP parse, with LayerSkip.

Fine-tuning settings of the paper (S(t) = 1, gradual curriculum) but for three: p_max is smaller
than its 0.2, so that the last layer does not lose to plain fine-tuning; only the exits that can
draft fast (2, 3, 4, 6 of 12) are trained, each with the same weight, because the paper's e(l)
leaves exit 4 of so shallow a tower 2 % of the loss; and they learn half from the last exit.
"""

from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import TrainConfig
from offramp.train.schedules import ExitCurriculum
from offramp.train.text import TextRecipe

recipe = TextRecipe(
    name="parse-tiny",
    model="lm-tiny",
    corpus="top",
    batch_size=64,
    layerskip=LayerSkipConfig(
        p_max=0.05,
        dropout_schedule="constant",
        early_exit_scale=0.15,
        curriculum=ExitCurriculum("gradual", exits=(2, 3, 4, 6), weighting="uniform"),
        distill=0.5,
    ),
    train=TrainConfig(steps=3000, lr=2e-3, warmup_steps=50, optimizer="muon"),
)
