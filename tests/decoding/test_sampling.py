"""Sampled tokens have the right distribution, and drafts do not change which they are."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
import toy_decoding as run
from offramp.decoding.drafts import EarlyExitDraft
from offramp.decoding.sampling import Chooser, Sampling, keep_top
from offramp.decoding.stopping import Stop
from offramp.errors import InputError
from offramp.models.decoder_lm import DecoderLM
from thinned import thinned
from toy_decoding import DRAFTS, KEPT, LAYERS

SETTINGS: dict[str, Sampling] = {
    "temperature": Sampling(temperature=0.8, seed=1),
    "high temperature": Sampling(temperature=3.0, seed=2),
    "top-k": Sampling(temperature=1.0, top_k=4, seed=3),
    "top-p": Sampling(temperature=1.0, top_p=0.6, seed=4),
    "repetition penalty": Sampling(temperature=0.7, repetition_penalty=1.4, seed=5),
    "all of them": Sampling(1.2, 20, 0.9, 1.3, seed=6),
    "greedy with repetition penalty": Sampling(repetition_penalty=1.5),
}


# -- the same tokens ---------------------------------------------------------------------------

RAGGED = [run.prompt(9, seed=1), run.prompt(1, seed=2), run.prompt(4, seed=3)]
STOPS = [Stop(6), Stop(9), Stop(3)]


@cache
def written(setting: str) -> tuple[DecoderLM, list[run.Row]]:
    model = run.model()
    return model, run.plain(model, RAGGED, STOPS, SETTINGS[setting])


@pytest.mark.parametrize("draft", thinned(DRAFTS.keys(), KEPT))
@pytest.mark.parametrize(
    "setting",
    thinned(SETTINGS.keys(), keep=("temperature", "all of them", "greedy with repetition penalty")),
)
def test_one_seed_writes_one_text_whatever_drafts(setting: str, draft: str) -> None:
    model, expected = written(setting)
    got = run.drafted(model, RAGGED, DRAFTS[draft](model), 4, STOPS, SETTINGS[setting])
    assert got.rows == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_exits_that_agree_are_accepted_in_sampling_too(setting: str) -> None:
    """An exit with the tower's logits draws the tower's tokens: acceptance 100 %."""
    model = run.model(late=0.0)
    got = run.drafted(model, RAGGED, EarlyExitDraft(2, LAYERS), 4, Stop(11), SETTINGS[setting])
    kept = [s for s in got.steps if s.finish_reason is None]
    assert all(s.accepted == len(s.drafted) for s in kept)
    assert got.accepted > 20


def test_rows_and_seeds_write_different_texts() -> None:
    model, ids = run.model(), run.prompt(5)
    texts = set()
    for seed in range(3):
        rows = run.plain(model, [ids] * 3, Stop(12), Sampling(temperature=1.0, seed=seed))
        texts |= {row.tokens for row in rows}
    assert len(texts) == 9


# -- the right distribution --------------------------------------------------------------------

V = 8


def is_plausible(counts: Mapping[Any, int], expected: Mapping[Any, float]) -> bool:
    """Pearson's chi-square test at significance 0.001; expected counts below 5 are pooled.

    Critical value after Wilson and Hilferty: chi-square / df is about the cube of a normal.
    """
    assert set(counts) <= {key for key, n in expected.items() if n > 0.0}
    small = {key for key, n in expected.items() if n < 5.0}
    cells = [(counts.get(key, 0), n) for key, n in expected.items() if key not in small]
    if small:
        cells.append((sum(counts.get(k, 0) for k in small), sum(expected[k] for k in small)))
    cells = [(seen, n) for seen, n in cells if n > 0.0]
    statistic = sum((seen - n) ** 2 / n for seen, n in cells)
    df, z = len(cells) - 1, 3.0902
    return statistic <= df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3


def test_the_plausibility_test_knows_a_loaded_die() -> None:
    fair = dict.fromkeys(range(6), 100.0)
    assert is_plausible(dict(enumerate([91, 108, 102, 97, 110, 92])), fair)
    assert not is_plausible(dict(enumerate([80, 90, 95, 100, 105, 130])) | {0: 60}, fair)


def slow_distribution(logits: Tensor, seen: Sequence[int], sampling: Sampling) -> list[float]:
    """Penalty, temperature, top-k, top-p by the book, one token at a time."""
    x = [
        (v / sampling.repetition_penalty if v > 0 else v * sampling.repetition_penalty)
        if token in seen
        else v
        for token, v in enumerate(logits.tolist())
    ]
    x = [v / sampling.temperature for v in x]
    order = sorted(range(len(x)), key=lambda token: -x[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = {token: math.exp(x[token]) for token in order}
    p = {token: value / sum(p.values()) for token, value in p.items()}
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += p[token]
    return [p[token] / mass if token in kept else 0.0 for token in range(len(x))]


@cache
def small_model() -> DecoderLM:
    """8 tokens, 3 layers; the first exit is often but not always right."""
    return run.model(
        late=0.6, early_layers=1, num_layers=3, vocab_size=V, d_model=8, num_heads=1,
        num_kv_heads=1, head_dim=8, d_ff=8,
    )  # fmt: skip


PROMPT = [3, 1, 4]


def joint_distribution(sampling: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """The probability of each continuation of `PROMPT`, from the logits of whole texts."""
    model, joint = small_model(), {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        texts = torch.tensor([[*PROMPT, *tail] for tail in joint])
        logits = model.logits(toy.run(model, texts)[:, -1], model.config.num_layers)
        for (tail, p), row in zip(joint.items(), logits, strict=True):
            q = slow_distribution(row, [*PROMPT, *tail], sampling)
            longer |= {(*tail, token): p * q[token] for token in range(V)}
        joint = longer
    return joint


DRAWN = {
    "temperature 1": (Sampling(temperature=1.0), 2),
    "first three tokens": (Sampling(temperature=0.7), 3),
    "all filters": (Sampling(1.3, 6, 0.85, 1.4), 2),
}


@pytest.mark.parametrize("drawn", thinned(["temperature 1", "all filters"], ["all filters"]))
def test_plain_sampling_draws_from_the_distribution(drawn: str) -> None:
    """One text per seed."""
    sampling, length = DRAWN[drawn]
    count = 200
    texts = [
        run.plain(small_model(), [PROMPT], Stop(length), _seeded(sampling, seed))[0].tokens
        for seed in range(count)
    ]
    joint = joint_distribution(sampling, length)
    assert is_plausible(Counter(texts), {tail: p * count for tail, p in joint.items()})


@pytest.mark.parametrize("drawn", thinned(DRAWN.keys(), keep=["all filters"]))
def test_speculative_sampling_draws_from_the_distribution(drawn: str) -> None:
    """With drafts that are refused now and then; 400 rows for each of 6 seeds."""
    sampling, length = DRAWN[drawn]
    texts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for seed in range(6):
        got = run.drafted(
            small_model(), [PROMPT] * 400, EarlyExitDraft(1, 3), 2, Stop(length),
            _seeded(sampling, seed),
        )  # fmt: skip
        texts.update(row.tokens for row in got.rows)
        drafted, accepted = drafted + got.drafted, accepted + got.accepted
    assert 0.1 < accepted / drafted < 0.9
    joint = joint_distribution(sampling, length)
    assert is_plausible(texts, {tail: p * 2400 for tail, p in joint.items()})


def _seeded(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, seed
    )


# -- the noise ---------------------------------------------------------------------------------


def draws(seed: int, rows: Sequence[int], positions: int) -> Tensor:
    """Tokens [rows, positions] drawn from equal logits: nothing but noise."""
    chooser = Chooser(Sampling(temperature=1.0, seed=seed), [[0]] * len(rows), rows, V, CPU)
    logits = torch.zeros(len(rows), positions, V)
    return chooser.choose(logits, [1] * len(rows), None)


CPU = torch.device("cpu")
NEIGHBOURS = {
    "rows": lambda t: (t[:, :-1, :], t[:, 1:, :]),
    "positions": lambda t: (t[:, :, :-1], t[:, :, 1:]),
    "seeds": lambda t: (t[:-1], t[1:]),
    "rows and positions": lambda t: (t[:, :-1, 1:], t[:, 1:, :-1]),
    "seeds and rows": lambda t: (t[:-1, 1:], t[1:, :-1]),
    "seeds and positions": lambda t: (t[:-1, :, 1:], t[1:, :, :-1]),
}


@cache
def grid() -> Tensor:
    """Tokens [seeds, rows, positions]."""
    return torch.stack([draws(seed, range(20), 20) for seed in range(20)])


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_noise_of_neighbours_is_independent(neighbours: str) -> None:
    one, other = (t.flatten().tolist() for t in NEIGHBOURS[neighbours](grid()))
    pairs = dict.fromkeys(itertools.product(range(V), repeat=2), len(one) / V**2)
    assert is_plausible(Counter(zip(one, other, strict=True)), pairs)


def test_noise_depends_on_seed_row_and_position_alone() -> None:
    whole = grid()[7]
    chooser = Chooser(Sampling(temperature=1.0, seed=7), [[0]] * 2, [4, 2], V, CPU)
    logits = torch.zeros(2, 3, V)
    assert torch.equal(
        chooser.choose(logits, [5, 1], None), torch.stack([whole[4, 4:7], whole[2, :3]])
    )
    chooser.commit(0, [1, 2], 9)  # what is past may be forgotten, and made again
    assert torch.equal(
        chooser.choose(logits, [5, 9], None), torch.stack([whole[4, 4:7], whole[2, 8:11]])
    )
    chooser.keep([1])
    assert torch.equal(chooser.choose(logits[:1], [1], None)[0], whole[2, :3])


def test_the_noise_of_what_is_past_is_not_kept() -> None:
    chooser = Chooser(Sampling(temperature=1.0), [[0]], [0], V, CPU)
    for position in range(1, 50):
        chooser.choose(torch.zeros(1, 3, V), [position], None)
        chooser.commit(0, [1], position + 1)
        assert len(chooser._noise) <= 3


# -- filters -----------------------------------------------------------------------------------


def random_logits(rows: int, size: int, seed: int) -> Tensor:
    return 3.0 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 12, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_keep_top_equals_the_slow_way(top_k: int, top_p: float) -> None:
    logits = random_logits(12, 12, seed=top_k)
    kept = keep_top(logits.view(3, 4, 12), top_k, top_p).view(12, 12)
    sampling = Sampling(1.0, top_k, top_p)
    expected = torch.tensor([slow_distribution(row, [], sampling) for row in logits])
    torch.testing.assert_close(kept.softmax(-1), expected)
    assert torch.equal(kept.isfinite(), expected > 0)
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


@pytest.fixture(scope="module")
def processors() -> Iterator[Any]:
    yield pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize("top_k", [1, 5, 40, 80])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 1.0])
def test_filters_equal_those_of_transformers(processors: Any, top_k: int, top_p: float) -> None:
    logits = random_logits(16, 61, seed=1)
    theirs = processors.TopKLogitsWarper(top_k)(None, logits)
    theirs = processors.TopPLogitsWarper(top_p)(None, theirs) if top_p < 1.0 else theirs
    assert torch.equal(keep_top(logits, top_k, top_p), theirs)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_equals_that_of_transformers(
    processors: Any, penalty: float
) -> None:
    """Over prompt, text and the drafted tokens before the one to choose."""
    prompts, drafted = [[1, 2, 3], [4, 5]], torch.tensor([[7, 8], [9, 5]])
    chooser = Chooser(Sampling(repetition_penalty=penalty), prompts, [0, 1], 12, CPU)
    chooser.commit(0, [6, 6], 5)
    texts = [[1, 2, 3, 6, 6], [4, 5]]
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty)
    for seed in range(20):
        logits = random_logits(6, 12, seed).view(2, 3, 12)
        chosen = chooser.choose(logits, [5, 2], drafted)
        alone = chooser.choose(logits[:, -1:], [5, 2], drafted)
        assert torch.equal(alone, chosen[:, -1:]), "the draft's way of asking"
        for row, column in itertools.product(range(2), range(3)):
            before = torch.tensor([texts[row] + drafted[row, :column].tolist()])
            scores = theirs(before, logits[row, column][None])
            assert chosen[row, column] == scores.argmax()


def test_temperature_0_is_greedy_and_a_low_one_nearly() -> None:
    logits = random_logits(40, 61, seed=2)[None]
    greedy = Chooser(Sampling(), [[0]], [0], 61, CPU).choose(logits, [1], None)
    assert torch.equal(greedy, logits.argmax(-1))
    for sampling in (Sampling(1e-4), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)):
        chooser = Chooser(sampling, [[0]], [0], 61, CPU)
        assert torch.equal(chooser.choose(logits, [1], None), greedy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_full(dtype: torch.dtype) -> None:
    logits = random_logits(40, 61, seed=3)[None].to(dtype)
    sampling = Sampling(1.0, 10, 0.9, 1.2, seed=1)
    one, other = (Chooser(sampling, [[0]], [0], 61, CPU) for _ in range(2))
    assert torch.equal(one.choose(logits, [1], None), other.choose(logits.float(), [1], None))


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "seed is 2147483648"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        Sampling(**options)
    assert "\n" not in str(error.value)
    assert "must be" in str(error.value)
