"""Making transformers use our quantizer for the method "hqq"."""

from __future__ import annotations

from hqqlora.optional_packages import command_for, needing

with needing("hqqlora.transformers"):
    import transformers
    from transformers.quantizers import auto

_METHOD = "hqq"

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        "hqqlora.transformers needs transformers 5 or newer, found "
        f"{transformers.__version__}: {command_for('transformers')}"
    )


def register(config_class: type, quantizer_class: type) -> None:
    """Replaces what transformers has for "hqq". Its own register functions refuse a name that
    is taken."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = config_class
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = quantizer_class
