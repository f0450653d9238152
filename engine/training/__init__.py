"""Training: data, augmentation, loading, evaluation; the loop is not here yet."""
