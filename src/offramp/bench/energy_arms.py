"""The arms of `offramp bench energy` as folders: what there is, what each was made to keep to.

`energy_prepare` makes them by one half of the development data; `energy` reports them by the
other, or the arm with most to choose from would gain most by chance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.config import strict
from offramp.data.manifest import Utterance, read_manifest
from offramp.data.speech import normalized, speech_set
from offramp.errors import CheckpointError, ConfigError, DataError
from offramp.files import read_table
from offramp.models import hub

RUNS = Path("runs/energy")
DATA = ("kathleen_arctic", "mini_librispeech_train_clean_5")
ARM_FILE = "arm.json"
PLANNING, REPORTING = 0, 1  # halves of the development data
EQUAL_WER = 0.002  # of two arms: at most so much apart

BLANK_SKIP = "blank_skip"  # the arm that only a factorised blank can have
AS_IT_IS = ("dense_fp32", "dense_int8", "dense_int4", BLANK_SKIP, "longer_chunk")  # not pruned
COMPARED = ("uniform", "global_magnitude")  # the best of them sets the WER of the planner
RULES = (*COMPARED, "size_optimal", "paper_rule")
PLANNER, PLANNER_FREE = "planner", "planner_free_chunk"
ARMS = (*AS_IT_IS, *RULES, PLANNER, PLANNER_FREE)


@dataclass(frozen=True)
class Outcome:
    """What came of an arm on the planning half, all seeds together. max_wer_increase: what it was
    to keep to, None: nothing. worst_ratio: as in `compress_rounds`. recipe: sha256 of what it was
    fine-tuned by, None: nothing."""

    max_wer_increase: float | None
    wer_increase: float
    worst_ratio: float
    finetune_steps: int
    recipe: str | None

    @property
    def missed_by(self) -> float:
        """WER by which the nearest plan that was tried is above what it was to keep to."""
        if self.max_wer_increase is None:
            return 0.0
        return max(0.0, self.wer_increase - self.max_wer_increase)

    @classmethod
    def load(cls, folder: Path) -> Outcome:
        """CheckpointError: the folder holds no arm."""
        remedy = f"delete {folder} and make it anew"
        try:
            return strict(cls, read_table(folder / ARM_FILE, CheckpointError, remedy))
        except ConfigError as error:
            raise CheckpointError(f"{folder / ARM_FILE}: {error}; {remedy}") from error


def development(data: Sequence[str], half: int, limit: int | None = None) -> list[Utterance]:
    """One half of what WERs are measured on, PLANNING or REPORTING; see `ArmsOptions`. Every other
    utterance of each set, so that both halves are alike."""
    found = []
    for name in data:
        is_file = name.endswith((".tsv", ".jsonl"))
        known = read_manifest(Path(name), "dev") if is_file else speech_set(name, "dev")
        kept = normalized(known)[0][half::2]
        count = len(kept) if limit is None else min(limit, len(kept))
        found += [kept[n * len(kept) // count] for n in range(count)]
    if not found:
        raise DataError(f"no text of {', '.join(data)} can be normalised; write numbers out")
    return found


def find_arms(runs: Path) -> dict[str, dict[int, Path]]:
    """Arm -> seed -> checkpoint; every arm has the seeds that any of them has.

    CheckpointError names what is missing, and the command that makes it.
    """
    pattern = re.compile(rf"(?:{'|'.join(ARMS)})-(\d+)")
    found = {p.parent.name: pattern.fullmatch(p.parent.name) for p in runs.glob("*/config.json")}
    names = {name: int(match[1]) for name, match in found.items() if match}
    seeds = sorted(set(names.values()))
    wanted = [f"{arm}-{seed}" for seed in seeds or [0] for arm in ARMS]
    if any(_scores_blanks(runs / name) for name in names):
        wanted = [name for name in wanted if not name.startswith(BLANK_SKIP)]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(f"{runs} lacks {', '.join(missing)}; offramp bench energy makes them")
    return {
        arm: {seed: runs / f"{arm}-{seed}" for seed in seeds}
        for arm in ARMS
        if f"{arm}-{seeds[0]}" in wanted
    }


def _scores_blanks(folder: Path) -> bool:
    """Whether the model scores the blank among its labels, and so has none to skip."""
    return not hub.read_json(folder / "config.json").get("config", {}).get("factorised_blank")


def best_of(arms: Mapping[str, Outcome]) -> str:
    """Of those that missed their WER least, mostly not at all, the one that takes least energy, on
    the profile where it takes most."""
    least = min(arm.missed_by for arm in arms.values())
    near = [name for name, arm in arms.items() if arm.missed_by <= least]
    return min(near, key=lambda name: arms[name].worst_ratio)
