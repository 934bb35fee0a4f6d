"""The benchmark's workers on a toy checkpoint: the keys of the issue, and figures that add up."""

import json
from pathlib import Path

import pytest

import offramp
from offramp.bench import layerskip
from offramp.bench.exit_quality import ExitQualityOptions
from offramp.bench.exit_quality import run as exit_quality
from offramp.bench.tune import TuneOptions
from offramp.bench.tune import run as tune
from offramp.errors import DataError, InputError
from offramp.models.hub import DraftDefaults, load_defaults, save_decoder
from offramp.tokenizer import train_bpe
from toy import decoder

KEYS = {
    "suite",
    "model",
    "device",
    "dtype",
    "prompts",
    "identical",
    "tokens_per_s",
    "speedup_vs_autoregressive",
    "speedup_vs_transformers_greedy",
    "speedup_vs_transformers_early_exit",
    "acceptance_rate",
    "mean_accepted_length",
    "first_layer_positions",
    "last_layer_positions",
    "generated_tokens",
    "prompt_tokens",
}
ARMS = {
    "autoregressive",
    "self_speculative",
    "adaptive",
    "transformers_greedy",
    "transformers_early_exit",
}
PARSE = "[IN:GET_EVENT any [SL:CATEGORY_EVENT concerts ] ]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint with room for the packaged prompts."""
    made = tmp_path_factory.mktemp("bench") / "toy"
    model = decoder(vocab_size=300, max_positions=600, tied_embeddings=True, bos_id=0, eos_ids=(1,))
    save_decoder(model, made, train_bpe(["the door of the count"], 300, ()))
    return made


@pytest.fixture(scope="module")
def report(folder: Path) -> layerskip.LayerSkipReport:
    options = layerskip.LayerSkipOptions(
        exit_layer=2, num_draft_tokens=3, max_tokens=8, rounds=1, top_prompts=2, book_prompts=1
    )
    return layerskip.run(str(folder), options)


@pytest.mark.slow
def test_the_json_has_the_keys_of_the_issue(report):
    made = json.loads(json.dumps(report.to_dict()))
    assert set(made) >= KEYS and set(made["tokens_per_s"]) == ARMS
    assert made["suite"] == "layerskip" and made["prompts"] == 3
    assert all(rate > 0 for rate in made["tokens_per_s"].values())


def test_all_arms_write_the_same_text(report):
    made = report.to_dict()
    assert made["identical"] is True
    assert made["identical_to_transformers"] == 1.0
    assert report.fallback.identical


def test_counts_add_up(report):
    made = report.to_dict()
    arm = report.overall.arms["self_speculative"]
    rejected = arm.total("drafted") - arm.total("accepted")
    expected = made["prompt_tokens"] + made["generated_tokens"] + rejected - made["prompts"]
    ended_in_draft = made["first_layer_positions"] - expected
    assert 0 <= ended_in_draft <= made["prompts"]
    assert made["first_layer_positions"] == made["last_layer_positions"]
    assert made["acceptance_rate"] == arm.total("accepted") / arm.total("drafted")
    parts = [f.to_dict() for f in report.by_prompt_set.values()]
    for key in ("prompts", "generated_tokens", "prompt_tokens", "first_layer_positions"):
        assert sum(p[key] for p in parts) == made[key]


def test_ratios_are_of_the_speeds(report):
    made = report.to_dict()
    speed = made["tokens_per_s"]
    for peer in ("autoregressive", "transformers_greedy", "transformers_early_exit"):
        key = f"speedup_vs_{peer}"
        assert made[key] == pytest.approx(speed["self_speculative"] / speed[peer])


def test_without_peers_their_figures_are_null(folder):
    options = layerskip.LayerSkipOptions(
        exit_layer=1, num_draft_tokens=2, max_tokens=4, rounds=1, top_prompts=1, book_prompts=1,
        peers=False,
    )  # fmt: skip
    made = layerskip.run(str(folder), options).to_dict()
    assert made["tokens_per_s"]["transformers_greedy"] is None
    assert made["speedup_vs_transformers_greedy"] is None


@pytest.mark.parametrize("options", [{"rounds": 0}, {"top_prompts": 101}, {"max_tokens": 0}])
def test_bad_options(options):
    with pytest.raises(InputError, match=next(iter(options))):
        layerskip.LayerSkipOptions(**options)


def test_text_quality_at_every_exit(folder, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("the door of the count\n" * 20)
    made = exit_quality(str(folder), ExitQualityOptions(text))
    assert [e.exit_layer for e in made.exits] == [1, 2, 3, 4, 5]
    assert made.exits[-1].top1_agreement == 1.0
    assert all(e.bits_per_byte > 0 for e in made.exits)
    some = exit_quality(str(folder), ExitQualityOptions(text, exits=(2,)))
    assert some.exits == made.exits[1:2]


def test_parse_quality_counts_unsupported_items_apart(folder, tmp_path):
    data = tmp_path / "some.tsv"
    rows = [f"any concerts\t{PARSE}", "what\t[IN:UNSUPPORTED what ]"]
    data.write_text("\n".join(["utterance\tsemantic_parse", *rows]) + "\n")
    made = exit_quality(str(folder), ExitQualityOptions(data, exits=(5,)))
    assert (made.items, made.supported_items) == (2, 1)
    assert made.exits[0].exact_match == made.exits[0].exact_match_supported == 0.0


@pytest.mark.parametrize("name", ["missing.txt", "wrong.csv"])
def test_bad_data_files(folder, tmp_path, name):
    (tmp_path / "wrong.csv").write_text("text")
    with pytest.raises((DataError, InputError), match=name):
        exit_quality(str(folder), ExitQualityOptions(tmp_path / name))


def test_tuning_measures_and_saves(folder, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("the door of the count and more words to read here\n" * 40)
    made = tune(str(folder), TuneOptions(text, prompts=2, max_tokens=6, rounds=1, shortlist=2))
    assert made.candidates and all(c.identical for c in made.candidates)
    made.save(tmp_path)
    best = made.best
    wanted = (
        DraftDefaults() if best is None else DraftDefaults(best.exit_layer, best.num_draft_tokens)
    )
    for name in ("config.json",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_defaults(tmp_path) == wanted
    assert offramp.load(folder).defaults == DraftDefaults()
