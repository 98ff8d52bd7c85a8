"""Image files to prepared images: layouts and manifests, splits, decoding, resizing and tiling. No torch."""
