"""An exit threshold for "at most +x WER", with the guarantee that goes with it.

Conformal risk control (Angelopoulos et al., arXiv 2208.02814): on a development set in which
every exit was decoded, take the cheapest threshold whose mean loss, raised by what one unseen
utterance could add, is at most x. The theorem wants a loss that never falls as the threshold
becomes more daring; a deeper exit may be the worse one, so each utterance's loss is replaced by
the largest it has at any more cautious threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from offramp.config import check_counts, check_positive, check_range, strict
from offramp.decoding.exit_policies import RULES, ExitPolicy
from offramp.errors import ConfigError, InputError
from offramp.files import read_table, write_table


@dataclass(frozen=True)
class DevRun:
    """A development set of n utterances, decoded at all E exits.

    exits: their layers. scores: [n][E], the rule's score of each exit (from a run whose policy
    never leaves early); that of the last exit has no effect. errors: [n][E] wrong words. words:
    [n] words in each reference. costs: [n][E], what leaving there costs, in any one unit.
    """

    exits: Sequence[int]
    scores: Sequence[Sequence[float]]
    errors: Sequence[Sequence[int]]
    words: Sequence[int]
    costs: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        n, E = len(self.words), len(self.exits)
        if n == 0 or E == 0:
            raise InputError("the development set is empty; give utterances and exits")
        for name in ("scores", "errors", "costs"):
            shape = np.shape(getattr(self, name))
            if shape != (n, E):
                raise InputError(f"{name} has shape {shape}; {n} utterances at {E} exits need all")
        if np.isnan(self.scores).any():
            raise InputError("scores hold NaN; give a number for every exit")
        if not (total := sum(own[-1] for own in self.costs)) > 0:
            raise InputError(f"costs of the last exit add up to {total:g}; give what they cost")


@dataclass(frozen=True)
class Calibration:
    """What a calibration found; JSON keeps it with a checkpoint.

    rule: a key of `RULES`. threshold: of the rule's score (see `setting`); None: nothing could be
    certified, so nothing leaves early. max_wer_increase and cap are shares, 0.005 for half a
    percent. bound: what the expected excess error of one utterance is certified not to exceed;
    None: nothing. mean_excess (unclipped, may be below 0), saving (share of the full tower's cost)
    and mean_exit_layer: as seen on the `utterances` of the development set. weights: SHA-256 of
    those that it is for (see `Recognizer.weights_sha256`); None: not known.
    """

    rule: str
    exits: tuple[int, ...]
    threshold: float | None
    max_wer_increase: float
    cap: float
    utterances: int
    bound: float | None
    mean_excess: float
    saving: float
    mean_exit_layer: float
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"rule is {self.rule!r}; allowed: {', '.join(RULES)}")
        if not self.exits or list(self.exits) != sorted(set(self.exits)):
            raise ConfigError(f"exits are {self.exits}; they must be layers in ascending order")
        for layer in self.exits:
            check_counts(1, exits=layer)
        check_counts(1, utterances=self.utterances)
        check_positive(max_wer_increase=self.max_wer_increase, cap=self.cap)
        if empty := says_nothing(self.max_wer_increase, self.cap):
            raise ConfigError(empty)
        check_range(0, saving=self.saving, mean_exit_layer=self.mean_exit_layer)
        check_range(-math.inf, mean_excess=self.mean_excess)
        if not isinstance(self.weights, str | None):
            raise ConfigError(f"weights is {self.weights!r}; it must be a SHA-256, or null")
        if (self.threshold is None) != (self.bound is None):
            raise ConfigError("threshold and bound must both be given, or both be null")
        if self.threshold is not None and self.bound is not None:
            check_range(-math.inf, threshold=self.threshold)
            check_range(0, bound=self.bound)
            if self.bound > self.max_wer_increase:
                raise ConfigError(f"bound is {self.bound}; it must not exceed max_wer_increase")

    @property
    def guarantee(self) -> str:
        """What is certified, and what is not, in one sentence."""
        x, cap = 100 * self.max_wer_increase, 100 * self.cap
        if self.bound is None:
            return (
                f"cannot certify +{x:.4g} % WER: {self.utterances} utterances, each counted up to "
                f"{cap:.4g} %, need {least_utterances(self.max_wer_increase, self.cap)}; nothing "
                "leaves early"
            )
        return (
            f"expected excess error of an utterance at most {100 * self.bound:.4g} % of its words "
            f"(+{x:.4g} % allowed; one utterance counts up to {cap:.4g} %) over the last exit, for "
            f"speech like the {self.utterances} development utterances, each taken whole as the "
            "manifest cuts them; not a bound for each utterance, for WER pooled over words, for "
            "other voices, other speech or other cuts"
        )

    @property
    def setting(self) -> float | None:
        """The threshold as the rule itself takes it, so in nats for entropy."""
        if self.threshold is None:
            return None
        return RULES[self.rule].at_score(self.threshold).threshold

    def policy(self, exits: Sequence[int]) -> ExitPolicy:
        """The rule with its threshold, for a tower with the same exits; else ConfigError."""
        if tuple(exits) != self.exits:
            raise ConfigError(
                f"the calibration is for exits {self.exits} and the model has {tuple(exits)}; "
                "calibrate anew"
            )
        return RULES[self.rule].at_score(math.inf if self.threshold is None else self.threshold)

    def save(self, path: Path) -> None:
        """Write JSON to `path`."""
        write_table(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Strict: ConfigError for a file that is missing, malformed or has other settings."""
        values = read_table(path, ConfigError, "run offramp calibrate")
        if isinstance(values.get("exits"), list):
            values["exits"] = tuple(values["exits"])
        return strict(cls, values)


def least_utterances(max_wer_increase: float, cap: float) -> int:
    """Below so many utterances nothing can be certified, however well the exits do."""
    n = max(1, math.ceil(cap / max_wer_increase) - 1)
    while cap / (n + 1) > max_wer_increase:  # rounding of the quotient
        n += 1
    return n


def says_nothing(max_wer_increase: float, cap: float) -> str | None:
    """Why the two shares certify nothing: no loss counts more than the cap, whatever exits do.

    None: they may certify something.
    """
    if cap > max_wer_increase:
        return None
    return (
        f"cap is {100 * cap:.4g} % and max_wer_increase {100 * max_wer_increase:.4g} %; a loss "
        "cut off at the cap never exceeds it, so that would hold for any exits: choose a larger cap"
    )


def calibrate(dev: DevRun, rule: str, max_wer_increase: float, cap: float = 1.0) -> Calibration:
    """The cheapest threshold of `rule` that keeps the expected excess error at most so high.

    max_wer_increase: a share, 0.005 for half a percent. cap: at most so much counts for one
    utterance; a smaller cap certifies with fewer utterances, and says less. It must exceed
    max_wer_increase. An utterance without words counts as having one. InputError: unknown rule,
    numbers out of range.
    """
    if rule not in RULES:
        raise InputError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")
    for name, value in (("max_wer_increase", max_wer_increase), ("cap", cap)):
        if not 0.0 < value < math.inf:
            raise InputError(f"{name} is {value}; it must be greater than 0 and finite")
    if empty := says_nothing(max_wer_increase, cap):
        raise InputError(empty)
    n = len(dev.words)
    errors, words = np.array(dev.errors, float), np.maximum(dev.words, 1)[:, None]
    excess = (errors - errors[:, -1:]) / words
    scores = np.array(dev.scores, float)[:, :-1]
    # The loss changes at observed scores alone; from never leaving down to always leaving.
    limits = np.append(np.unique(scores)[::-1], -np.inf)
    total = np.zeros(len(limits))
    for own, loss in zip(scores, np.clip(excess, 0.0, cap), strict=True):
        total += np.maximum.accumulate(loss[_exits_taken(own, limits)])
    # n/(n+1) * mean + cap/(n+1); it only rises along `limits`.
    bounds = (total + cap) / (n + 1)
    feasible = int((bounds <= max_wer_increase).sum())
    limit = limits[feasible - 1] if feasible else np.inf
    taken = np.array([_exits_taken(own, limit) for own in scores])
    each = np.arange(n)
    costs = np.array(dev.costs, float)
    return Calibration(
        rule=rule,
        exits=tuple(dev.exits),
        # The theorem needs "leaves above the limit" (continuous from the right); rules leave at
        # their threshold, so it is the next number.
        threshold=math.nextafter(limit, math.inf) if feasible else None,
        max_wer_increase=max_wer_increase,
        cap=cap,
        utterances=n,
        bound=float(bounds[feasible - 1]) if feasible else None,
        mean_excess=float(excess[each, taken].mean()),
        saving=max(0.0, float(1.0 - costs[each, taken].sum() / costs[:, -1].sum())),
        mean_exit_layer=float(np.array(dev.exits)[taken].mean()),
    )


def _exits_taken(scores: np.ndarray, limits: np.ndarray | float) -> np.ndarray:
    """Index of the first exit whose score exceeds each limit; that of the last exit if none does.

    scores: [E - 1], of one utterance, without the last exit's.
    """
    highest = np.maximum.accumulate(scores)
    return np.searchsorted(highest, limits, side="right")
