"""GGUF files, both ways: a quantized model is loaded, fine-tuned and written as it is."""

from hqqlora.gguf.adapter import export_gguf_adapter
from hqqlora.gguf.export import export_gguf
from hqqlora.gguf.load import load_gguf

__all__ = ["export_gguf", "export_gguf_adapter", "load_gguf"]
