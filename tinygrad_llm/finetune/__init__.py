"""A pretrained model made for a task, and how good it is at it."""
