"""Kernels that may replace shipped ones, measured beside them; nothing in the library imports them."""
