"""ResNet20 on CIFAR-10: Table I, row "ResNet20, MOTH".

    python -m moth_jax.main --config=configs/cifar10.py --workdir=DIR \\
        --config.model.checkpoint=FILE --config.data.dir=TFDS_DIR

FILE holds PyTorch weights (.th, .pt, .pth, .safetensors; akamaster's layout) or the authors' Keras
.h5; the architecture and its normalisation are read off it. Without it a ResNet20 is trained first.

Published: accuracy 91.52 -> 90.34 %, class distance 53.49 -> 109.70, increase 108.62 %, hardening
29.68 minutes, the distance matrix 56.77 minutes (smallest of three seeds: distance.seeds=(0,1,2)).
--config.robustness.epsilon=0.03137 (8/255) measures the accuracy under the published PGD, too.
Hardware: one GPU or TPU; hours on a CPU.
"""

from moth_jax.run.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.download = False
    config.training.epochs = 100
    config.robustness.step_size = 2 / 255
    config.robustness.num_steps = 20
    return config
