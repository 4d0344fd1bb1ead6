"""`hqqlora train`: fine-tunes a language model with LoRA on quantized weights."""
