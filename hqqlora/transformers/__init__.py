"""HQQ in transformers 5: ``from_pretrained(..., quantization_config=HqqConfig(...))``.

Importing this replaces transformers' own entries for the method "hqq", which raise
NotImplementedError, so that models are quantized while they are loaded, and checkpoints of
this library, of transformers 4 and of hqq load and save::

    from hqqlora import HqqConfig
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=HqqConfig(nbits=4, group_size=64), device_map="auto"
    )
    model.save_pretrained("my-model")
"""

from hqqlora.transformers.registration import register  # isort: skip (it checks the version)

from hqqlora.transformers.config import HqqConfig
from hqqlora.transformers.mark_quantized import mark_quantized
from hqqlora.transformers.quantizer import HqqQuantizer

__all__ = ["HqqConfig", "HqqQuantizer", "mark_quantized"]

register(HqqConfig, HqqQuantizer)
