"""A small CNN on the LISA traffic signs, from the published npy arrays: Table I's LISA rows.

    python -m moth_jax.main --config=configs/lisa.py --workdir=DIR --config.data.dir=LISA_DIR

LISA_DIR holds train_x.npy, train_y.npy, test_x.npy, test_y.npy (or x_train.npy, ...).
Hardware: one GPU or TPU; hours on a CPU.
"""

from moth_jax.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "lisa"
    config.data.dir = "~/lisa"
    config.data.pixel_max = 1.0
    config.model.name = "small_cnn"
    config.training.epochs = 40
    return config
