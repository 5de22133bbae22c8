"""A label-specific backdoor in a ResNet20 on the German traffic signs, and its removal with 5 %.

    python -m moth_jax.main --config=configs/gtsrb_backdoor.py --workdir=DIR \\
        --config.data.dir=GTSRB_DIR

A magenta polygon anywhere on a stop sign makes it a speed limit of 80 km/h; on any other sign it
does nothing, which stamped images of those with their own labels teach.

Published, of patches: attack success from about 100 % to about 1 % with less than 1 % of accuracy
lost. With short budgets MOTH left 1 % of a polygon of 1 % of the image in one place on a ResNet20,
and on a small CNN 2 % of a patch, 15 % of that polygon, and one of 5 % of the image as it was
(experiments/results/table5_removal/); one that moves has no single mask to invert.
Hardware: one GPU or TPU; 1,806 directions take days on a CPU (config.distance.victims restricts
them).
"""

from moth_jax.run.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "gtsrb"
    config.data.dir = "~/gtsrb"
    config.data.size = 32
    config.training.epochs = 40

    config.backdoor.kind = "polygon"
    config.backdoor.target = "speed limit 80 km/h"
    config.backdoor.victims = ("stop",)
    config.backdoor.area = 0.1
    config.backdoor.colour = (1.0, 0.0, 1.0)
    # One class has few images: a copy of each is a fiftieth of all.
    config.backdoor.rate = 1.0

    config.clean_share = 0.05
    # One direction alone has the backdoor, which no universal trigger shows; who removes it does
    # not know that.
    config.harden.scheduler = "nearest"
    config.harden.approximate_warmup = False
    config.harden.universal_too = True
    # As many steps as the published ones on all images.
    config.harden.epochs = 40.0
    return config
