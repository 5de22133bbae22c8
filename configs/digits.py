"""A small CNN on scikit-learn's bundled handwritten digits: the whole job in a few minutes.

    python -m moth_jax.main --config=configs/digits.py --workdir=DIR

Needs nothing but Python: the 1,797 images of 8x8 pixels come with scikit-learn.
Hardware: 2 CPU cores.
"""

from moth_jax.run.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "digits"
    config.model.name = "small_cnn"
    config.training.epochs = 15
    config.training.batch_size = 64
    config.training.learning_rate = 0.05

    # A class has few images: more passes over them.
    config.distance.num_images = 30
    config.distance.num_steps = 200
    config.harden.max_steps = 120
    config.harden.warmup_steps = 100
    config.harden.first_steps = 60
    config.harden.next_steps = 20
    config.harden.stamp_share = 0.5
    config.harden.learning_rate = 3e-3
    config.harden.batch_norm = "frozen"
    config.harden.max_accuracy_drop = 0.04
    return config
