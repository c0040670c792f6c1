"""Questions: published sets and their downloads, generators, the exact step checker, prompts."""
