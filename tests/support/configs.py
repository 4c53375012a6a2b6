"""A small valid configuration, as text with one key a line, for tests that change one thing in it."""

SMALL = """\
model:
  name: resnet18
  num_classes: 10
data:
  train: data/train.beton
  val: data/val.beton
  batch_size: 128
  crop_scale: [0.25, 1.0]
optimizer:
  lr: 0.1
perturbation:
  rho: 0.2
  mask:
    pattern: depth
    cut: [0.25, 0.75]
train:
  epochs: 3
"""
