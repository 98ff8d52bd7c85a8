from small_bundle import bundle, cloth, detector, photos  # noqa: F401 - fixtures
