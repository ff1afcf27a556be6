"""What an answer is worth: one module a task, each measure with its standard error."""
