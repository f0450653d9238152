"""The ops as they run on a CPU, and on any device that has no Triton."""
