"""Charts of results, as HTML and SVG in plain functions."""
