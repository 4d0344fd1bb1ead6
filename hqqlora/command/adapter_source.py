"""The model that an adapter is for."""

from __future__ import annotations

from pathlib import Path

from hqqlora.adapter_files import CONFIG_FILE
from hqqlora.command.errors import UsageError, explaining
from hqqlora.command.model_source import ModelSource, find_model
from hqqlora.command.packages import require


def find_base(adapter: Path, base: str | None) -> ModelSource:
    """The model at `base` (see `--base`), or the one that the adapter in the folder `adapter`
    names.

    Raises:
        UsageError: peft is missing; there is no adapter; it names no base; or there is none.
    """
    require("peft")
    if not (adapter / CONFIG_FILE).is_file():
        raise UsageError(f"{adapter} is no adapter: it has no {CONFIG_FILE}")
    if base is not None:
        return find_model(base, "--base")
    import peft

    with explaining(f"cannot read {adapter / CONFIG_FILE}"):
        name = peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name:
        raise UsageError(f"{adapter} names no base: give --base")
    return find_model(name, f"the base of {adapter} (see --base):")
