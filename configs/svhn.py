"""ResNet20 on SVHN (cropped digits): Table I's SVHN rows.

    python -m moth_jax.main --config=configs/svhn.py --workdir=DIR \\
        --config.model.checkpoint=FILE --config.data.dir=TFDS_DIR

Without a checkpoint a ResNet20 is trained first.
Hardware: one GPU or TPU; hours on a CPU.
"""

from moth_jax.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "svhn"
    config.data.dir = "~/tensorflow_datasets"
    config.data.download = False
    config.training.epochs = 40
    return config
