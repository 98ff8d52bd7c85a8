"""Cross-modal Normality Constraint: one decoder for all categories, held to what text says of the normal."""
