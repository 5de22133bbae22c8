"""ResNet20 on SVHN (cropped digits): Table I's SVHN rows.

    python -m moth_jax.main --config=configs/svhn.py --workdir=DIR \\
        --config.model.checkpoint=FILE --config.data.dir=TFDS_DIR

Without a checkpoint a ResNet20 is trained first.
--config.robustness.epsilon=0.03 measures the accuracy under the published PGD, too.
Hardware: one GPU or TPU; hours on a CPU.
"""

from moth_jax.run.configuration import default_config, set_adversary
from moth_jax.training import PUBLISHED_ADVERSARIES


def get_config():
    config = default_config()
    config.data.name = "svhn"
    config.data.dir = "~/tensorflow_datasets"
    config.data.download = False
    config.training.epochs = 40
    # As published for these data, where the method is adversarial training.
    set_adversary(config, PUBLISHED_ADVERSARIES["svhn"], parts=["adversarial"])
    config.robustness.step_size = 0.001
    config.robustness.num_steps = 100
    return config
