"""lm-tiny: a 6 M parameter decoder trained from scratch on eight novels with LayerSkip.

From-scratch settings of the paper (S_exp(t), rotational exits, higher learning rate), with a
small p_max and a light distillation so that the last layer does not lose. Its tokenizer, which
parse-tiny shares, is made from the utterances of top_v1 and topv2_english as well.
"""

from offramp.config import DecoderConfig
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import TrainConfig
from offramp.train.schedules import ExitCurriculum
from offramp.train.text import TextRecipe

recipe = TextRecipe(
    name="lm-tiny",
    model=DecoderConfig(
        vocab_size=2048,
        d_model=192,
        num_layers=12,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        d_ff=640,
        max_positions=512,
        tied_embeddings=True,
        bos_id=0,
        eos_ids=(1,),
    ),
    corpus="books",
    seq_len=256,
    batch_size=16,
    layerskip=LayerSkipConfig(
        p_max=0.1,
        dropout_schedule="exp",
        early_exit_scale=0.5,
        curriculum=ExitCurriculum("rotational", period=6),
        distill=0.2,
    ),
    train=TrainConfig(steps=700, lr=3e-3, warmup_steps=60, optimizer="muon"),
)
