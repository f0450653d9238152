"""Training: data, augmentation, loading, the loop, evaluation."""
