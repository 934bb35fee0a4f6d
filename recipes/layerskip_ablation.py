"""The ablation of LayerSkip's two parts on novels, at a size where one run takes minutes.

As it stands: both parts. The other rows of the table, each with seeds 0, 1 and 2:
no LayerSkip   --set p_max=0 --set early_exit_scale=0 --set distill=0
dropout only   --set early_exit_scale=0 --set distill=0
exit loss only --set p_max=0
"""

from offramp.config import DecoderConfig
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import TrainConfig
from offramp.train.schedules import ExitCurriculum
from offramp.train.text import TextRecipe

recipe = TextRecipe(
    name="layerskip-ablation",
    model=DecoderConfig(
        vocab_size=2048,
        d_model=96,
        num_layers=12,
        num_heads=3,
        num_kv_heads=1,
        head_dim=32,
        d_ff=320,
        max_positions=512,
        tied_embeddings=True,
        bos_id=0,
        eos_ids=(1,),
    ),
    corpus="books",
    seq_len=128,
    batch_size=16,
    layerskip=LayerSkipConfig(
        p_max=0.1,
        dropout_schedule="exp",
        early_exit_scale=0.5,
        curriculum=ExitCurriculum("rotational", period=6),
        distill=0.2,
    ),
    train=TrainConfig(steps=300, lr=3e-3, warmup_steps=20, optimizer="muon", evaluate_every=300),
)
