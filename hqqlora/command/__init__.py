"""What the commands share: errors in one line, options, the machine, finding a model."""
