"""The laboratory: trains every method of a recipe under identical conditions, and reports what came out."""
