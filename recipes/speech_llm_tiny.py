"""speech-llm-tiny, third stage: the decoder gets the ears of asr-tiny's encoder.

12.5 M parameters with the heads: the encoder, which goes on learning, 5.6 M; the decoder 6.4 M.
An embedding of the audio for every token that CTC wrote. A step on 60 s of audio takes about 1.3 s
of one core.
The stages, each from the checkpoint of the one before:

offramp train recipes/speech_llm_decoder.py
offramp train recipes/speech_llm_corrector.py
offramp train recipes/speech_llm_tiny.py
offramp train recipes/speech_llm_tiny_heads.py
offramp train recipes/speech_llm_mwer.py
"""

from offramp.config_speech_lm import ProjectorConfig
from offramp.data.augment_audio import AudioAugmentation
from offramp.train.augment import SpecAugment
from offramp.train.loop import TrainConfig
from offramp.train.speech_lm import SpeechLMTraining
from offramp.train.speech_lm_recipe import NewDecoder, SpeechLMRecipe

recipe = SpeechLMRecipe(
    name="speech-llm-tiny",
    model=NewDecoder(
        encoder="asr-tiny",
        projector=ProjectorConfig(stack=1, d_hidden=512, kind="ctc"),
        decoder="runs/speech-llm-corrector/checkpoint",
        ctc_exit=12,
    ),
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
        ctc=0.3,
        decoder_exits=(2, 3, 4),
        token_noise=0.1,
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
        steps=3000,
        lr=1e-3,
        warmup_steps=200,
        optimizer="muon",
        weight_decay=0.05,
        average=0.999,
        checkpoint_every=100,
        evaluate_every=300,
    ),
)
