"""Formats and weights for hypothesis: small, of every number of bits, both axes, any group."""

from __future__ import annotations

import hypothesis
import torch
from format_oracle import Format
from hypothesis import strategies as st
from oracle import FLOATING, Oracle
from torch import Tensor

from hqqlora.ops import PackedWeight

BITS = (8, 4, 3, 2, 1)

nbits = st.sampled_from(BITS)
axes = st.sampled_from((0, 1))
dtypes = st.sampled_from(FLOATING)
# what tensors are filled from; its values are not worth shrinking
seeds = st.integers(0, 2**32 - 1)
odd_sizes = st.integers(1, 40)
# where groups and rows fill vectors and tiles other kernels serve
even_sizes = st.sampled_from((16, 32, 64, 96, 128))
sizes = st.one_of(odd_sizes, even_sizes)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def formats(draw: st.DrawFn, sizes: st.SearchStrategy[int] = sizes) -> Format:
    """Groups within a row or column half of the time; else any that divide the weight."""
    N, K, axis = draw(sizes), draw(sizes), draw(axes)
    G = draw(st.sampled_from(divisors(draw(st.sampled_from((K if axis else N, N * K))))))
    return Format(N, K, G, draw(nbits), axis)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(f: Format, seed: int) -> Tensor:
    """uint8 [N, K]."""
    return torch.randint(0, 2**f.nbits, (f.N, f.K), generator=generator(seed)).to(torch.uint8)


def random_words(f: Format, seed: int) -> Tensor:
    """W_q of random bits, those that hold no code among them."""
    if f.nbits == 3:
        words = torch.randint(-(2**31), 2**31, f.packed_shape, generator=generator(seed))
        return words.to(torch.int32)
    return torch.randint(0, 256, f.packed_shape, generator=generator(seed)).to(torch.uint8)


def random_meta(
    f: Format, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scales of one magnitude, zeros among the codes."""
    source = generator(seed)
    scale = (torch.rand(f.meta_shape, generator=source) + 0.5) * 0.1 / 2**f.nbits
    zero = torch.rand(f.meta_shape, generator=source) * (2**f.nbits - 1)
    return scale.to(dtype), zero.to(dtype)


@st.composite
def weights(draw: st.DrawFn, sizes: st.SearchStrategy[int] = sizes) -> Oracle:
    """Packed weights with random bits wherever a word has any."""
    f, seed = draw(formats(sizes)), draw(seeds)
    meta = random_meta(f, seed, draw(dtypes))
    return Oracle(PackedWeight(random_words(f, seed), *meta, f.N, f.K, f.nbits, f.G, f.axis))


def quick(max_examples: int) -> hypothesis.settings:
    """The same examples in every run, so that CI finds what it found before."""
    return hypothesis.settings(max_examples=max_examples, deadline=None, derandomize=True)
