"""speech-llm-tiny, first stage: its decoder learns to write transcripts before it hears any.

The sentences of eight novels and of LibriSpeech dev-clean, spelled as transcripts and one by one,
in the tokens of asr-tiny: 5 million tokens, against the 150,000 of the speech. None of them is
said in the dev splits that the next stages look at. The early-exit loss is a light one, for exits
low enough to draft. One pass over the sentences: a step on 2,500 tokens takes about 1.2 s of one
core, the whole about 40 minutes.
"""

from offramp.config import DecoderConfig
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import TrainConfig
from offramp.train.schedules import ExitCurriculum
from offramp.train.text import TextRecipe

recipe = TextRecipe(
    name="speech-llm-decoder",
    model=DecoderConfig(
        vocab_size=257,
        d_model=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=768,
        max_positions=512,
        tied_embeddings=True,
        bos_id=255,
        eos_ids=(256,),
    ),
    tokens_of="asr-tiny",
    corpus="sentences",
    batch_size=64,
    layerskip=LayerSkipConfig(
        p_max=0.05,
        dropout_schedule="exp",
        early_exit_scale=0.1,
        curriculum=ExitCurriculum("all", exits=(2, 3, 4), weighting="uniform"),
        distill=0.2,
    ),
    train=TrainConfig(
        steps=2000,
        lr=3e-3,
        warmup_steps=100,
        optimizer="muon",
        checkpoint_every=200,
        evaluate_every=500,
    ),
)
