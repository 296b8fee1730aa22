"""The two layouts of sparse MLA caches, told apart by the bytes of a token, and where in a block what lies."""

from __future__ import annotations

from typing import NamedTuple

import torch

VALUE_DIM = 512
"""What attention returns for a head."""
ROPE_DIM = 64


class CacheLayout(NamedTuple):
    """A token's key: FP8 values in groups with a scale each, then 64 RoPE values in bf16.

    584 bytes, DeepSeek V4 (``fp8_ds_mla``). A block has the values of all its tokens, then the UE8M0 scales of all; all
    512 values are also those that attention returns::

        | 448 codes | 64 bf16 | 448 codes | 64 bf16 | ... | 7 scales, 1 pad | 7 scales, 1 pad | ... |
          token 0 (576 bytes)   token 1                     token 0 (8 bytes) token 1

    656 bytes, DeepSeek V3.2. A token has all its bytes together; attention returns the first 512 values::

        | 512 codes | 4 fp32 scales | 64 bf16 | 512 codes | 4 fp32 scales | 64 bf16 | ... |
          token 0 (656 bytes)                   token 1
    """

    token_bytes: int
    head_dim: int
    """Elements of a key."""
    group_size: int
    """FP8 values a scale."""

    @property
    def nope_dim(self) -> int:
        """FP8 values."""
        return self.head_dim - ROPE_DIM

    @property
    def has_ue8m0(self) -> bool:
        """Whether scales are powers of two, as their biased exponents; else fp32."""
        return self.token_bytes == 584


LAYOUTS = {584: CacheLayout(584, 512, 64), 656: CacheLayout(656, 576, 128)}


class TokenBytes(NamedTuple):
    """The bytes of tokens ``[..., n]`` by what they are; views of a cache, or parts of what is written to one."""

    codes: torch.Tensor
    scale: torch.Tensor
    """8 (the last one is padding) or 16."""
    rope: torch.Tensor


def token_views(cache: torch.Tensor) -> TokenBytes:
    """Views ``[blocks, block_size, n]`` of the bytes of a cache ``[blocks, block_size, 584 or 656]``."""
    if cache.shape[2] == 656:
        codes, scale, rope = cache.split([512, 16, 128], dim=-1)
        return TokenBytes(codes, scale, rope)
    blocks, block_size, _ = cache.shape
    apart = cache.stride(0)
    data = cache.as_strided((blocks, block_size, 576), (apart, 576, 1))
    scales = cache.as_strided((blocks, block_size, 8), (apart, 8, 1), cache.storage_offset() + block_size * 576)
    return TokenBytes(data[..., :448], scales, data[..., 448:])
