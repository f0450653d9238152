"""Pictures: read from files, resized to what the network takes, drawn on. Inference and training share it."""
