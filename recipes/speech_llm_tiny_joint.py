"""speech-llm-tiny, fifth stage: decoder and heads learn together.

Behind a decoder that stays as it is, heads have to guess from a state that was made for the next
token alone; here it learns to look further ahead. The encoder stays, and with it the text that its
CTC drafts. A step takes about 1.2 s of one core.
"""

from offramp.data.augment_audio import AudioAugmentation
from offramp.train.augment import SpecAugment
from offramp.train.loop import TrainConfig
from offramp.train.speech_lm import SpeechLMTraining
from offramp.train.speech_lm_recipe import SpeechLMRecipe

recipe = SpeechLMRecipe(
    name="speech-llm-tiny-joint",
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
    training=SpeechLMTraining(
        head_weights=(1.0, 0.5, 0.5, 0.5),
        ctc=0.0,
        decoder_exits=(2, 3, 4),
        token_noise=0.1,
        freeze=("encoder",),
        augment=SpecAugment(max_channels=12, time_masks=4),
        autocast="bf16",
    ),
    dev_sets=(
        "kathleen_arctic",
        "mini_librispeech_train_clean_5",
        "ljspeech_part_1",
        "vctk_p239",
        "common_voice_en_100",
    ),
    train=TrainConfig(
        steps=1100,
        lr=4e-4,
        warmup_steps=50,
        optimizer="muon",
        weight_decay=0.05,
        average=0.998,
        checkpoint_every=100,
        evaluate_every=200,
    ),
)
