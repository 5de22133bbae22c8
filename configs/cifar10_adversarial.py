"""An adversarially trained ResNet20 on CIFAR-10: Table II, row "ResNet20, MOTH".

    python -m moth_jax.main --config=configs/cifar10_adversarial.py --workdir=DIR \\
        --config.data.dir=TFDS_DIR

Training perturbs every batch by PGD, epsilon 8/255 and 7 steps of 2/255, and so does hardening the
images that it does not stamp, by whichever method. Robustness is the accuracy on 1,000 test images
under 20 steps of the same.

Published: accuracy 74.87 -> 74.04 %, robustness 42.80 -> 43.00 %, class distance 209.59 -> 270.57,
increase 32.16 %, hardening 38.71 minutes.
Hardware: one GPU or TPU; days on a CPU.
"""

from moth_jax.run.configuration import default_config, set_adversary
from moth_jax.training import PUBLISHED_ADVERSARIES


def get_config():
    config = default_config()
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.download = False
    config.training.epochs = 100
    set_adversary(config, PUBLISHED_ADVERSARIES["cifar10"])
    config.robustness.epsilon = 8 / 255
    config.robustness.step_size = 2 / 255
    config.robustness.num_steps = 20
    return config
