"""What apps and operators rely on, kept in golden files: a change of one of them is a change of the product."""
