"""Sources of images, one module for each `type` of `sources` in `line.yaml`."""
