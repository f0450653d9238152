"""What the paper describes: configuration, modules, weights."""
