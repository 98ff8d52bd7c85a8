"""Other people's shapes: their models in our benchmark, our detectors in their engines; imported when asked for."""
