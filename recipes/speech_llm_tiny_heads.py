"""speech-llm-tiny, fourth stage: three heads more, which learn alone; not a word changes.

Each predicts one token further from the decoder's last state. The trunk is frozen, so that no
gradient has to pass it.
"""

from offramp.config_speech_lm import HeadsConfig
from offramp.data.augment_audio import AudioAugmentation
from offramp.train.loop import TrainConfig
from offramp.train.speech_lm import SpeechLMTraining
from offramp.train.speech_lm_recipe import NewHeads, SpeechLMRecipe

recipe = SpeechLMRecipe(
    name="speech-llm-tiny-heads",
    model=NewHeads("runs/speech-llm-tiny/checkpoint", HeadsConfig(count=4)),
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
    training=SpeechLMTraining(ctc=0.0, freeze=("encoder", "projector", "decoder"), autocast="bf16"),
    dev_sets=(
        "kathleen_arctic",
        "mini_librispeech_train_clean_5",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    train=TrainConfig(
        steps=600,
        lr=2e-3,
        warmup_steps=30,
        weight_decay=0.01,
        checkpoint_every=100,
        evaluate_every=100,
    ),
)
