"""The plumbing of the notebook: files, tables, pixels, weights, runs, figures; no story in it."""
