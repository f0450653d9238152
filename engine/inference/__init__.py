"""From a picture to a result."""
