"""What the commands share: errors in one line, options, units, the machine, finding a model,
reading a checkpoint without loading it."""
