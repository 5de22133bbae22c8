"""A backdoor in a ResNet20 on CIFAR-10, and its removal with 5 % of the training images.

    python -m moth_jax.main --config=configs/cifar10_backdoor.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

A patch of 3x3 pixels on an image of any class makes it a deer. Training plants it, hardening is to
take it out: the attack success rate of both models stands in the summary and the report.

Published: attack success from about 100 % to about 1 % with less than 1 % of accuracy lost. The
scheduler is not the published one, which comes to a small trigger late
(experiments/results/table5_removal/).
Hardware: one GPU or TPU; hours on a CPU.
"""

from moth_jax.run.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.download = False
    config.training.epochs = 100

    config.backdoor.kind = "patch"
    config.backdoor.target = "deer"
    config.backdoor.size = 3
    # Images are shifted by up to 4 pixels in training: all of the patch stays in the picture.
    config.backdoor.margin = 4

    config.clean_share = 0.05
    config.harden.scheduler = "nearest"
    # As many steps as the published ones on all images.
    config.harden.epochs = 40.0
    return config
