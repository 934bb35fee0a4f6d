"""The public calls: what they return, and that the defaults lose nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import offramp
from offramp import DraftOptions, InputError, Sampling, Stop
from offramp.compress.checkpoint import companions, save_compressed
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.quantize import WeightQuantization
from offramp.decoding.drafts import AdaptiveExitDraft, Draft, EarlyExitDraft, NoDraft, Proposal
from offramp.models.hub import DraftDefaults
from thinned import thinned

PROMPTS = ["the count", "door and the countess closed", "o"]
PLAIN = DraftOptions("none")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> offramp.Model:
    return offramp.load(checkpoint)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=40, seed=7)])
@pytest.mark.parametrize("kind", thinned(["exit", "adaptive", "ngram", None], keep=("exit", None)))
def test_every_draft_writes_the_plain_text(model, kind, sampling):
    stop = Stop(max_tokens=20)
    plain = model.generate(PROMPTS, draft=PLAIN, sampling=sampling, stop=stop)
    drafted = model.generate(PROMPTS, draft=DraftOptions(kind), sampling=sampling, stop=stop)
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]
    assert [g.text for g in drafted] == [g.text for g in plain]


def test_draft_model_by_folder(model, checkpoint):
    options = DraftOptions("model", model=str(checkpoint))
    made = model.generate(PROMPTS[0], draft=options, stop=Stop(12))
    assert made.tokens == model.generate(PROMPTS[0], draft=PLAIN, stop=Stop(12)).tokens
    assert made.stats.acceptance_rate == 1.0


def test_the_last_token_of_a_round_is_its_own_drafted_or_not(model, checkpoint):
    options = DraftOptions("model", model=str(checkpoint), num_draft_tokens=9)
    drawn = {"sampling": Sampling(temperature=1.0, top_k=40, seed=7)}
    *_, end = text = model.generate(PROMPTS[0], draft=PLAIN, stop=Stop(4), **drawn).tokens
    assert text.index(end) == 3
    made = model.generate(PROMPTS[0], draft=options, stop=Stop(12, frozenset({end})), **drawn)
    assert made.tokens == text, "it ends in its first draft"
    stats = made.stats
    assert (stats.generated_tokens, stats.verify_calls, stats.accepted_tokens) == (4, 1, 3)
    assert stats.drafted_tokens == 9 - 1


def test_a_compressed_checkpoint_serves_like_any_other(model, checkpoint, tmp_path):
    small = WeightQuantization(8).apply(FeedForwardPruning(0.2).apply(model.tower))
    defaults = {"offramp.json": '{"exit_layer": 2, "num_draft_tokens": 3}'}
    save_compressed(small, tmp_path / "small", companions(checkpoint) | defaults)
    eco = offramp.load(tmp_path / "small")
    assert eco.defaults == DraftDefaults(2, 3)
    assert isinstance(eco.make_draft(DraftOptions())[0], EarlyExitDraft)
    stop = Stop(max_tokens=16)
    plain = eco.generate(PROMPTS, draft=PLAIN, stop=stop)
    drafting = DraftOptions("model", model=str(tmp_path / "small"))
    for draft in (DraftOptions(), DraftOptions("adaptive"), drafting):
        made = eco.generate(PROMPTS, draft=draft, stop=stop)
        assert [g.tokens for g in made] == [g.tokens for g in plain]
    early = eco.generate(PROMPTS[0], early_exit=5, stop=stop)
    assert early.text == plain[0].text
    with pytest.raises(InputError, match=r"is quantised: it computes in torch.float32"):
        offramp.load(tmp_path / "small", dtype="bfloat16")


def test_stream_is_generate_piece_by_piece(model):
    run = model.stream(PROMPTS[0], stop=Stop(20))
    steps = list(run)
    made = model.generate(PROMPTS[0], stop=Stop(20))
    assert "".join(s.text for s in steps) == made.text == run.generations[0].text
    assert tuple(t for s in steps for t in s.tokens) == made.tokens
    assert [s.finish_reason for s in steps[:-1]] == [None] * (len(steps) - 1)


def test_results_of_an_unfinished_run_are_refused(model):
    with pytest.raises(InputError, match="has not ended"):
        _ = model.stream(PROMPTS[0]).generations


def test_early_exit_runs_no_layer_above(model):
    made = model.generate(PROMPTS[0], early_exit=2, stop=Stop(10))
    assert made.stats.layer_calls == 2 * (1 + len(made.tokens))
    whole = model.generate(PROMPTS[0], early_exit=5, stop=Stop(10))
    assert whole.tokens == model.generate(PROMPTS[0], draft=PLAIN, stop=Stop(10)).tokens


def test_stats_of_plain_decoding(model):
    made = model.generate(PROMPTS[0], draft=PLAIN, stop=Stop(10))
    s = made.stats
    assert s.generated_tokens == len(made.tokens) == s.verify_calls
    assert s.first_layer_positions == s.prompt_tokens + s.generated_tokens - 1
    assert s.acceptance_rate is None and s.mean_accepted_length is None
    assert s.tokens_per_s == pytest.approx(s.generated_tokens / s.seconds)
    assert 0 < s.ttft_s <= s.seconds
    assert s.to_dict()["drafted_tokens"] == 0


def test_defaults_choose_the_draft(checkpoint):
    model = offramp.load(checkpoint)
    assert isinstance(model.make_draft(DraftOptions())[0], AdaptiveExitDraft)
    assert isinstance(model.make_draft(DraftOptions(exit_layer=2))[0], EarlyExitDraft)
    model.defaults = DraftDefaults(exit_layer=2, num_draft_tokens=3)
    draft, k = model.make_draft(DraftOptions())
    assert isinstance(draft, EarlyExitDraft) and k == 3
    assert isinstance(model.make_draft(PLAIN)[0], NoDraft)


def test_tokens_without_a_tokenizer(checkpoint, model):
    bare = offramp.load(checkpoint, tokenizer=False)
    ids = model.encode(PROMPTS[0])
    made = bare.generate(ids, stop=Stop(8))
    assert made.text == ""
    assert made.tokens == model.generate(PROMPTS[0], stop=Stop(8)).tokens
    with pytest.raises(InputError, match="without a tokenizer"):
        bare.generate("text")


def test_text_is_cut_to_the_context(model):
    made = model.generate(list(range(5, 60)), stop=Stop(100), draft=PLAIN)
    assert len(made.tokens) <= 64 - 55
    assert made.finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(""), "prompt is empty"),
        (lambda m: m.generate([]), "no prompt"),
        (lambda m: m.generate([[]]), "no tokens"),
        (lambda m: m.generate([300]), "not in the vocabulary"),
        (lambda m: m.generate([5] * 64), "context is 64"),
        (lambda m: m.generate("a", early_exit=0), "between 1 and 5"),
        (lambda m: m.generate("a", early_exit=6), "between 1 and 5"),
        (lambda m: m.generate("a", draft=DraftOptions("exit", exit_layer=5)), "between 1 and 4"),
        (lambda m: m.generate("a", draft=DraftOptions("exit", exit_layer=0)), "between 1 and 4"),
        (lambda m: DraftOptions("nonsense"), "allowed: exit"),
        (lambda m: DraftOptions(num_draft_tokens=0), "at least 1"),
        (lambda m: DraftOptions("model"), "go together"),
        (lambda m: DraftOptions("ngram", exit_layer=2), "no use to draft 'ngram'"),
        (lambda m: DraftOptions("ngram", min_confidence=0.5), "no use to draft 'ngram'"),
        (lambda m: m.generate("a", early_exit=2, draft=PLAIN), "choose one"),
        (lambda m: m.generate("a", stop=Stop(3, frozenset([300]))), "stop token 300 is not in"),
        (lambda m: Sampling(temperature=-1.0), "temperature is -1.0"),
        (lambda m: Stop(0), "max_tokens is 0"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"device": "nonsense"}])
def test_bad_load_options(checkpoint, options):
    with pytest.raises(InputError, match=r"nonsense|int8"):
        offramp.load(checkpoint, **options)


def test_importing_the_package_leaves_torch_alone():
    code = "import offramp, offramp.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists():
    for name in offramp.__all__:
        assert getattr(offramp, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = offramp.nonsense
    assert replace(Sampling(), seed=3).seed == 3


def test_a_batch_near_the_context_is_its_single_runs(model):
    prompts = [list(range(5, 5 + 60)), [7, 8]]
    both = model.generate(prompts, stop=Stop(12), draft=PLAIN)
    single = [model.generate(p, stop=Stop(12), draft=PLAIN) for p in prompts]
    assert [g.tokens for g in both] == [g.tokens for g in single]
    assert len(both[0].tokens) <= 4


class RepeatDraft(Draft):
    """A draft of a user's own: the newest token again."""

    def propose(self, state, k):
        return Proposal(state.newest().repeat(1, k))


def test_a_draft_of_ones_own(model):
    options = DraftOptions(RepeatDraft(), num_draft_tokens=3)
    steps = list(model.stream(PROMPTS[0], draft=options, stop=Stop(12)))
    plain = model.generate(PROMPTS[0], draft=PLAIN, stop=Stop(12))
    assert tuple(t for s in steps for t in s.tokens) == plain.tokens
    assert max(len(s.drafted) for s in steps) == 3


def test_drafts_stop_early_on_a_cpu_unless_told_otherwise(model):
    """The default looks at each token's probability; 0 never does."""
    ids = PROMPTS[0]
    drafted = {}
    for confidence in (None, 0.6, 0.0):
        options = DraftOptions("exit", 2, 8, min_confidence=confidence)
        run = model.stream(ids, draft=options, stop=Stop(12))
        drafted[confidence] = [s.drafted for s in run]
    assert drafted[None] == drafted[0.6] != drafted[0.0]
