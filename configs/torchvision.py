"""A classifier of torchvision, hardened on a folder of your own images.

    python -m moth_jax.main --config=configs/torchvision.py --workdir=DIR \\
        --config.model.checkpoint=FILE --config.data.dir=IMAGES

FILE holds weights (.pt, .pth, .safetensors), a program of torch.export (.pt2), or a checkpoint
folder. torchvision's ResNets, Wide ResNet and VGGs with batch norm are recognised; name any other
one (--config.model.name=mobilenet_v2), or give a function that builds the module
(--config.model.builder=my_models.py:build), with mean and std. A file of a whole module of
torchvision is read with --config.model.trust=torchvision.

IMAGES has one sub-folder per class, or train/, val/ and test/ with those. For some classes of a
large head, name its classes in order (--config.data.class_list=FILE, or "imagenet" where the
sub-folders are synsets): distances and hardening are among the classes that have images, or those
of --config.classes; the others stay untouched, and their accuracy is reported, too. Or let
--config.model.fine_tune=True give the model a new head for the classes of the folder, and train it
with config.training before it is measured.

Published (TrojAI's models, 5 to 25 classes, 224 px): distances +232.39 % on average, 118 minutes.
Hardware: one GPU or TPU with 16 GB.
"""

from moth_jax.run.configuration import default_config


def get_config():
    config = default_config()
    config.data.name = "folder"
    config.data.dir = ""
    config.data.image_size = 224
    config.data.resize = 0  # of the shorter side before the crop; 0 for 256/224 of image_size
    config.data.interpolation = "bilinear"
    config.data.class_list = ""
    config.data.skip_unreadable = False
    config.data.flip = True
    config.data.validation_fraction = 0.5
    # Of a model that is to be fine-tuned; others come trained.
    config.training.epochs = 10
    config.training.batch_size = 64
    config.training.learning_rate = 0.01
    config.distance.num_images = 50
    # As the published code for these models: frozen batch normalisation.
    config.harden.batch_norm = "frozen"
    config.harden.learning_rate = 1e-4
    config.harden.weight_decay = 0.0
    config.harden.batch_size = 64
    return config
