"""Fine-tuning a pruned transducer by the recipe that trained it: its data, its losses, its zeros.

The joiner that finds the windows of the pruned loss is not in a checkpoint, and untrained it would
mislead the model; so here the model itself finds them. A model that no longer has its CTC head
does without that loss and without a teacher. Steps are a tenth as long as at the recipe's peak.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from offramp.audio.features import FeatureConfig
from offramp.compress.finetune import zeros_held
from offramp.errors import ConfigError
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer
from offramp.tokenizer import TextTokenizer
from offramp.train.loop import train
from offramp.train.recipes import load_recipe
from offramp.train.speech import TransducerRecipe
from offramp.train.transducer import TransducerReader, TransducerTask

_LR = 0.1  # of the recipe's
_SAVE_EVERY = 100  # steps


def transducer_recipe(path: Path) -> TransducerRecipe:
    """ConfigError: the file defines another kind of recipe."""
    recipe = load_recipe(path, {})
    if not isinstance(recipe, TransducerRecipe):
        raise ConfigError(
            f"{path} defines a {type(recipe).__name__}; give the recipe of a streaming transducer, "
            "such as recipes/stream_tiny.py"
        )
    return recipe


def finetuner(
    recipe: TransducerRecipe, tokenizer: TextTokenizer, steps: int, folder: Path
) -> Callable[[Transducer], Transducer]:
    """Takes a pruned model and gives a trained copy. A killed run goes on from `folder`, which is
    gone when it ends."""

    def finetune(model: Transducer) -> Transducer:
        start = fingerprint(model)
        state = folder / start[:16]
        model = copy.deepcopy(model).requires_grad_(True).train()
        config = replace(
            recipe.train,
            steps=steps,
            lr=_LR * recipe.train.lr,
            warmup_steps=min(recipe.train.warmup_steps, steps // 10),
            average=0.0,
            checkpoint_every=min(_SAVE_EVERY, steps),
            evaluate_every=steps,
        )
        reader = TransducerReader(FeatureConfig(num_mels=model.config.num_mels), tokenizer)
        sources = recipe.sources(config.seed)
        settings = recipe.settings(sources) | {"start": start}
        training, teacher = replace(recipe.training, simple=0.0, ramp_steps=0), None
        if model.ctc_head is None:
            training = replace(training, ctc=0.0, distill=0.0)
        else:
            teacher, _ = recipe.load_teacher(tokenizer, model.device)
        with recipe.batches(sources, reader, config) as batches, zeros_held(model):
            task = TransducerTask(model, batches, training, config.seed, teacher=teacher)
            for _ in train(task, config, state, settings):
                pass
        shutil.rmtree(state)
        return model.requires_grad_(False).eval()

    return finetune
