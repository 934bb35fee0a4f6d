"""Recipe files and the settings that override theirs: every mistake is one line that names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import toy
from offramp.config import DecoderConfig
from offramp.errors import ConfigError
from offramp.train import recipes
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import TrainConfig
from offramp.train.recipes import load_recipe
from offramp.train.text import TextRecipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A recipe file that defines a toy recipe."""
    made = TextRecipe("toy", toy.config(), "books", 4, TrainConfig(8, 1e-3), seq_len=16)
    monkeypatch.setattr(recipes, "toy_recipe", made, raising=False)
    path = tmp_path / "toy.py"
    path.write_text("from offramp.train.recipes import toy_recipe as recipe\n")
    return path


def refused(path: Path, says: str, **overrides: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_recipe(path, {k.replace("__", "."): v for k, v in overrides.items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("layerskip_*.py")), ids=lambda p: p.stem)
def test_the_recipes_of_the_project_load(path: Path) -> None:
    assert load_recipe(path, {"steps": "7", "train.lr": "1"}).train.steps == 7


def test_settings_are_found_by_name_or_path(recipe: Path) -> None:
    given = {"steps": "9", "train.lr": "1", "p_max": "0.5", "curriculum.period": "3", "name": "x"}
    found: Any = load_recipe(recipe, {**given, "vocab_size": "300", "betas": "[0, 0.5]"})
    assert (found.train.steps, found.name, found.model.vocab_size) == (9, "x", 300)
    assert isinstance(found.train.lr, float)
    assert (found.layerskip.p_max, found.layerskip.curriculum.period) == (0.5, 3)
    assert found.train.betas == (0.0, 0.5)
    assert isinstance(found.model, DecoderConfig)
    start: Any = load_recipe(recipe, {"model": "lm-tiny"})
    assert start.model == "lm-tiny"


@dataclass(frozen=True)
class Inner:
    size: int = 1
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    size: int = 2
    one: Inner = field(default_factory=Inner)
    two: Inner = field(default_factory=Inner)


def test_an_exact_path_wins_over_deeper_ones() -> None:
    assert recipes._override(Outer(), "size", "5") == Outer(5)
    assert recipes._override(Outer(), "one.size", "5") == Outer(one=Inner(5))
    with pytest.raises(ConfigError, match=r"depth is not unique; choose from one\.depth, two\.dep"):
        recipes._override(Outer(), "depth", "5")
    with pytest.raises(ConfigError, match="width is not one of the recipe's settings"):
        recipes._override(Outer(), "width", "5")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("steps", "many", "steps is 'many'; it must be of the kind of its present value, 8"),
        ("steps", "1.5", "steps is '1.5'; it must be of the kind"),
        ("steps", "9" * 5000, "steps is '99"),
        ("steps", "0", "steps is 0; it must be a whole number of at least 1"),
        ("batch_size", "0", "batch_size is 0; it must be a whole number of at least 1"),
        ("seq_len", "-1", "seq_len is -1"),
        ("seq_len", "129", "seq_len is 129; it must be at most the model's max_positions, 128"),
        ("lr", "NaN", "lr is nan; it must be a number greater than 0"),
        ("lr", "1" + "0" * 400, "lr is inf"),
        ("p_max", "NaN", "p_max is nan"),
        ("distill", "NaN", "distill is nan"),
        ("early_exit_scale", "NaN", "early_exit_scale is nan"),
        ("betas", "0.9", r"betas is '0.9'; it must be of the kind"),
        ("betas", '["a", 1]', "betas is 'a'"),
        ("rope_scaling", "5", "rope_scaling is 5; it must be a RopeScaling or None"),
        ("sliding_window", "wide", "sliding_window is 'wide'; it must be a whole number"),
        ("eos_ids", '["a"]', "eos_ids is 'a'"),
        ("bos_id", "0.5", "bos_id is 0.5"),
        ("tied_embeddings", "1", "tied_embeddings is '1'; it must be of the kind"),
        ("corpus", "web", "corpus is 'web'; allowed: books, top"),
        ("autocast", "fp8", "autocast is 'fp8'; allowed: bf16, none"),
        ("layerskip", "1", "layerskip is '1'; it must be of the kind"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused(
    recipe: Path, key: str, value: str, says: str
) -> None:
    refused(recipe, says, **{key: value})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recipe = (", "line 1 is not Python"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'; mend"),
        ("from offramp.train.text import NoSuch", "cannot be loaded: ImportError"),
        ("1 / 0", "ZeroDivisionError: division by zero; mend the recipe"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("from offramp.train.loop import TrainConfig\nTrainConfig(0, 1.0)", "steps is 0"),
        ("x = 1", "defines no `recipe`"),
        ("recipe = 1", "defines no `recipe`"),
        ("from offramp.train.text import TextRecipe as recipe", "defines no `recipe`"),
    ],
)
def test_a_file_that_gives_no_recipe_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    refused(path, rf"mine\.py.*{says}")
    path.unlink()
    refused(path, r"there is no recipe file .*mine\.py")


def test_layerskip_is_off_by_default() -> None:
    assert TextRecipe("toy", "lm-tiny", "top", 4, TrainConfig(8, 1e-3)).layerskip == (
        LayerSkipConfig(p_max=0.0, early_exit_scale=0.0, distill=0.0)
    )
