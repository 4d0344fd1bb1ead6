"""`hqqlora quantize`: a checkpoint that need not fit into memory, one tensor after another."""
