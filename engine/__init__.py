"""Mask R-CNN: the model, inference and training."""
