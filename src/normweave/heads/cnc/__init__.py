"""Cross-modal Normality Constraint: one decoder for all categories, constrained by text prompts."""
