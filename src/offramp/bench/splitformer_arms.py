"""The arms of the Splitformer ablation: encoders of one small size, and how each is trained.

The published comparison (arXiv 2506.18035) has neither equal parameters, nor equal compute, nor
seeds. All arms read log-mel with mean and variance normalised (the published power mel would
only weaken the baselines), hear the same strings of real digits with the same audio augmentation,
and take as many steps at the same learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from offramp.config import EncoderConfig, check_choice
from offramp.energy.cost import encoder_macs
from offramp.models.ctc import improved
from offramp.train.loop import TrainConfig, TrainEvent
from offramp.train.speech import SpeechRecipe

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_EXITS = (2, 4, 6)
_TYPICAL_FRAMES = 300  # 3 s, a string of five digits: where `widened` has equal MACs


def _early_exit(depth: int = 6, exits: tuple[int, ...] = _EXITS) -> EncoderConfig:
    """models.ctc.early_exit_baseline at a smaller size."""
    return EncoderConfig(
        d_model=48,
        num_layers=depth,
        num_heads=4,
        d_ff=192,
        kernel_size=15,
        vocab_size=len(WORDS) + 1,
        exits=exits,
        dropout=0.1,
    )


def _splitformer(branch_factor: int = 2) -> EncoderConfig:
    return replace(_early_exit(), branches=(_EXITS[0], _EXITS[-1]), branch_factor=branch_factor)


def _half_rate() -> EncoderConfig:
    """Ours for the time that the baselines take: half as many frames, edges kept, wider layers.

    What else `models.ctc.improved` has did not pay in runs this short (docs/log.md), nor did
    distillation or SpecAugment: all arms learn from the plain sum over exits.
    """
    return replace(_early_exit(), d_model=80, d_ff=320, subsampling=8, pad_edges=True)


def widen(narrow: EncoderConfig, like: EncoderConfig, num_frames: int) -> EncoderConfig:
    """`narrow` with the `d_ff` that brings its MACs at the last exit nearest to those of `like`.

    num_frames: feature frames of the utterance that is counted.
    """
    goal = encoder_macs(like, num_frames, like.num_layers)

    def macs(d_ff: int) -> int:
        return encoder_macs(replace(narrow, d_ff=d_ff), num_frames, narrow.num_layers)

    each = macs(2) - macs(1)  # linear in d_ff
    return replace(narrow, d_ff=max(1, 1 + round((goal - macs(1)) / each)))


# What is compared: the baselines, the controls of the claim and ours; and two beside ours, which
# explain it: all of models.ctc.improved at the baselines' rate, and half that rate alone.
_ENCODERS: dict[str, Callable[[], EncoderConfig]] = {
    "single_2": lambda: _early_exit(2, (2,)),
    "single_4": lambda: _early_exit(4, (4,)),
    "single_6": lambda: _early_exit(6, (6,)),
    "early_exit": _early_exit,
    "splitformer": _splitformer,
    "full_rate": lambda: _splitformer(branch_factor=1),
    "widened": lambda: widen(_early_exit(), _splitformer(), _TYPICAL_FRAMES),
    "ours": _half_rate,
    "improved": lambda: improved(_early_exit()),
    "early_exit_12hz": lambda: replace(_early_exit(), subsampling=8),
}
ARMS = tuple(_ENCODERS)
COMPARED = tuple(arm for arm in ARMS if arm not in ("improved", "early_exit_12hz"))


def arm_encoder(arm: str) -> EncoderConfig:
    """The shape of one of ARMS."""
    check_choice(arm=(arm, ARMS))
    return _ENCODERS[arm]()


@dataclass(frozen=True)
class ArmRecipe:
    """One arm as a recipe: `--set arm=NAME --set seed=N`. Everything but the arm is shared.

    digit_strings: per epoch. dev_digit_strings: of unseen takes, evaluated at the end.
    """

    name: str
    train: TrainConfig
    arm: str
    digit_strings: int
    batch_seconds: float
    dev_digit_strings: int = 200

    def __post_init__(self) -> None:
        check_choice(arm=(self.arm, ARMS))

    def run(self, out: Path, device: str = "cpu") -> Iterator[TrainEvent]:
        """Train or resume in `out`; at the end its `checkpoint` folder holds the model."""
        recipe = SpeechRecipe(
            name=f"{self.name}-{self.arm}",
            encoder=arm_encoder(self.arm),
            train=self.train,
            words=WORDS,
            digit_strings=self.digit_strings,
            batch_seconds=self.batch_seconds,
            dev_digit_strings=self.dev_digit_strings,
            prefetch=False,  # many runs side by side, of one thread each
        )
        return recipe.run(out, device)
