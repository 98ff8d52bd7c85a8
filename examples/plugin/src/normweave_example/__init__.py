"""A head and a layout for normweave in a package of its own."""
