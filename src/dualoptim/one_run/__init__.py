"""One run: what it starts from, its steps and their scores, what is looked at between steps, when it stops."""
