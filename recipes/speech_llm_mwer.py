"""speech-llm-tiny, last stage: fewer word errors, from the texts that its own search finds.

Projector, decoder and heads learn; the encoder stays, and with it the text that its CTC drafts.
Each head keeps a little of its cross-entropy: without it the decoder would forget the language, and
the heads the decoder. A step on 60 s of audio takes about 3 s of one core. With these settings
speech-llm-tiny got worse and was stopped (docs/log.md): the checkpoint that ships is without it.
"""

from offramp.data.augment_audio import AudioAugmentation
from offramp.train.loop import TrainConfig
from offramp.train.mwer import MWERTraining
from offramp.train.speech_lm_recipe import SpeechLMRecipe

recipe = SpeechLMRecipe(
    name="speech-llm-mwer",
    model="runs/speech-llm-tiny-heads/checkpoint",
    sets=(
        "mini_librispeech_train_clean_5",
        "kathleen_arctic",
        "kathleen_more_takes",
        "ljspeech_excerpt",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    digit_strings=400,
    digits_in_string=(1, 7),
    synthetic_sentences=1_500,
    augmentation=AudioAugmentation(
        p_speed=0.8,
        p_reverberation=0.15,
        p_noise=0.3,
        snr_db=(10.0, 30.0),
        p_telephone=0.05,
        p_volume=0.5,
    ),
    batch_seconds=60.0,
    training=MWERTraining(
        head_weights=(0.05, 0.05, 0.05, 0.05),
        ctc=0.0,
        freeze=("encoder",),
        autocast="bf16",
        n_best=4,
        beam_size=4,
    ),
    dev_sets=(
        "kathleen_arctic",
        "mini_librispeech_train_clean_5",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    train=TrainConfig(
        steps=150,
        lr=1e-4,
        warmup_steps=20,
        weight_decay=0.01,
        average=0.99,
        checkpoint_every=20,
        evaluate_every=50,
    ),
)
