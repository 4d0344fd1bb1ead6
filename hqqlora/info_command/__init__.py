"""`hqqlora info`: what is in a quantized model or an adapter."""
