"""Training: data, augmentation, the loop, evaluation. Nothing is here yet."""
