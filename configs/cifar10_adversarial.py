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

from moth_jax.configuration import default_config

ADVERSARY = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 7}
METHODS = ("harden", "universal", "uap", "nc", "nad", "adversarial", "fine_tuning", "fine_pruning")


def get_config():
    config = default_config()
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.download = False
    config.training.epochs = 100
    for part in ("training", *METHODS):
        config[part].adversary.update(ADVERSARY)
    config.robustness.epsilon = 8 / 255
    config.robustness.step_size = 2 / 255
    config.robustness.num_steps = 20
    return config
