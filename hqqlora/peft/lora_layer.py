"""HQQLoraLinear: what PEFT puts around a quantized layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hqqlora.autograd import lora_linear
from hqqlora.autograd.shared_input import Part
from hqqlora.linear import HQQLinear
from hqqlora.lora import MERGED_KEYS
from hqqlora.ops.adapter_checks import MAX_RANK
from hqqlora.peft import initialization, merging
from hqqlora.peft.dora import HQQDoraLayer, HQQDoraVariant
from hqqlora.peft.plain_modules import is_plain
from hqqlora.shared_projections import SharesInput
from hqqlora.zero_partitions import is_partitioned


class HQQLoraLinear(Linear, SharesInput):  # type: ignore[misc]
    """PEFT's LoRA layer, with the base's product and the adapter's in one operation, forward
    and backward, wherever nothing stands against it (see `_fusible`).

    Its parameters, their names and their values are those of PEFT's own layer, and so are its
    files. Where the operation is not used, PEFT's separate ones are, on an `HQQLinear` whose
    product is hqqlora's too.

    Merging quantizes the sum again, with the base's own configuration; `requantization_error`
    is the relative error of that, None as long as no adapter has changed the base's weight.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as PEFT passes them to its own layers: base layer, adapter's name, and what
        else its version has."""
        self.target_name: str = kwargs.get("target_name") or ""
        self.requantization_error: float | None = None
        self.unmerged_error: float | None = None
        super().__init__(*args, **kwargs)
        # The base as it was before merging. Buffers, so that they move along; not saved.
        for name in MERGED_KEYS:
            self.register_buffer(f"unmerged_{name}", None, persistent=False)

    # ---- forward --------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out_features] in x's dtype for x [..., in_features]."""
        adapters = [] if args or kwargs else self._fusible(x)
        if not adapters:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if self.shared_projection is not None:
            shared = self.shared_projection.output(self, x)
            if shared is not None:
                return shared
        base = self.base_layer
        A, B, scaling = self._factors(adapters)
        dropout = self._dropout(adapters[0])
        if adapters[0] in self.lora_variant:
            dora: HQQDoraLayer = self.lora_magnitude_vector[adapters[0]]
            return dora.fused(x, base, A, B, scaling, dropout)
        return lora_linear(x, base.packed, self._bias_for(x, adapters), A, B, scaling, dropout)

    def shared_part(self, x: Tensor) -> Part | None:
        """What `share_projections` needs of the layer, for `x`: one adapter, without dropout or
        DoRA; else None."""
        adapters = self._fusible(x)
        if len(adapters) != 1 or adapters[0] in self.lora_variant:
            return None
        if self._dropout(adapters[0]) != 0.0:
            return None
        A, B, scaling = self._factors(adapters)
        return Part(self.base_layer.packed, self._bias_for(x, adapters), A, B, scaling)

    def _fusible(self, x: Tensor) -> list[str]:
        """The active adapters, if one operation can serve them; else nothing.

        It can serve one adapter, DoRA included, or several without dropout, which has one
        mask. Against it: adapters that are disabled or merged, other variants, ranks that add
        up to more than 256, modules in the place of PEFT's nn.Linear and nn.Dropout, and hooks,
        which would not be called.
        """
        base = self.base_layer
        if self._disable_adapters or self.merged_adapters or not isinstance(base, HQQLinear):
            return []
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if not adapters or not is_plain(base, HQQLinear, x):
            return []
        alone = len(adapters) == 1
        rank = 0
        for name in adapters:
            dropout = self._dropout(name)
            if (
                not (0.0 <= dropout < 1.0 if alone else dropout == 0.0)
                or not (name not in self.lora_variant or (alone and self._is_dora(name, x)))
                or not is_plain(self.lora_A[name], nn.Linear, x)
                or not is_plain(self.lora_B[name], nn.Linear, x)
            ):
                return []
            rank += self.lora_A[name].weight.shape[0]
        return adapters if rank <= MAX_RANK else []

    def _is_dora(self, adapter: str, x: Tensor) -> bool:
        """Whether `HQQDoraLayer.fused` may stand for the layer's forward."""
        return type(self.lora_variant[adapter]) is HQQDoraVariant and is_plain(
            self.lora_magnitude_vector[adapter], HQQDoraLayer, x
        )

    def _dropout(self, adapter: str) -> float:
        """The probability in force; NaN if it is not an nn.Dropout that decides."""
        dropout = self.lora_dropout[adapter]
        if type(dropout) is nn.Dropout:
            return dropout.p if dropout.training else 0.0
        return 0.0 if type(dropout) is nn.Identity else float("nan")

    def _factors(self, adapters: list[str]) -> tuple[Tensor, Tensor, float]:
        """A [R, K], B [N, R] and scaling; several adapters side by side are one of the sum of
        their ranks."""
        if len(adapters) == 1:
            (name,) = adapters
            return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        A = [self.lora_A[name].weight for name in adapters]
        B = [self.lora_B[name].weight * self.scaling[name] for name in adapters]
        return torch.cat(A), torch.cat(B, 1), 1.0

    def _bias_for(self, x: Tensor, adapters: list[str]) -> Tensor | None:
        """The base's bias for x, with those of the adapters if they have any."""
        total = self._total_bias(adapters)
        return self.base_layer.bias_for(x) if total is None else total

    def _total_bias(self, adapters: list[str]) -> Tensor | None:
        """bias + scaling * lora_bias [N], float32, differentiable; None without lora_bias."""
        total: Tensor | None = None
        for name in adapters:
            own = self.lora_B[name].bias
            if own is not None:
                own = self.scaling[name] * own.float()
                total = own if total is None else total + own
        if total is None or self.base_layer.bias is None:
            return total
        bias: Tensor = self.base_layer.bias
        return bias.float() + total

    # ---- merging --------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts adapters (None: the active ones) into the base's weight, as in PEFT. The sum is
        checked before anything is changed, whatever `safe_merge` says.

        Raises:
            RuntimeError: an adapter has a lora_bias, but the base no bias.
            ValueError: the sum is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if names:
            with torch.no_grad():
                merging.merge(self, names)

    def unmerge(self) -> None:
        """Brings the base back as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        merging.unmerge(self)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * B A`` [out_features, in_features], float32."""
        A, B = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        delta: Tensor = B @ A * self.scaling[adapter]
        return delta

    # ---- new adapters ---------------------------------------------------------------

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """PEFT's choice, with DoRA in hqqlora's form.

        Raises:
            ValueError: KaSA, which replaces the weight by a part of itself.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if type(variant).__name__ == "KasaLinearVariant":
            raise ValueError(
                f"{merging.describe(self)}: KaSA needs a weight that is not quantized"
            )
        return HQQDoraVariant() if type(variant) is DoraLinearVariant else variant

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """A and B from the largest singular values of the dequantized weight."""
        initialization.take_from_base(
            self, adapter_name, lambda: Linear.pissa_init(self, adapter_name, init_lora_weights)
        )

    def olora_init(self, adapter_name: str) -> None:
        """A and B from the QR decomposition of the dequantized weight."""
        initialization.take_from_base(
            self, adapter_name, lambda: Linear.olora_init(self, adapter_name)
        )

    def loftq_init(self, adapter_name: str, config: Any = None) -> None:
        """See `initialization.loftq`; of the LoftQConfig, `loftq_iter` is used."""
        options: Mapping[str, Any] = (
            self.kwargs if config is None else config.loftq_config or {}
        )
        initialization.loftq(self, adapter_name, options.get("loftq_iter", 1))

    def mica_init(self, adapter_name: str) -> None:
        """B from the smallest singular values of the dequantized weight."""
        with initialization.dense_base(self):
            super().mica_init(adapter_name)

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Raises ValueError."""
        self._refuse_initialization(init_lora_weights)

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        """PEFT's, which without prepared gradients is the default initialisation.

        Raises:
            ValueError: there are gradients, which belong to a dense weight.
        """
        if hasattr(self.get_base_layer(), "_peft_loraga_grad"):
            self._refuse_initialization("lora_ga")
        super().lora_ga_init(adapter_name, lora_ga_config)

    def _refuse_initialization(self, name: str) -> None:
        raise ValueError(
            f"{merging.describe(self)}: init_lora_weights={name!r} is made from what a dense "
            f"weight was measured at, and cannot be had from a quantized one; 'pissa', 'olora' "
            f"and 'loftq' can"
        )

    # ---- checkpoints ----------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Says of an adapter for another base what is found and what is expected."""
        for name in self.lora_A:
            r = self.r[name]
            for part, expected in (
                ("lora_A", (r, self.in_features)),
                ("lora_B", (self.out_features, r)),
            ):
                found = state_dict.get(f"{prefix}{part}.{name}.weight")
                if is_partitioned(getattr(self, part)[name].weight):
                    continue  # torch compares placeholders, DeepSpeed loads what belongs there
                if found is not None and tuple(found.shape) != expected:
                    error_msgs.append(
                        f"{prefix.rstrip('.') or 'layer'}: {part} of the adapter {name!r} is "
                        f"{list(found.shape)}, but this layer ({self.in_features} to "
                        f"{self.out_features} features) and r={r} call for {list(expected)}: "
                        f"it was trained on another base"
                    )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
