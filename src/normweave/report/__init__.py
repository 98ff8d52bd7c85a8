"""How well a detector does, in numbers, pictures and one page."""
