"""Training on supervised rows: what is seen in which order, and a run that survives a crash.

Used by the stages `distill` (LoRA on the base student) and `fit` (the merged student in the number
formats that it ships in)."""
