"""LayerSkip on transformers models: equal to our own training, and afterwards without a trace."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from offramp.data.batching import IGNORE, TokenBatch
from offramp.errors import ConfigError
from offramp.models.hub import load_decoder, save_decoder
from offramp.nn.layer_dropout import draw_survivors
from offramp.tokenizer import BOS, EOS, PAD, train_bpe
from offramp.train.hf_trainer import LayerSkip, exit_loss, layerskip
from offramp.train.layerskip import LayerSkipConfig, LayerSkipTask
from offramp.train.losses import ExitHead, early_exit_loss
from offramp.train.schedules import ExitCurriculum
from thinned import thinned
from toy import randomize

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
L, V, SEED = 5, 53, 3
ALL = LayerSkipConfig(
    p_max=0.6, early_exit_scale=0.5, curriculum=ExitCurriculum("all"), distill=0.3
)


def toy(family: str = "Llama", seed: int = 0, **settings: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,  # its row of the embedding would get no gradient
        **{"vocab_size": V, **settings},
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomize(model, seed)
    return model


def examples(count: int, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences with a rule to learn; the first tokens, a different number in each, no targets."""
    start = torch.arange(count) * 7 % V
    tokens = (start[:, None] + 5 * torch.arange(length)) % V
    labels = tokens.masked_fill(torch.arange(length) < (torch.arange(count) % 4)[:, None], IGNORE)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def joint(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name] for r in rows]) for name in rows[0]}


class KeepGradients(transformers.TrainerCallback):
    """What each optimizer step was given: parameter name -> gradient."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append({n: g.clone() for n, g in gradients.items()})


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    data = settings.pop("data", examples(8))
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
            **settings,
        }
    )
    return transformers.Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=0.0, atol=atol, msg=lambda m, n=name: n + m
        )


class OneBatch:
    """`data.batching.TokenBatches` that always gives the same batch."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        both = joint(rows)
        targets = both["labels"][:, 1:]
        self._batch = TokenBatch(both["input_ids"][:, :-1], targets, int((targets != IGNORE).sum()))

    def batch(self, step: int, shard: int, num_shards: int) -> TokenBatch:
        return self._batch


def our_gradients(
    model: Any, options: LayerSkipConfig, folder: Path, step: int
) -> dict[str, Tensor]:
    """The gradients of our own task on the same weights, under transformers' names."""
    model.save_pretrained(folder / "weights")
    ours = load_decoder(folder / "weights").requires_grad_().train()
    LayerSkipTask(ours, OneBatch(examples(8)), options, 10, SEED).backward(step, 0, 1)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    save_decoder(ours, folder / "gradients")
    return load_file(folder / "gradients" / "model.safetensors")


# -- the same numbers as our own training ----------------------------------------------------------


@pytest.mark.parametrize("family", thinned(FAMILIES, keep=("Llama", "Qwen3")))
def test_a_trainer_step_has_the_gradients_of_our_own_task(family: str, tmp_path: Path) -> None:
    model, kept = toy(family), KeepGradients()
    wanted = our_gradients(model, ALL, tmp_path, step=0)
    with layerskip(model, ALL, seed=SEED) as skip:
        trainer(model, tmp_path, [skip.callback, kept]).train()
    assert not draw_survivors(L, 8, 0.6, 1.0, SEED, 0).all(), "nothing was dropped"
    assert_close(kept.steps[0], wanted, 1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["rotational", "gradual", "last"])
def test_each_curriculum_in_a_loop_of_ones_own(kind: str, tied: bool, tmp_path: Path) -> None:
    options = LayerSkipConfig(0.5, "exp", 1.0, ExitCurriculum(kind, 2))
    model = toy(tie_word_embeddings=tied)
    wanted = our_gradients(model, options, tmp_path, step=3)
    with layerskip(model.train(), options, total_steps=10, seed=SEED) as skip:
        skip.at(3)
        model(**joint(examples(8))).loss.backward()
    assert_close(gradients_of(model), wanted, 1e-4)


def test_loss_of_a_step_is_the_weighted_mean_over_targets(tmp_path: Path) -> None:
    options = LayerSkipConfig(early_exit_scale=1.0, curriculum=ExitCurriculum("all"))
    model, batch = toy(), joint(examples(8))
    states = model.model(batch["input_ids"], output_hidden_states=True).hidden_states
    targets = batch["labels"][:, 1:].flatten()
    head = ExitHead(model.model.norm, model.lm_head.weight)
    hidden = {i: states[i + 1][:, :-1].flatten(0, 1) for i in range(L - 1)}
    with layerskip(model.train(), options, total_steps=1) as skip:
        skip.at(0)
        output = model(**batch)
    wanted = {1: 1.0, 2: 3.0, 3: 6.0, 4: 4.0 + 6.0}  # e(l) of the paper, by hand
    early = early_exit_loss(head, hidden, targets, {i: wanted[i] / 20 for i in (1, 2, 3)})
    last = model.eval()(**batch).loss * (targets != IGNORE).sum() * wanted[4] / 20
    torch.testing.assert_close(output.loss, (early + last) / (targets != IGNORE).sum())
    assert output.logits.shape == (8, 1, V)  # documented: the last position alone
    assert output.past_key_values is None


@pytest.mark.slow
def test_accumulation_over_batches_equals_one_batch(tmp_path: Path) -> None:
    steps = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model, kept = toy(), KeepGradients()
        with layerskip(model, ALL, seed=SEED) as skip:
            trainer(
                model,
                tmp_path,
                [skip.callback, kept],
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_steps=2,
                data=examples(16),
            ).train()
        steps.append(kept.steps)
    for other in steps[1:]:
        assert_close(other[0], steps[0][0], 1e-6)
        assert_close(other[1], steps[0][1], 1e-4)  # after an update by AdamW


@pytest.mark.slow
@pytest.mark.parametrize("how", ["activation_checkpointing", "bf16"])
def test_options_of_the_trainer_that_wrap_the_model(how: str, tmp_path: Path) -> None:
    results = []
    for settings in ({}, {how: True}):
        model, kept = toy(), KeepGradients()
        with layerskip(model, ALL, seed=SEED) as skip:
            trainer(model, tmp_path, [skip.callback, kept], **settings).train()
        results.append(kept.steps[0])
    assert_close(results[1], results[0], 1e-6 if how == "activation_checkpointing" else 0.02)


# -- layer dropout -------------------------------------------------------------------------------


def watch_layers(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Fills, in each forward, with every layer's (input, output) [B, T, D]."""
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    return seen


def left_padded() -> dict[str, Tensor]:
    batch = joint(examples(4))
    mask = torch.arange(12) >= torch.tensor([0, 3, 5, 8])[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = batch["labels"].masked_fill(~mask, IGNORE)
    return batch | {"labels": labels, "attention_mask": mask.long(), "position_ids": positions}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_rows_are_untouched_and_masks_follow_the_rest(family: str, attention: str) -> None:
    """Each row of a left-padded batch equals that row alone, through its surviving layers."""
    options = LayerSkipConfig(p_max=0.7)
    survivors = draw_survivors(L, 4, 0.7, 1.0, SEED, step=1)
    assert 0 < survivors[1:].sum() < survivors[1:].numel()
    model, batch = toy(family, attn_implementation=attention).train(), left_padded()
    seen = watch_layers(model)
    with layerskip(model, options, total_steps=10, seed=SEED) as skip:
        skip.at(1)
        model(**batch)
    together = list(seen)
    for i, (before, after) in enumerate(together):
        assert torch.equal(before[~survivors[i]], after[~survivors[i]])
    whole = nn.ModuleList(model.model.layers)
    for row in range(4):
        kept = [i for i in range(L) if survivors[i, row]]
        model.model.layers = nn.ModuleList(whole[i] for i in kept)
        model.config.num_hidden_layers = len(kept)
        seen.clear()
        model.eval()(**{n: x[row : row + 1] for n, x in batch.items()}, use_cache=False)
        real = batch["attention_mask"][row].bool()
        for i, (_, alone) in zip(kept, seen, strict=True):
            torch.testing.assert_close(together[i][1][row, real], alone[0, real])


def test_a_mask_without_rows_is_refused() -> None:
    from offramp.train.hf_trainer import _select

    with pytest.raises(ConfigError, match="attn_implementation"):
        _select("attention_mask", object(), torch.tensor([0]), 2)


# -- the loss by chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [0.0, 0.4])
def test_exit_loss_equals_the_joint_loss_and_holds_one_chunk_at_a_time(distill: float) -> None:
    torch.manual_seed(0)
    norm, unembedding = nn.RMSNorm(8), nn.Linear(8, V, bias=False)
    hidden = {i: torch.randn(40, 8, requires_grad=True) for i in range(6)}
    targets = torch.where(torch.arange(40) % 3 == 0, IGNORE, torch.arange(40))
    weights = {i: (i + 1) / 21 for i in range(6)}
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def head(h: Tensor) -> Tensor:
        nonlocal most
        logits: Tensor = unembedding(norm(h))
        alive.append(weakref.ref(logits))
        assert len(logits) <= 7
        most = max(most, sum(ref() is not None for ref in alive))
        return logits

    leaves = [*hidden.values(), norm.weight, unembedding.weight]
    got = exit_loss(head, hidden, targets, weights, distill, chunk=7)
    got_gradients = torch.autograd.grad(got, leaves)
    assert most <= 2  # an exit's and, with distillation, its teacher's
    wanted = early_exit_loss(ExitHead(norm, unembedding.weight), hidden, targets, weights, distill)
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(got_gradients, torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_without_targets_adds_nothing() -> None:
    model, batch = toy().train(), joint(examples(2))
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    with layerskip(model, ALL, total_steps=1) as skip:
        skip.at(0)
        loss = model(**batch).loss
        loss.backward()
    assert loss == 0.0
    gradients = gradients_of(model)
    assert "lm_head.weight" in gradients  # all that DDP waits for is there, and zero
    assert all(g.count_nonzero() == 0 for g in gradients.values())


# -- under the Trainer ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_goes_down_and_evaluation_is_plain(tmp_path: Path) -> None:
    options = LayerSkipConfig(0.1, "exp", 0.3, ExitCurriculum("rotational", 2), distill=0.1)
    model = toy()
    with layerskip(model, options) as skip:
        run = trainer(
            model, tmp_path, [skip.callback], max_steps=40, eval_strategy="steps", eval_steps=20
        )
        first = run.evaluate()["eval_loss"]
        run.train()
        inside = run.evaluate()["eval_loss"]
    last = run.evaluate()["eval_loss"]
    assert inside == last < first / 2
    batch = joint(examples(8))
    assert model.eval()(**batch).loss.item() == pytest.approx(last, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    options = LayerSkipConfig(0.5, "exp", 0.5, ExitCurriculum("gradual"))
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = toy()
        with layerskip(model, options, seed=SEED) as skip:
            trainer(
                model, tmp_path, [skip.callback], max_steps=5, save_strategy="steps", save_steps=3
            ).train(resume_from_checkpoint=resume)
        weights.append(model.state_dict())
    assert_close(weights[1], weights[0], 0.0)


def lora(model: Any, **settings: Any) -> Any:
    chosen = {"target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **chosen)
    return peft.get_peft_model(model, config)


@pytest.mark.slow
def test_lora_changes_adapters_only_and_the_merged_model_is_ordinary(tmp_path: Path) -> None:
    model = lora(toy())
    before = {n: p.clone() for n, p in model.named_parameters()}
    options = LayerSkipConfig(0.2, "constant", 1.0, ExitCurriculum("rotational", 2))
    with layerskip(model, options, seed=SEED) as skip:
        trainer(model, tmp_path, [skip.callback], max_steps=6).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")

    tokens = joint(examples(3))["input_ids"]
    ours = load_decoder(tmp_path / "merged")
    h = ours.embed(tokens)
    for i in range(L):
        h = ours.layer(i, h, ours.view(tokens.shape[1]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(h, L), theirs(tokens).logits, rtol=0, atol=1e-5)
    plain = theirs.generate(tokens[:1], max_new_tokens=16, do_sample=False)
    drafted = theirs.generate(
        tokens[:1], max_new_tokens=16, do_sample=False, assistant_early_exit=2
    )
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_lora_has_the_gradients_of_its_merged_model(settings: dict[str, Any]) -> None:
    """The chain rule from a full fine-tune's gradient G of a matrix: dA = s B'G, dB = s G A'."""
    options = LayerSkipConfig(0.5, early_exit_scale=0.5, curriculum=ExitCurriculum("all"))
    full, adapted = toy().train(), lora(toy(), **settings).train()
    state = {n.replace(".modules_to_save.default", ""): p for n, p in adapted.state_dict().items()}
    matrix = full.model.layers[2].self_attn.q_proj.weight
    for i in range(L):
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"base_model.model.model.layers.{i}.{part}"
            a, b = (state[f"{name}.lora_{x}.default.weight"] for x in "AB")
            with torch.no_grad():
                full.model.layers[i].get_submodule(part).weight += 2.0 * b @ a  # alpha 8 / r 4
    for model in (full, adapted):
        with layerskip(model, options, total_steps=10, seed=SEED) as skip:
            skip.at(2)
            model(**joint(examples(8))).loss.backward()
    got = gradients_of(adapted)
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.default.weight"
    a, b = (state[name.format(x)] for x in "AB")
    assert matrix.grad is not None
    torch.testing.assert_close(got[name.format("A")], 2.0 * b.T @ matrix.grad)
    torch.testing.assert_close(got[name.format("B")], 2.0 * matrix.grad @ a.T)
    if settings:
        head = "base_model.model.lm_head.modules_to_save.default.weight"
        torch.testing.assert_close(got[head], full.lm_head.weight.grad)


def test_a_step_that_drops_every_layer_with_an_adapter_teaches_nothing() -> None:
    model = lora(toy(), layers_to_transform=[L - 1]).train()
    with layerskip(model, LayerSkipConfig(p_max=0.9), total_steps=10) as skip:
        step = next(s for s in range(99) if not draw_survivors(L, 1, 0.9, 1.0, 0, s)[L - 1].any())
        skip.at(step)
        model(**joint(examples(1))).loss.backward()
    assert not any(g.count_nonzero() for g in gradients_of(model).values())


# -- nothing stays behind ------------------------------------------------------------------------


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by identity, hooks and registries by their content."""
    return {
        f"{name}.{key}": [(k, id(v)) for k, v in value.items()]
        if isinstance(value, dict)
        else id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["plain", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_came(wrap: Callable[[Any], Any], fails: bool) -> None:
    model, batch = wrap(toy()).train(), joint(examples(4))
    plain = model(**batch)
    before, weights = anatomy(model), {n: x.clone() for n, x in model.state_dict().items()}
    try:
        with layerskip(model, ALL, total_steps=2) as skip:
            skip.at(0)
            changed = model(**batch)
            assert changed.loss != plain.loss
            assert torch.equal(model.eval()(**batch).logits, plain.logits)  # evaluation is plain
            model.train()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert anatomy(model) == before
    assert_close(model.state_dict(), weights, 0.0)
    after = model(**batch)
    assert torch.equal(after.logits, plain.logits) and torch.equal(after.loss, plain.loss)


def test_what_was_there_before_is_put_back() -> None:
    model = toy()
    first = model.model.layers[0]
    first.forward = first.forward  # as accelerate's hooks do: an attribute of the instance
    model.loss_function = transformers.loss.loss_utils.ForCausalLMLoss
    before = anatomy(model)
    with layerskip(model, ALL, total_steps=1):
        assert anatomy(model) != before
    assert anatomy(model) == before


def test_a_failed_forward_leaves_no_states_behind() -> None:
    model = toy().train()
    with layerskip(model, ALL, total_steps=1) as skip:
        skip.at(0)
        with pytest.raises(IndexError):
            model(torch.tensor([[V]]), labels=torch.tensor([[0]]))
        assert skip._forward is None
        model(**joint(examples(2))).loss.backward()
        assert skip._forward is None


# -- mistakes ------------------------------------------------------------------------------------


def test_training_without_step_or_labels_is_refused(tmp_path: Path) -> None:
    model, batch = toy().train(), joint(examples(2))
    with layerskip(model, ALL, total_steps=1) as skip:
        with pytest.raises(ConfigError, match="callbacks"):
            model(**batch)
        skip.at(0)
        with pytest.raises(ConfigError, match="label_smoothing_factor"):
            model(batch["input_ids"])
        with torch.no_grad():
            model(batch["input_ids"])  # not training
    with layerskip(model, ALL) as skip:
        skip.at(0)
        with pytest.raises(ConfigError, match="total_steps"):
            model(**batch)
    with (
        layerskip(model, ALL, total_steps=7) as skip,
        pytest.raises(ConfigError, match=r"7 .* 1 steps"),
    ):
        trainer(model, tmp_path, [skip.callback]).train()


def test_a_forward_that_bypasses_the_loss_is_refused() -> None:
    model, batch = toy().train(), joint(examples(2))
    with layerskip(model, ALL, total_steps=1) as skip:
        skip.at(0)
        model.forward = lambda **kwargs: model.model(kwargs["input_ids"])
        with pytest.raises(ConfigError, match="use_liger_kernel"):
            model(**batch)


def test_several_gpus_in_one_process_are_refused() -> None:
    skip = LayerSkip(toy(), ALL, None, 0)
    args, state = SimpleNamespace(n_gpu=2), SimpleNamespace(max_steps=1)
    with pytest.raises(ConfigError, match="torchrun"):
        skip.callback.on_train_begin(args, state, None)


def test_other_models_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    other = transformers.LlamaForSequenceClassification(toy().config)
    for model in (other, nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="LlamaForCausalLM"), layerskip(model, ALL):
            pass
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"offramp\[hf\]"), layerskip(nn.Linear(2, 2), ALL):
        pass


# -- the how-to ----------------------------------------------------------------------------------

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "transformers-trainer.md"
TEXTS = ["The count opened the door.", "The count said nothing.", "The door said nothing to him."]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.slow
def test_the_how_to_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join(TEXTS))
    train_bpe(TEXTS, 300, []).save(Path("tokenizer.json"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file="tokenizer.json", pad_token=PAD, eos_token=EOS, bos_token=BOS
    ).save_pretrained("my-model")
    toy(vocab_size=300).save_pretrained("my-model")
    blocks = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(HOW_TO), "exec"), names)
    prompt = names["inputs"]["input_ids"][0].tolist()
    assert names["tokens"][0].tolist() == [*prompt, *names["answer"].tokens]
