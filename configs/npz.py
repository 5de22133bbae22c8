"""Your own images in one npz file.

    python -m moth_jax.main --config=configs/npz.py --workdir=DIR --config.data.file=FILE.npz

FILE.npz holds x_train, y_train, x_test, y_test and, if you like, x_val, y_val and class_names:
images [n, h, w, c] as uint8, or as floats from 0 to data.pixel_max; labels as integers.
Hardware: depends on the images; see configs/cifar10.py.
"""

from moth_jax.run.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "npz"
    config.data.file = ""
    config.data.pixel_max = 1.0
    config.data.flip = False
    config.data.shift = 0
    config.model.name = "resnet20"
    return config
