"""Architectures: one file for each family, one line in `models.MODELS` for each architecture.

An architecture is an `nnx.Module` that maps normalised images [n, h, w, c] to logits [n, K]. Its
last layer is called `head`, so that it can be exchanged for another number of classes. It is made
of `models.layers`, which know training mode and evaluation mode, and marks its feature maps by
`jax.ad_checkpoint.checkpoint_name` for the methods that read them (`models.features`).
"""
