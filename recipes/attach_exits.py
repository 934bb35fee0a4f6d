"""Exits on a Wav2Vec2, HuBERT, WavLM or Parakeet checkpoint, trained on recordings of your own.

Give the checkpoint's folder and a manifest with the splits train and dev:
`--set folder=my-model --set 'sets=["my.tsv"]' --set 'dev_sets=["my.tsv"]'`. The model itself stays
as it is; `--set freeze=false` trains all of it, with a lower lr (1e-5 or so).
"""

from offramp.train.ctc import CTCTraining
from offramp.train.loop import TrainConfig
from offramp.train.speech import SpeechRecipe
from offramp.train.trainee import Pretrained

recipe = SpeechRecipe(
    name="attached-exits",
    encoder=Pretrained("my-model"),
    sets=("mini_librispeech_train_clean_5",),
    dev_sets=("mini_librispeech_train_clean_5",),
    batch_seconds=60.0,
    training=CTCTraining(distill=0.5),
    train=TrainConfig(
        steps=1000,
        lr=1e-3,
        warmup_steps=100,
        weight_decay=0.01,
        checkpoint_every=100,
        evaluate_every=250,
    ),
)
